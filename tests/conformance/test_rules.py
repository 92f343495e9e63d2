"""Training by a threshold, as evaluation selects; and the controls, random and evenly spaced tokens."""

import pytest
import torch

from dynamic_transformers.models.rules import evenly_spaced, select_first
from dynamic_transformers.training.calibration import calibrate
from tests.conformance.test_cache import cached_logits
from tests.conformance.test_causality import future_leaks
from tests.models.tiny import ROUTED, calibrated, logits, tiny_model, tokens

LENGTH = 24
CONTROLLED = [{"selection_rule": "random"}, {"selection_rule": "even"}]
TRAINED_BY_THRESHOLD = {"training_rule": "threshold", "at_end": True}


def trained_by_threshold(architecture, **options):
    """A model in training mode past the warm-up, whose thresholds have seen some batches."""
    return calibrated(architecture, **TRAINED_BY_THRESHOLD | options).train()


def selected(model, ids, **inputs):
    """Layer → tokens that it computed, (B, T)."""
    torch.manual_seed(0)
    routing = model(input_ids=ids, use_cache=False, **inputs).routing
    return {layer: result.selected for layer, result in routing.items()}


def lower(model, by):
    """Thresholds under which nearly all tokens are selected: the bound decides."""
    model.routing_state.thresholds -= by
    return model


@pytest.mark.parametrize("architecture", ROUTED)
def test_top_k_first_and_the_threshold_after_its_warm_up(architecture):
    model = tiny_model(architecture, training_rule="threshold", training_rule_warmup=0.25)
    ids = tokens(8, LENGTH)
    for step in range(20):
        model.set_progress(step, 20)
        counts = selected(model, ids)[1].sum(1)
        model.advance()
        assert (set(counts.tolist()) == {LENGTH // 2}) == (step < 5), step
    model.set_progress(0, 1)
    assert set(selected(model, ids)[1].sum(1).tolist()) == {LENGTH // 2}, "τ is not known in the first step"


def test_top_k_stays_while_the_capacity_falls():
    model = tiny_model("mod", training_rule="threshold", capacity_warmup_steps=9)
    for step, rule in ((3, "topk"), (8, "topk"), (9, "threshold")):
        model.set_progress(step, 20)
        assert model.routing_state.training_rule == rule


@pytest.mark.parametrize("bound", [1.5, 0.5])
@pytest.mark.parametrize("architecture", ROUTED)
def test_training_by_the_threshold_is_causal(architecture, bound, monkeypatch):
    model = trained_by_threshold(architecture)
    model.config.training_rule_bound = bound
    counts = torch.stack([mask.sum(1) for mask in selected(model, tokens(8, LENGTH)).values()])
    assert (
        (counts == 6).any() if bound == 0.5 else len(counts.unique()) > 1
    )  # which of them, bound or τ, decides
    assert not future_leaks(model)
    assert future_leaks(calibrated(architecture).train()), "top-k looks at the future"
    if bound == 0.5:  # the fault: the last of too many tokens, which as any best ones later tokens push out

        def select_last(mask, capacity, valid):
            return select_first(mask & (mask.flip(1).cumsum(1).flip(1) <= capacity * LENGTH), capacity, valid)

        monkeypatch.setattr("dynamic_transformers.models.routing.select_first", select_last)
        assert future_leaks(model)


@pytest.mark.parametrize("architecture", ROUTED)
def test_training_by_the_threshold_gives_what_evaluation_gives(architecture):
    model = trained_by_threshold(architecture, training_rule_bound=2.0)  # of γ = 0.5: never binds
    ids = tokens(4, LENGTH)
    trained = logits(model, ids), selected(model, ids)
    evaluated = logits(model.eval(), ids), selected(model, ids)
    torch.testing.assert_close(trained[0], evaluated[0], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(trained[1][layer], evaluated[1][layer]) for layer in trained[1])
    by_top_k = logits(calibrated(architecture, at_end=True).train(), ids)
    assert not torch.allclose(by_top_k, evaluated[0], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ROUTED)
@pytest.mark.parametrize("lowered", [0, 100])
def test_neither_padding_nor_other_rows_count_in_training_by_the_threshold(architecture, side, lowered):
    model = lower(trained_by_threshold(architecture), lowered)
    lengths = (LENGTH, LENGTH - 5, 7)
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids, mask = torch.full((3, LENGTH), 5), torch.zeros(3, LENGTH, dtype=torch.long)
    places = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, values) in enumerate(zip(places, rows, strict=True)):
        ids[row, place], mask[row, place] = values[0], 1
    batch = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row, place in enumerate(places):
        torch.testing.assert_close(batch[row, place], logits(model, rows[row])[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ROUTED)
def test_thresholds_that_train_hold_the_capacity(architecture):
    """The quantile is that of all tokens, not of those that were selected: τ neither drifts nor runs away."""
    vocabulary = 16384
    model = tiny_model(architecture, vocab_size=vocabulary, **TRAINED_BY_THRESHOLD)
    for step in range(30):
        with torch.enable_grad():
            routing = model.model(tokens(128, 16, seed=step, vocabulary=vocabulary)).routing
        model.advance()
    for result in routing.values():
        assert result.selected.float().mean().item() == pytest.approx(0.5, abs=0.05)
        assert result.computed == 12 / 16


@pytest.mark.parametrize("options", [TRAINED_BY_THRESHOLD, *CONTROLLED], ids=str)
@pytest.mark.parametrize("architecture", ROUTED)
def test_every_parameter_gets_a_gradient(architecture, options):
    """Data-parallel training hangs else; also where no token was selected at all."""
    for lowered in (0, -1e4):
        model = tiny_model(architecture, **options)
        lower(model, lowered)
        ids = tokens(2, LENGTH)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert [name for name, value in model.named_parameters() if value.grad is None] == []
        assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("capacity", [0.125, 0.29, 0.5, 1.0])
def test_evenly_spaced_tokens_are_the_floor_of_the_capacity_in_each_beginning(capacity):
    chosen = evenly_spaced(torch.arange(1000).unsqueeze(0), capacity)[0]
    expected = [int(capacity * (n + 1) + 1e-9) for n in range(1000)]
    assert chosen.cumsum(0).tolist() == expected


@pytest.mark.parametrize("capacity", [0.25, 0.5])
@pytest.mark.parametrize("architecture", ROUTED)
def test_even_selects_the_same_tokens_in_training_evaluation_and_decoding(architecture, capacity):
    model = calibrated(architecture, selection_rule="even", capacity=capacity)
    ids = tokens(2, LENGTH)
    expected = evenly_spaced(torch.arange(LENGTH), capacity).expand(2, -1)
    assert expected.sum() == 2 * capacity * LENGTH
    for mode in (True, False):
        assert all(torch.equal(mask, expected) for mask in selected(model.train(mode), ids).values())
    evaluated = logits(model, ids)
    torch.testing.assert_close(logits(model.train(), ids), evaluated, atol=1e-5, rtol=1e-4)
    assert not future_leaks(model)
    decoded, _ = cached_logits(model.eval(), ids, range(1, LENGTH))
    torch.testing.assert_close(decoded, evaluated, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("architecture", ROUTED)
def test_even_counts_in_each_document(architecture, mode):
    model = calibrated(architecture, selection_rule="even", capacity=0.25).train(mode == "train")
    lengths = (9, 5, 10)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    ids = tokens(1, LENGTH)
    for mask in selected(model, ids, position_ids=positions).values():
        assert [int(part.sum()) for part in mask[0].split(lengths)] == [2, 1, 2]
    padded = torch.ones(1, LENGTH, dtype=torch.long)
    padded[0, :5] = 0
    for mask in selected(model, ids, attention_mask=padded).values():
        assert mask[0].nonzero().flatten().tolist() == [8, 12, 16, 20]


@pytest.mark.parametrize("architecture", ROUTED)
def test_even_goes_on_through_the_cache_of_left_padded_rows(architecture):
    model = calibrated(architecture, selection_rule="even", capacity=0.25)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    decoded, _ = cached_logits(model, ids, range(8, LENGTH), mask)
    torch.testing.assert_close(decoded[0, 5:], logits(model, ids[:1, 5:])[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(decoded[1], logits(model, ids[1:])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", CONTROLLED, ids=str)
@pytest.mark.parametrize("architecture", ROUTED)
def test_calibration_leaves_a_control_alone(architecture, options):
    model = calibrated(architecture, **options)
    before = model.routing_state.thresholds.clone()
    calibrate(model, [{"input_ids": tokens(2, LENGTH), "position_ids": torch.arange(LENGTH).expand(2, -1)}])
    assert torch.equal(model.routing_state.thresholds, before)


@pytest.mark.parametrize("rule", ["random", "even"])
def test_a_control_follows_no_other_rule_and_a_learned_model_no_control(rule):
    assert tiny_model("mod", selection_rule=rule, aux_weight=0.01).config.available_rules == [rule]
    assert rule not in tiny_model("mod", aux_weight=0.01, predictor_weight=0.01).config.available_rules


def test_the_first_tokens_of_a_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    selection = select_first(mask, 0.5, None)
    assert selection.indices.shape == (3, 3)
    assert selection.mask.int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6]
    assert selection.indices[selection.valid].tolist() == [1, 2, 4, 5]
    assert selection.valid.int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    valid = torch.tensor([[1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert select_first(mask[:1], 0.5, valid).mask.int().tolist() == [[0, 1, 1, 0, 0, 0]]
