"""PEFT works on our models as on any of transformers, and adapters keep what routing needs."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynamic_transformers.models.architectures import ARCHITECTURES
from tests.models.tiny import ALL, PREDICTOR, ROUTED, calibrated, logits, tiny_model, tokens


@pytest.mark.parametrize("architecture", ALL)
def test_lora_adapters_train_generate_and_merge(architecture):
    model, ids = calibrated(architecture), tokens(2, 16)
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"], r=4)
    )
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.05)
    first = None
    for _ in range(8):
        loss = adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first = loss.item() if first is None else first
    assert loss.item() < first
    after = {
        name.replace(".base_layer", ""): value for name, value in adapted.base_model.model.named_parameters()
    }
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    prompt = ids[:, :6]
    generated = adapted.eval().generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    before = logits(adapted, ids)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), before, atol=1e-4, rtol=1e-3)
    assert torch.equal(merged.generate(prompt, max_new_tokens=4, do_sample=False), generated)


def train_adapter(model, steps: int, **options):
    """The model with an adapter that has learned for some steps, in eval mode."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options)).train()
    trained = [value for value in adapted.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    routed = hasattr(model, "routing_state")
    for step in range(steps):
        if routed:
            adapted.set_progress(step, steps)
        ids = tokens(2, 32, seed=step)
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if routed:
            adapted.advance()
    return adapted.eval()


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}], ids=["some", "all-linear"])
@pytest.mark.parametrize("architecture", ALL)
def test_a_saved_adapter_on_a_fresh_base_and_a_merged_one_are_the_model_that_was_trained(
    architecture, options, tmp_path
):
    ids = tokens(2, 24, seed=77)
    adapted = train_adapter(tiny_model(architecture), 20, **options)
    expected = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ids), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again, ids), expected, atol=1e-4, rtol=1e-3)
    # Without the adapter the base is what it was.
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), logits(tiny_model(architecture).eval(), ids))


@pytest.mark.parametrize("start", [True, "pissa"])
@pytest.mark.parametrize("architecture", ALL)
def test_adapters_on_all_linear_layers_start_as_the_model_and_all_learn(architecture, start):
    model, ids = calibrated(architecture, **PREDICTOR.get(architecture, {})), tokens(2, 24)
    before = logits(model, ids)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=start, r=4, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    assert not any("lora" in name and ".predictor." in name for name, _ in adapted.named_parameters())
    torch.testing.assert_close(logits(adapted, ids), before, atol=1e-4, rtol=1e-3)
    adapted.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


def deciding_parts(architecture):
    """Parts of a router that decide, which are no linear layers as the prior network's are."""
    return sorted(ARCHITECTURES[architecture].parts.keys() - {"prior", "predictor"})


@pytest.mark.parametrize("architecture", ROUTED)
def test_an_adapter_that_leaves_new_routers_untrained_says_so_once(architecture):
    def warned(model, **options):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"], "r": 2} | options))
        return [str(each.message) for each in seen if "never trained" in str(each.message)]

    (line,) = warned(tiny_model(architecture))
    parts = eval(line.split("modules_to_save=")[1])
    assert warned(tiny_model(architecture), modules_to_save=parts) == []
    assert warned(calibrated(architecture)) == []  # has been trained
    fresh = dict(tiny_model(architecture).named_parameters())
    options = {"modules_to_save": parts, "target_modules": ["q_proj"]}
    for name, value in train_adapter(tiny_model(architecture), 2, **options).named_parameters():
        if ".modules_to_save." in name:
            plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            assert not torch.equal(value, fresh.pop(plain)), name
    assert [name for name in fresh if ".routers." in name] == []
    # Adapters on all linear layers pass the parts by that decide.
    told = warned(tiny_model(architecture), target_modules="all-linear")
    assert [line.split("modules_to_save=")[1] for line in told] == [str(deciding_parts(architecture))]


@pytest.mark.parametrize("architecture", ROUTED)
def test_an_adapter_on_a_score_head_is_refused(architecture):
    for name in deciding_parts(architecture):
        with pytest.raises(ValueError, match="not supported"):
            get_peft_model(tiny_model(architecture), LoraConfig(target_modules=[name], r=2))


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_second_adapter_has_thresholds_of_its_own_or_is_refused(architecture, tmp_path):
    base, ids = calibrated(architecture), tokens(2, 24)
    expected = logits(base, ids)
    adapted = train_adapter(base, 2)
    first = logits(adapted, ids)
    config = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["v_proj"]}
    adapted.add_adapter("without", LoraConfig(**config))
    with pytest.raises(ValueError, match=r"give it modules_to_save=\['routing_state'\]"):
        adapted.set_adapter("without")
    adapted.add_adapter("second", LoraConfig(**config, modules_to_save=["routing_state"]))
    adapted.set_adapter("second")
    for step in range(4):
        adapted.train().set_progress(step, 4)
        adapted(input_ids=tokens(2, 32, seed=step), use_cache=False)
        adapted.advance()
    second = logits(adapted.eval(), ids)
    assert not torch.allclose(second, expected)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), expected)
    adapted.save_pretrained(tmp_path, selected_adapters=["second"])
    loaded = PeftModel.from_pretrained(calibrated(architecture), tmp_path / "second").eval()
    torch.testing.assert_close(logits(loaded, ids), second)
    adapted.set_adapter("default")
    torch.testing.assert_close(logits(adapted, ids), first)
