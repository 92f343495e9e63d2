"""bf16, torch.compile, and what a checkpoint in another type keeps."""

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from dynamic_transformers.models.architectures import ARCHITECTURES
from tests.conformance.test_cache import cached_logits
from tests.models.tiny import ALL, PREDICTOR, ROUTED, SURPRISE, calibrated, logits, tiny_model, tokens

LENGTH = 24


@pytest.mark.parametrize("architecture", ALL)
def test_bf16_trains_with_a_gradient_for_every_parameter(architecture):
    model = tiny_model(architecture).to(torch.bfloat16)
    ids = tokens(2, LENGTH)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    assert output.loss.isfinite() and output.logits.dtype == torch.bfloat16
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def exact_scores(router, hidden_states, previous_layer, predicted, beta):
    """The scores of a routed layer in fp64, from what its router was given, without padding or a past."""
    x, before = hidden_states.double(), previous_layer.double()
    if router.config.model_type == "qwen2_mod":
        return (x * router.router.weight.double()).sum(-1)
    if router.config.model_type == "qwen2_stt":
        halves = (x, F.pad(x[:, :-1], (0, 0, 1, 0)))
        normed = [F.rms_norm(half, x.shape[-1:], eps=router.config.rms_norm_eps) for half in halves]
        return (torch.cat(normed, -1) * router.student.weight.double()).sum(-1)
    gate = router.surprise
    static = (x - before).square().mean(-1)
    expected = static - (x - before - predicted.double()).square().mean(-1)
    expected = expected + F.softplus(gate.raw_offset_ce.double()).log()
    average = static.cumsum(1) / torch.arange(1, x.shape[1] + 1)
    unexpected = static - F.softplus(gate.raw_multiplier_cu.double()) * average
    terms = torch.stack([expected, unexpected, expected + unexpected])
    return ((beta * terms).logsumexp(0) - math.log(3)) / beta


def bf16_suffices(values):
    """Whether fp32 `values` are bf16 ones cast up."""
    assert values.dtype == torch.float32
    return (values == values.bfloat16().float()).float().mean() > 0.2


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_scores_and_logits_that_select_are_fp32(architecture, how, mode):
    student = ARCHITECTURES[architecture].predicts
    options = {} if student else {"selection_rule": "predictor", **PREDICTOR[architecture]}
    model = calibrated(architecture, at_end=architecture in SURPRISE, **options)
    model = model.to(torch.bfloat16 if how == "bf16 model" else torch.float32).train(mode == "train")
    router = model.model.routers["1"]
    assert (router.predictor is None) == student
    seen = {}
    router.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[1:3]))
    if architecture in SURPRISE:
        router.prior.register_forward_hook(lambda _, inputs, output: seen.update(prior=output))
    if not student:
        router.predictor.register_forward_hook(
            lambda _, inputs, output: seen.update(predictor=(*inputs, output))
        )
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext():
        score = model(input_ids=tokens(2, LENGTH), use_cache=False).routing[1].score
    assert not bf16_suffices(score)
    exact = exact_scores(router, *seen["inputs"], seen.get("prior"), model.routing_state.beta.double())
    torch.testing.assert_close(score.double(), exact, atol=1e-6, rtol=1e-5)
    if not student:
        inputs, logit = seen["predictor"]
        up, down = (value.double() for value in router.predictor.parameters())
        exact = (F.silu(inputs.double() @ up.T) * down).sum(-1)
        torch.testing.assert_close(logit.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
def test_the_teachers_scores_are_fp32(how):
    model = calibrated("stt", at_end=True).to(torch.bfloat16 if how == "bf16 model" else torch.float32)
    seen = {}
    model.model.routers["1"].surprise.register_forward_hook(
        lambda _, inputs, output: seen.update(update=inputs[0], score=output[0])
    )
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext():
        model.train()(input_ids=tokens(2, LENGTH), use_cache=False)
    for value in seen.values():
        assert value.dtype == torch.float32
        assert (value != value.bfloat16()).float().mean() > 0.2


@pytest.mark.parametrize("architecture", ALL)
def test_bf16_cached_equals_uncached_for_the_same_selection(architecture, given_selection):
    model = calibrated(architecture).to(torch.bfloat16)
    ids = tokens(2, LENGTH)
    if architecture in ROUTED:
        routing = model(input_ids=ids, use_cache=False).routing
        given_selection(model, {layer: result.selected for layer, result in routing.items()})
    expected = logits(model, ids).float()
    for cuts in ([7], range(1, LENGTH)):
        got = cached_logits(model, ids, cuts)[0].float()
        # bf16 keeps 8 bits: a few roundings of values around 1.
        torch.testing.assert_close(got, expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_bf16_model_selects_as_exact_scores_do(architecture):
    model = calibrated(architecture, capacity=0.125).to(torch.bfloat16)  # τ lies where bf16 is coarse
    router, threshold = model.model.routers["1"], model.routing_state.thresholds[0, 0].double()
    seen = {}
    router.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs[1:3]))
    if architecture == "sdt":
        router.prior.register_forward_hook(lambda _, inputs, output: seen.update(prior=output))
    selected = model(input_ids=tokens(128, 64), use_cache=False).routing[1].selected
    exact = exact_scores(router, *seen["inputs"], seen.get("prior"), model.routing_state.beta.double())
    near = (exact - threshold).abs() < 1e-5
    assert torch.equal(selected | near, (exact > threshold) | near) and near.double().mean() < 0.01
    rounded = exact.bfloat16() > threshold
    assert ((rounded != (exact > threshold)) & ~near).any()  # scores in bf16 would be noticed


@pytest.mark.parametrize("architecture", ROUTED)
def test_what_scores_are_compared_with_stays_fp32_in_a_bf16_model(architecture, tmp_path):
    model = calibrated(architecture)
    model.set_progress(7, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for half in (loaded, cast):
        assert half.lm_head.weight.dtype == torch.bfloat16
        for name, value in model.named_buffers():
            if ".routing_state." in name:
                assert torch.equal(half.get_buffer(name), value), name
        for name, value in model.named_parameters():
            if ".surprise." in name:
                assert torch.equal(half.get_parameter(name), value), name
    meta = copy.deepcopy(model).to("meta")
    assert all(value.device.type == "meta" for value in meta.buffers())


# Graphs of training: tests/models/test_compile.py. The default compiler takes minutes for all models.
@pytest.mark.parametrize(
    ("architecture", "mode", "backend"),
    [("mod", "train", "inductor"), *((architecture, "eval", "aot_eager") for architecture in ALL)],
)
def test_compiled_gives_the_same_numbers(architecture, mode, backend):
    model = calibrated(architecture).train(mode == "train")
    ids = tokens(2, LENGTH)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(input_ids=ids, labels=ids, use_cache=False)
    model.load_state_dict(state)
    torch._dynamo.reset()
    got = torch.compile(model, backend=backend)(input_ids=ids, labels=ids, use_cache=False)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-4)
