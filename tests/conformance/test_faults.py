"""Each fault of public implementations (architectures.md, section 8), put in here and caught by a check.

A check says whether the contract is broken; it must say no without the fault and yes with it.
"""

import pytest
import torch
from transformers import Qwen2ForCausalLM

from dynamic_transformers.models import mod, routing, sdt, stt
from dynamic_transformers.models.routing import routed_update
from dynamic_transformers.models.selection import Selection
from dynamic_transformers.models.surprise import SurpriseGate
from dynamic_transformers.training.build import build_model
from tests.conformance.test_cache import cached_logits
from tests.conformance.test_causality import future_leaks
from tests.models.tiny import BACKBONE, ROUTED, VOCAB, calibrated, logits, tiny_model, tokens

LENGTH = 24


def differ(a, b):
    return not torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def rows_leak(model):
    ids = tokens(3, LENGTH)
    return differ(logits(model, ids)[2], logits(model, ids[2:])[0])


def padding_leaks(model):
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    got = logits(model, ids, attention_mask=mask)
    return differ(got[1, 10:], logits(model, ids[1:, 10:])[0])


def cache_differs(model):
    ids = tokens(1, LENGTH)
    return differ(cached_logits(model, ids, range(8, LENGTH))[0], logits(model, ids))


def block_sees_more_than_the_selected(model):
    layer = model.config.routed_layers[0]
    seen = []
    projection = model.model.layers[layer].self_attn.q_proj
    handle = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    selected = model(input_ids=tokens(1, LENGTH), use_cache=False).routing[layer].selected
    handle.remove()
    return seen[-1] > selected.sum()


def parameters_without_gradient(model):
    ids = tokens(2, LENGTH)
    model(input_ids=ids, labels=ids).loss.backward()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def block_sees_another_order(model):
    """Whether the block saw its selected tokens in another order than that of their places, in training."""
    layer = model.config.routed_layers[0]
    router, captured = model.model.routers[str(layer)], []
    handle = router.register_forward_hook(lambda _, inputs, output: captured.append((inputs[1], output)))
    model.train()
    model(input_ids=tokens(1, LENGTH))
    handle.remove()
    x, (y, result) = captured[0]
    places = result.selected[0].nonzero().flatten()
    alone = model.model.layers[layer](
        x[:, places],
        position_ids=places.unsqueeze(0),
        position_embeddings=model.model.rotary_emb(x, places.unsqueeze(0)),
    )
    gate = (
        result.gate[:, places]
        if model.config.model_type != "qwen2_stt"
        else result.score[:, places].sigmoid()
    )
    return differ(y[:, places], x[:, places] + gate.unsqueeze(-1) * (alone - x[:, places]))


def modes_differ(model, given_selection):
    ids = tokens(2, LENGTH)
    trained = model.train()(input_ids=ids)
    given_selection(model.eval(), {layer: result.selected for layer, result in trained.routing.items()})
    return differ(logits(model, ids), trained.logits)


def patch(monkeypatch, name, replacement):
    """Replace a function of routing.py wherever a model uses it."""
    for module in (routing, mod, sdt, stt):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, replacement)


def test_1_pretrained_weights_dropped(make_settings, tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = Qwen2ForCausalLM(type(tiny_model("standard").config)(**BACKBONE))
    source.save_pretrained(tmp_path)
    model = {"pretrained": str(tmp_path)}
    settings = make_settings(
        "mod", model=model, data={"tokenizer_name": "x"}, training={"mode": "pretrained"}
    )

    def dropped():
        state = build_model(settings, VOCAB).state_dict()
        return [name for name, value in source.state_dict().items() if differ(state[name], value)]

    assert dropped() == []
    monkeypatch.setattr(
        mod.Qwen2MoDForCausalLM, "load_state_dict", lambda *args, **kwargs: (["model.routers.1.x"], [])
    )
    assert len(dropped()) > 10


@pytest.mark.parametrize("architecture", ROUTED)
def test_2_selection_in_score_order(architecture, monkeypatch):
    assert not block_sees_another_order(calibrated(architecture))
    sorted_top_k = routing.select_top_k

    def by_score(scores, capacity, valid):
        selection = sorted_top_k(scores, capacity, valid)
        order = scores.gather(1, selection.indices).argsort(dim=1, descending=True)
        return Selection(selection.indices.gather(1, order), selection.valid, selection.mask)

    patch(monkeypatch, "select_top_k", by_score)
    assert block_sees_another_order(calibrated(architecture))


@pytest.mark.parametrize("architecture", ROUTED)
def test_3_rows_packed_into_one_sequence(architecture, monkeypatch):
    model = calibrated(architecture)
    assert not rows_leak(model)

    def packed(block, hidden_states, selection, gate, context):
        batch, length, size = hidden_states.shape
        flat = hidden_states.reshape(1, batch * length, size)
        mask = selection.mask.reshape(1, -1)
        places = mask[0].nonzero().flatten()
        positions = (places % length).unsqueeze(0)
        output = block(
            flat[:, places],
            position_ids=positions,
            position_embeddings=model.model.rotary_emb(flat, positions),
        )
        result = flat.clone()
        result[:, places] += gate.reshape(1, -1, 1)[:, places] * (output - flat[:, places])
        return result.view_as(hidden_states)

    patch(monkeypatch, "routed_update", packed)
    assert rows_leak(model)


@pytest.mark.parametrize(
    ("architecture", "option", "part"),
    [("stt", "student_weight", "student"), ("sdt", "prior_loss_weight", None), ("mod", "aux_weight", None)],
)
def test_4_auxiliary_loss_without_weight(architecture, option, part):
    options = {"aux_weight": 0.01} if architecture == "mod" else {}
    assert parameters_without_gradient(tiny_model(architecture, **options)) == []
    if part:
        idle = parameters_without_gradient(tiny_model(architecture, **{option: 0.0}))
        assert idle and all(part in name for name in idle)
    else:
        # The language-model gradient reaches these parts too; what is lost is the loss itself.
        ids = tokens(2, LENGTH)
        outputs = [tiny_model(architecture, **{option: w})(input_ids=ids, labels=ids) for w in (0.0, 0.05)]
        assert outputs[0].loss == outputs[0].language_model_loss != outputs[1].loss


@pytest.mark.parametrize("architecture", ["sdt", "stt"])
def test_5_evaluation_at_the_first_beta(architecture, monkeypatch, tmp_path):
    def beta_after_reload():
        model = tiny_model(architecture)
        model.set_progress(999, 1000)
        model.save_pretrained(tmp_path)
        return type(model).from_pretrained(tmp_path).model.routers["1"].surprise.beta

    assert beta_after_reload() == 100
    monkeypatch.setattr(SurpriseGate, "set_progress", lambda *args: None)
    assert beta_after_reload() != 100


@pytest.mark.parametrize("architecture", ROUTED)
def test_6_hard_gate_in_evaluation(architecture, monkeypatch, given_selection):
    model = calibrated(architecture)
    assert not modes_differ(model, given_selection)

    def hard(block, hidden_states, selection, gate, context):
        gate = gate if model.training else torch.ones_like(gate)
        return routed_update(block, hidden_states, selection, gate, context)

    patch(monkeypatch, "routed_update", hard)
    assert modes_differ(model, given_selection)


@pytest.mark.parametrize("architecture", ROUTED)
def test_7_likelihoods_with_top_k(architecture):
    assert not future_leaks(calibrated(architecture, capacity=0.25))
    assert future_leaks(calibrated(architecture, capacity=0.25, selection_rule="topk"))


@pytest.mark.parametrize("architecture", ROUTED)
def test_8_padding_competes(architecture, monkeypatch):
    model = calibrated(architecture).train()
    assert not padding_leaks(model)
    honest = routing.select_top_k
    patch(monkeypatch, "select_top_k", lambda scores, capacity, valid: honest(scores, capacity, None))
    assert padding_leaks(model)


@pytest.mark.parametrize("architecture", ROUTED)
def test_9_top_k_of_one_token_at_a_time(architecture):
    assert not cache_differs(calibrated(architecture))
    assert cache_differs(calibrated(architecture, selection_rule="topk"))


@pytest.mark.parametrize("architecture", ROUTED)
def test_10_everything_computed_and_thrown_away(architecture, monkeypatch):
    model = calibrated(architecture)
    assert not block_sees_more_than_the_selected(model)

    def dense(block, hidden_states, selection, gate, context):
        output = block(
            hidden_states,
            position_ids=context.position_ids,
            position_embeddings=context.position_embeddings,
        )
        mask = selection.mask.unsqueeze(-1)
        return torch.where(mask, hidden_states + gate.unsqueeze(-1) * (output - hidden_states), hidden_states)

    patch(monkeypatch, "routed_update", dense)
    assert block_sees_more_than_the_selected(model)


@pytest.mark.parametrize("architecture", ROUTED)
def test_11_softmax_over_the_selected_scores(architecture, monkeypatch):
    model = calibrated(architecture)
    assert not future_leaks(model)

    def softmax(block, hidden_states, selection, gate, context):
        mask = selection.mask
        gate = gate.masked_fill(~mask, -torch.inf).softmax(1)
        return routed_update(block, hidden_states, selection, gate, context)

    patch(monkeypatch, "routed_update", softmax)
    assert future_leaks(model)


@pytest.mark.parametrize("architecture", ROUTED)
def test_12_nan_in_generation(architecture, monkeypatch):
    model = calibrated(architecture, attention="eager")
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def finite():
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return all(step.isfinite().all() for step in output.logits)

    assert finite()
    honest = routing.causal_mask

    def empty_rows(query_slots, query_segments, key_slots, key_segments, eager, dtype):
        allowed = honest(query_slots, query_segments, key_slots, key_segments, False, dtype)
        allowed = allowed & (query_segments != routing.NO_SEGMENT)[:, None, :, None]
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -torch.inf)

    monkeypatch.setattr("dynamic_transformers.models.modeling.causal_mask", empty_rows)
    assert not finite()
