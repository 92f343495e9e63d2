"""The surprise gate against its formula."""

import math

import pytest
import torch

from dynamic_transformers.models.configuration import Qwen2SDTConfig
from dynamic_transformers.models.routing import RoutingContext
from dynamic_transformers.models.state import beta_at
from dynamic_transformers.models.surprise import (
    SurpriseGate,
    inverse_softplus,
    moving_average,
    prior_width,
)
from tests.models.tiny import BACKBONE, tiny_model, tokens

FIRST_BETA = torch.tensor([0.1])


def gate_of(**options) -> SurpriseGate:
    return SurpriseGate(Qwen2SDTConfig(**BACKBONE | options))


def plain_rows() -> RoutingContext:
    """One document a row, no padding, no past."""
    return RoutingContext(None, None, None, None, 0, None, False, None)


def naive_average(values, window, starts):
    rows, length = values.shape
    out = torch.empty_like(values)
    for b in range(rows):
        for t in range(length):
            first = max(t - window + 1, int(starts[b, t]))
            out[b, t] = values[b, first : t + 1].mean()
    return out


def test_moving_average_of_window_and_document():
    values = torch.rand(2, 30)
    starts = torch.zeros(2, 30, dtype=torch.long)
    starts[1, 11:] = 11
    torch.testing.assert_close(moving_average(values, 7, starts), naive_average(values, 7, starts))


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_gate_and_score_are_the_papers_formula(beta):
    gate = gate_of(surprise_window=5)
    update, predicted, state = (torch.randn(2, 20, 32) for _ in range(3))
    static = update.square().sum(-1) / 32
    change = (update - predicted).square().sum(-1) / 32
    ce = static - (change - math.log(1.025))
    cu = static - 1.1 * naive_average(static, 5, torch.zeros(2, 20))
    s_ce, s_cu = torch.sigmoid(beta * ce), torch.sigmoid(beta * cu)
    expected = s_ce + s_cu - s_ce * s_cu
    score, g = gate(update, predicted, state, torch.tensor([beta]), plain_rows(), 1)
    torch.testing.assert_close(g, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(score.argsort(dim=1)[:, :3], expected.argsort(dim=1)[:, :3])


def test_score_still_tells_tokens_apart_where_the_gate_saturates():
    gate = gate_of()
    update = torch.linspace(1, 3, 20)[None, :, None].expand(1, 20, 32)
    score, g = gate(update, torch.zeros_like(update), update, torch.tensor([100.0]), plain_rows(), 1)
    assert (g == 1).sum() > 1
    assert len(score.unique()) == 20


def test_normalised_surprise_does_not_depend_on_the_updates_scale():
    update, predicted, state = (torch.randn(1, 20, 32) for _ in range(3))
    for normalize in ("moving_average", "state"):
        gate = gate_of(surprise_normalize=normalize)
        one = gate(update, predicted, state, FIRST_BETA, plain_rows(), 1)[0]
        ten = gate(10 * update, 10 * predicted, 10 * state, FIRST_BETA, plain_rows(), 1)[0]
        torch.testing.assert_close(one, ten, atol=1e-4, rtol=1e-4)
    # Each token for itself: a large first token does not make those after it less surprising.
    gate = gate_of(surprise_normalize="state")
    sizes = torch.ones(1, 20, 1)
    sizes[0, 0] = 100
    same = torch.ones(1, 20, 32)
    score = gate(0.1 * sizes * same, 0 * same, sizes * same, FIRST_BETA, plain_rows(), 1)[0]
    torch.testing.assert_close(score, score[:, :1].expand_as(score))
    gate = gate_of()
    one, ten = (gate(s * update, s * predicted, s * state, FIRST_BETA, plain_rows(), 1)[0] for s in (1, 10))
    assert not torch.allclose(one, ten, rtol=1e-2)


def test_scalars_start_where_the_paper_says_and_stay_positive():
    gate = gate_of()
    positive = torch.nn.functional.softplus
    assert positive(gate.raw_offset_ce).item() == pytest.approx(1.025, rel=1e-5)
    assert positive(gate.raw_multiplier_cu).item() == pytest.approx(1.1, rel=1e-5)
    assert math.log1p(math.exp(inverse_softplus(3.0))) == pytest.approx(3.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beta_waits_then_reaches_its_end_at_the_last_step(schedule):
    config = Qwen2SDTConfig(**BACKBONE, beta_schedule=schedule)
    assert beta_at(config, 0, 1000) == beta_at(config, 100, 1000) == pytest.approx(0.1)
    assert beta_at(config, 999, 1000) == pytest.approx(100.0)
    assert beta_at(config, 19, 20) == pytest.approx(100.0)  # shorter than the warm-up
    middle = beta_at(config, 100 + 899 // 2, 1000)
    assert 45 < middle < 55


def test_evaluation_uses_the_trained_beta():
    model = tiny_model("sdt")
    model.set_progress(999, 1000)
    assert model.routing_state.beta == 100
    ids = tokens(1, 24)
    model.eval()
    trained = model(input_ids=ids).routing[1].gate
    model.set_progress(0, 1000)
    assert not torch.allclose(trained, model(input_ids=ids).routing[1].gate, atol=1e-3)


def test_prior_width_is_even_and_at_least_two():
    assert prior_width(Qwen2SDTConfig(**BACKBONE)) == 2
    assert prior_width(Qwen2SDTConfig(**BACKBONE | {"hidden_size": 896})) == 56
    assert prior_width(Qwen2SDTConfig(**BACKBONE | {"hidden_size": 72, "prior_factor": 0.0625})) == 6


def test_language_model_gradient_reaches_prior_and_decision_layer_through_the_gate():
    model = tiny_model("sdt", num_hidden_layers=2)
    ids = tokens(2, 24)
    model(input_ids=ids, labels=ids).language_model_loss.backward()
    assert model.model.routers["1"].prior.down_proj.weight.grad.any()
    assert model.model.layers[0].mlp.down_proj.weight.grad.any()


def test_odd_depth_leaves_the_last_layer_standard():
    assert Qwen2SDTConfig(**BACKBONE | {"num_hidden_layers": 5}).routed_layers == [1, 3]
