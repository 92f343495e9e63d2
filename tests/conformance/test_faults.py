"""Each fault of public implementations (architectures.md, section 8), put in here and caught by a check.

A check says whether the contract is broken; it must say no without the fault and yes with it.
"""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from dynamic_transformers.models import mod, routing, sdt, stt
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.routing import Router, routed_update
from dynamic_transformers.models.state import RoutingState
from dynamic_transformers.settings import ModelSettings, UserError
from dynamic_transformers.training import build
from tests.conformance.test_cache import cached_logits
from tests.conformance.test_causality import future_leaks
from tests.models.tiny import (
    BACKBONE,
    ROUTED,
    ROUTED_STAGES,
    SURPRISE,
    VOCAB,
    calibrated,
    calibrated_case,
    logits,
    loss_weights,
    tiny_model,
    tokens,
)

LENGTH = 24


def differ(a, b):
    return not torch.allclose(a, b, atol=2e-5, rtol=1e-4)


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
    """Whether Q, K, V or MLP of a routed layer ran over other than the selected tokens."""
    layer = model.config.routed_layers[0]
    block, seen = model.model.layers[layer], []
    attention = block.self_attn
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, block.mlp.gate_proj)
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for module in modules
    ]
    selected = model(input_ids=tokens(2, LENGTH), use_cache=False).routing[layer].selected
    for handle in handles:
        handle.remove()
    widest = int(selected.sum(1).max())
    assert widest < LENGTH
    passes = [widest]
    if model.training and model.config.model_type == "qwen2_stt":
        passes.append(LENGTH)  # the teacher's
    return sorted(seen) != sorted(passes * len(modules))


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
    gate = result.gate[:, places].unsqueeze(-1)
    return differ(y[:, places], x[:, places] + gate * (alone - x[:, places]))


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


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block


def wrap(model, layer):
    model.layers[layer] = Wrapped(model.layers[layer])


def move(model, layer):
    """What is missing then lies where new tensors are expected."""
    model.routers[str(layer)].block = model.layers[layer]
    model.layers[layer] = nn.Identity()


def add(model, layer):
    model.layers[layer].norm = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("change", "named"),
    [(wrap, r"layers\.1\.mlp"), (move, r"layers\.1\.mlp"), (add, r"layers\.1\.norm")],
    ids=["wrapped", "moved", "added"],
)
@pytest.mark.parametrize("architecture", ROUTED)
def test_1_pretrained_weights_dropped(architecture, change, named, make_settings, tmp_path, monkeypatch):
    torch.manual_seed(1)
    source = Qwen2ForCausalLM(Qwen2Config(**BACKBONE))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()  # no two tensors alike, and none as in a new model
    source.save_pretrained(tmp_path)
    model, data = {"pretrained": str(tmp_path)}, {"tokenizer_name": "x"}
    settings = make_settings(architecture, model=model, data=data, training={"mode": "pretrained"})

    def dropped():
        state = build.build_model(settings, VOCAB).state_dict()
        return [
            name
            for name, value in source.state_dict().items()
            if name not in state or not torch.equal(state[name], value)
        ]

    assert dropped() == []

    class Changed(ARCHITECTURES[architecture].model_class):
        """Its routed layers have other names than the pretrained ones."""

        def __init__(self, config):
            super().__init__(config)
            for layer in config.routed_layers:
                change(self.model, layer)

    monkeypatch.setattr(ARCHITECTURES[architecture], "model_class", Changed)
    with pytest.raises(UserError, match=named):
        dropped()

    def unreported(model, state, strict):
        nn.Module.load_state_dict(model, state, strict=False)
        return [], []

    monkeypatch.setattr(Changed, "load_state_dict", unreported)
    assert len(dropped()) == (0 if change is add else 2 * 12)  # two routed layers of twelve tensors


@pytest.mark.parametrize("architecture", ROUTED)
def test_2_selection_in_score_order(architecture, monkeypatch):
    assert not block_sees_another_order(calibrated(architecture))
    sorted_top_k = routing.select_top_k

    def by_score(scores, capacity, valid):
        selection = sorted_top_k(scores, capacity, valid)
        order = scores.gather(1, selection.indices).argsort(dim=1, descending=True)
        return dataclasses.replace(selection, indices=selection.indices.gather(1, order))

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


# The settings of the model, by groups; None: those that are in no group.
GROUPS = {None: ModelSettings} | {
    field.name: field.default_factory
    for field in dataclasses.fields(ModelSettings)
    if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory)
}
# Every weight of an auxiliary loss: its place in the settings, and the name of its loss.
WEIGHTS = [
    (architecture, group, option, option.removesuffix("_weight").removesuffix("_loss"))
    for architecture in ROUTED
    for option in loss_weights(architecture)
    for group, settings in GROUPS.items()
    if option in (field.name for field in dataclasses.fields(settings))
]


def undeclared(settings):
    """Options that the architecture's configuration takes without a word and never reads."""
    config_class = settings.model.architecture.config_class
    declared = set().union(*(vars(part).get("__annotations__", {}) for part in config_class.__mro__))
    return settings.model.architecture.options(settings.model).keys() - declared


@pytest.mark.parametrize(("architecture", "group", "option", "loss"), WEIGHTS)
def test_4_auxiliary_loss_names_that_match_no_config_key(
    architecture, group, option, loss, make_settings, monkeypatch
):
    def with_weight(weight):
        values = {option: weight} if group is None else {group: {option: weight}}
        values.setdefault("stt", {})["targets"] = "threshold"
        return make_settings(architecture, model=values)

    def ignored():
        """Whether the weight in the settings is not the one in the loss."""
        ids = tokens(2, LENGTH)
        small, large = (
            build.build_model(with_weight(weight), VOCAB)(input_ids=ids, labels=ids) for weight in (0.5, 2.0)
        )
        assert torch.equal(small.language_model_loss, large.language_model_loss)
        value = large.auxiliary_losses.get(loss, torch.zeros(()))
        return not value > 0.01 or differ(large.loss - small.loss, 1.5 * value)

    assert undeclared(with_weight(0.5)) == set() and not ignored()
    record = ARCHITECTURES[architecture]
    honest = record.options

    def renamed(model):
        return {{option: f"{option}_"}.get(name, name): value for name, value in honest(model).items()}

    monkeypatch.setattr(record, "options", renamed)
    assert undeclared(with_weight(0.5)) == {f"{option}_"} and ignored()


def test_4_every_weight_of_the_settings_is_tried():
    weights = {
        (group, field.name)
        for group, settings in GROUPS.items()
        for field in dataclasses.fields(settings)
        if field.name.endswith("_weight")
    }
    assert weights == {(group, option) for _, group, option, _ in WEIGHTS}
    assert len(WEIGHTS) == sum(len(loss_weights(architecture)) for architecture in ROUTED)


@pytest.mark.parametrize("architecture", SURPRISE)
def test_5_evaluation_at_the_first_beta(architecture, monkeypatch, tmp_path):
    ids = tokens(2, LENGTH)

    def gate(model):
        """g as evaluation computes it, or in training where evaluation has the student's (STT)."""
        student = ARCHITECTURES[architecture].predicts
        result = model.train(student)(input_ids=ids, use_cache=False).routing[1]
        return result.surprise_gate if student else result.gate

    def reloaded_gate():
        model = tiny_model(architecture, at_end=True)
        model.save_pretrained(tmp_path)
        return gate(type(model).from_pretrained(tmp_path))

    trained = gate(tiny_model(architecture, at_end=True))
    assert not differ(reloaded_gate(), trained)
    honest = RoutingState.__init__

    def beta_outside_the_checkpoint(state, config):
        honest(state, config)
        state.register_buffer("beta", state.beta, persistent=False)

    with monkeypatch.context() as patched:
        patched.setattr(RoutingState, "__init__", beta_outside_the_checkpoint)
        assert differ(reloaded_gate(), trained)
    monkeypatch.setattr(RoutingState, "set_progress", lambda *args: None)
    assert differ(reloaded_gate(), trained)


@pytest.mark.parametrize("stage", ROUTED_STAGES)
def test_6_hard_gate_in_evaluation(stage, monkeypatch, given_selection):
    model = calibrated_case(stage)
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
def test_9_top_k_of_one_token_at_a_time(architecture, monkeypatch):
    model = calibrated(architecture)
    assert not cache_differs(model)

    def top_k_of_this_forward(router, scores, hidden_states, context, state):
        return routing.select_mask(routing.select_top_k(scores, router.config.capacity, context.valid).mask)

    monkeypatch.setattr(Router, "select", top_k_of_this_forward)
    assert cache_differs(model)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_10_everything_computed_and_thrown_away(architecture, mode, monkeypatch):
    model = calibrated(architecture, capacity=0.25).train(mode == "train")
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
