"""A pretrained Qwen2, trained and saved here, becomes each of the architectures."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.export import export, load_run
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ALL, BACKBONE, ROUTED, logits, tokens


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder of a small Qwen2 that has learnt to count, so that its layers matter."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**BACKBONE, initializer_range=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        first = torch.randint(0, 97, (8, 1), generator=torch.Generator().manual_seed(step))
        ids = (first + 3 * torch.arange(24)) % 97
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 4
    folder = tmp_path_factory.mktemp("pretrained")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def converted(pretrained, make_settings):
    def convert(architecture, folder=pretrained, vocab_size=97, **model):
        values = {"pretrained": str(folder)} | model
        data = {"tokenizer_name": str(folder)}
        return build_model(
            make_settings(architecture, model=values, data=data, training={"mode": "pretrained"}), vocab_size
        )

    return convert


@pytest.mark.parametrize("architecture", ALL)
def test_every_tensor_lands_where_it_belongs(architecture, converted, pretrained):
    state = converted(architecture).state_dict()
    for name, value in load_file(pretrained / "model.safetensors").items():
        assert torch.equal(state[name], value), name
    new = state.keys() - Qwen2ForCausalLM.from_pretrained(pretrained).state_dict().keys()
    assert all(name.startswith(ARCHITECTURES[architecture].new_parts) for name in new)
    assert bool(new) == (architecture in ROUTED)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_at_full_capacity_with_unit_gate_it_equals_its_source(
    architecture, mode, converted, pretrained, monkeypatch
):
    model = converted(architecture, capacity=1.0).train(mode == "train")
    ids = tokens(2, 24)
    expected = logits(Qwen2ForCausalLM.from_pretrained(pretrained), ids)
    assert not torch.allclose(logits(model, ids), expected, atol=1e-2)
    monkeypatch.setattr(torch, "sigmoid", torch.ones_like)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ALL)
def test_a_tensor_that_has_no_place_is_named(architecture, converted, pretrained, tmp_path):
    source = Qwen2ForCausalLM.from_pretrained(pretrained)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in ({}, {name: tensors[name][:-1].clone()}):  # missing, of another shape
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest | changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            converted(architecture, tmp_path)


SAMPLING = {
    "bos_token_id": 3,
    "eos_token_id": [7, 0],
    "pad_token_id": 5,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "max_new_tokens": 11,
}
CONTRADICTORY = {"eos_token_id": [7, 0], "temperature": 0.6}  # no do_sample; published ones are like that


@pytest.mark.parametrize("kept", [SAMPLING, CONTRADICTORY], ids=["sampling", "contradictory"])
@pytest.mark.parametrize("architecture", ["standard", "sdt"])
def test_how_the_source_generates_is_kept_to_the_exported_folder(
    architecture, kept, make_settings, data_dir, tmp_path
):
    Qwen2ForCausalLM(Qwen2Config(**BACKBONE | {"vocab_size": 300})).save_pretrained(tmp_path / "source")
    (tmp_path / "source/generation_config.json").write_text(json.dumps(kept))
    load_tokenizer(data_dir).save_pretrained(tmp_path / "source")
    settings = make_settings(
        architecture,
        model={"pretrained": str(tmp_path / "source")},
        data={"tokenizer_name": str(tmp_path / "source")},
        training={"mode": "pretrained", "max_steps": 2},
    )
    folder = export(train(settings, data_dir, tmp_path / "run"), tmp_path / "model")
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved.items() >= kept.items()
    assert load_run(tmp_path / "run").generation_config.to_dict().items() >= kept.items()


def test_what_cannot_work_is_refused(converted, pretrained, make_settings, tmp_path):
    with pytest.raises(UserError, match="use the tokenizer of that model"):
        converted("mod", vocab_size=98)
    source = Qwen2ForCausalLM.from_pretrained(pretrained)
    source.config.use_sliding_window = True
    source.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sliding-window"):
        converted("mod", tmp_path)
    with pytest.raises(UserError, match=r"needs data\.tokenizer_name"):
        make_settings("mod", model={"pretrained": str(pretrained)}, training={"mode": "pretrained"})
    with pytest.raises(UserError, match="nowhere"):
        converted("mod", "/nowhere/at-all")
