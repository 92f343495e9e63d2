"""What every model owes: nothing of the future, of other rows, of padding, of other documents."""

import pytest
import torch

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.training.calibration import calibrate
from tests.models.tiny import (
    ALL,
    CASES,
    ROUTED,
    ROUTED_STAGES,
    STAGES,
    SURPRISE,
    VOCAB,
    calibrated,
    calibrated_case,
    logits,
    short_window,
    tiny_model,
    tokens,
)

LENGTH = 24
LEARNED = [
    case
    for case, (architecture, options) in CASES.items()
    if architecture in ROUTED and options.get("selection_rule") != "even"
]


def future_leaks(model, length=LENGTH) -> bool:
    """Whether some logit depends on a later token; every position is perturbed."""
    ids = tokens(2, length)
    reference = logits(model, ids)
    for position in range(1, length):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        if not torch.allclose(logits(model, changed)[:, :position], reference[:, :position], atol=1e-5):
            return True
    return False


@pytest.mark.parametrize("case", CASES)
def test_no_logit_depends_on_a_later_token(case):
    assert not future_leaks(calibrated_case(case))


@pytest.mark.parametrize("case", LEARNED)
def test_evaluation_routes_by_its_rule_and_no_score_lies_on_the_cut(case):
    """On the cut a token may fall on either side when a sum is computed in another order."""
    model = calibrated_case(case)
    rule, predicted = model.config.selection_rule, {}
    for layer, router in model.model.routers.items():
        if router.predictor is not None:
            router.predictor.register_forward_hook(
                lambda _, inputs, output, layer=int(layer): predicted.update({layer: output})
            )
    routing = model(input_ids=tokens(3, LENGTH), use_cache=False).routing
    for place, (layer, result) in enumerate(routing.items()):
        score = predicted.get(layer, result.score)  # STT's student, whose score it is, is its predictor
        if rule == "threshold":
            score = score - model.routing_state.thresholds[0, place]
        elif rule == "calibrated_predictor":
            score = score - model.routing_state.thresholds[1, place]
        assert torch.equal(score > 0, result.selected)
        assert 0 < result.selected.float().mean() < 1
        assert score.abs().min() > 1e-5


@pytest.mark.parametrize("architecture", ROUTED)
def test_random_routing_is_noise_that_holds_its_fraction(architecture):
    model = calibrated(architecture, steps=1, selection_rule="random")
    assert not future_leaks(model)

    def selected(seed):
        torch.manual_seed(0)
        return model(input_ids=tokens(64, 64, seed=seed), use_cache=False).routing[1].selected

    assert torch.equal(selected(1), selected(2)) and not torch.equal(*selected(1)[:2])
    assert selected(1).float().mean().item() == pytest.approx(0.5, abs=0.03)
    model.train()
    assert torch.equal(selected(1), selected(2)) and (selected(1).sum(1) == 32).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("stage", STAGES)
def test_rows_do_not_depend_on_their_mates(stage, mode):
    model = calibrated_case(stage).train(mode == "train")
    ids = tokens(3, LENGTH)
    together = logits(model, ids)
    for row in range(3):
        torch.testing.assert_close(logits(model, ids[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", STAGES)
def test_padding_changes_nothing(stage, attention, side, mode):
    model = calibrated_case(stage, attention=attention).train(mode == "train")
    lengths = (LENGTH, LENGTH - 5, 7)
    rows = [tokens(1, length, seed=length) for length in lengths]
    ids = torch.full((3, LENGTH), 5)
    mask = torch.zeros(3, LENGTH, dtype=torch.long)
    places = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in lengths]
    for row, (place, values) in enumerate(zip(places, rows, strict=True)):
        ids[row, place], mask[row, place] = values[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert batch.isfinite().all()
    for row, place in enumerate(places):
        torch.testing.assert_close(batch[row, place], logits(model, rows[row])[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", STAGES)
def test_packed_documents_do_not_see_one_another(stage, attention):
    # In eval mode, where the number of selected tokens does not depend on what else is in the row.
    model = calibrated_case(stage, attention=attention, **short_window(stage, 6))
    documents = [tokens(1, length, seed=length) for length in (9, 5, 10)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents]).unsqueeze(0)
    together = logits(model, packed, position_ids=positions)
    separate = torch.cat([logits(model, document) for document in documents], dim=1)
    torch.testing.assert_close(together, separate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("stage", ROUTED_STAGES)  # given a mask, transformers' own ignores positions
def test_padding_between_packed_documents_keeps_them_apart(stage, attention):
    """In training, at capacity 1, where documents do not compete; evaluation refuses such a row."""
    model = calibrated_case(stage, attention=attention, capacity=1.0).train()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[:, 5] = 0
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 5]).expand(2, -1)
    together = logits(model, ids, attention_mask=mask, position_ids=positions)
    for part in (slice(0, 5), slice(6, None)):
        torch.testing.assert_close(together[:, part], logits(model, ids[:, part]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_packed_rows_may_be_cut_at_different_places(stage):
    model = calibrated_case(stage, **short_window(stage, 6))
    cuts, ids = (9, 14), tokens(2, LENGTH)
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]) for cut in cuts])
    together = logits(model, ids, position_ids=positions)
    for row, cut in enumerate(cuts):
        separate = [logits(model, ids[row : row + 1, part]) for part in (slice(0, cut), slice(cut, None))]
        torch.testing.assert_close(together[row : row + 1], torch.cat(separate, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", SURPRISE)
def test_surprise_in_training_is_each_documents_own(architecture):
    # Top-k is over the row, so outputs differ; what a token is surprised by may not.
    model = tiny_model(architecture, surprise_window=6, at_end=True)
    cuts, ids, layer = (9, 14), tokens(2, LENGTH), model.config.routed_layers[0]
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]) for cut in cuts])

    def gate(ids, **inputs):
        result = model(input_ids=ids, use_cache=False, **inputs).routing[layer]
        return result.surprise_gate if ARCHITECTURES[architecture].predicts else result.gate

    together = gate(ids, position_ids=positions)
    for row, cut in enumerate(cuts):
        separate = [gate(ids[row : row + 1, part]) for part in (slice(0, cut), slice(cut, None))]
        torch.testing.assert_close(together[row : row + 1], torch.cat(separate, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ALL)
def test_gradients_are_the_same_with_gradient_checkpointing(architecture):
    ids = tokens(2, LENGTH)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(architecture)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_eager_and_sdpa_agree(stage):
    ids = tokens(2, LENGTH)
    results = [logits(calibrated_case(stage, attention=attention), ids) for attention in ("sdpa", "eager")]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ALL)
def test_state_that_changes_the_forward_is_in_the_checkpoint(architecture, tmp_path):
    model = calibrated(architecture)
    if architecture in ROUTED:
        model.set_progress(9, 10)
    ids = tokens(2, LENGTH)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(reloaded, ids), logits(model, ids), atol=0, rtol=0)
    untrained = logits(tiny_model(architecture).eval(), ids)  # which is the same model, but for the state
    assert torch.allclose(untrained, logits(model, ids), atol=1e-3) == (architecture not in ROUTED)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [0.125, 0.5, 0.3])
@pytest.mark.parametrize("architecture", ROUTED)
def test_measured_fraction_is_the_configured_one(architecture, capacity):
    """Exactly in training and for the tokens of a calibration; within 2 points for other text.

    Many short rows of many kinds of token: tokens of one row, and of one kind, are selected alike.
    """
    length, vocabulary = 16, 16384  # words: equal ones have nearly equal scores
    model = tiny_model(architecture, capacity=capacity, vocab_size=vocabulary)
    k = int(capacity * length)
    for step in range(20):
        with torch.enable_grad():
            routing = model.model(tokens(128, length, seed=step, vocabulary=vocabulary)).routing
        model.advance()
    for result in routing.values():
        assert (result.selected.sum(1) == k).all()
        assert result.computed == k / length
    fresh, other = (tokens(1000, length, seed=seed, vocabulary=vocabulary) for seed in (98, 99))

    def fractions(ids):
        routing = model.eval().model(ids, use_cache=False).routing  # without the head over so many words
        return [result.selected.float().mean().item() for result in routing.values()]

    # k is rounded down in training, hence so is the target of STT's student. What later layers see depends
    # on who selected before, and thresholds of training have seen top-k do it: the first layer only.
    target = k / length if architecture == "stt" else capacity
    assert fractions(other)[0] == pytest.approx(target, abs=0.02)
    # Calibrated by what eval mode sees, every layer holds its fraction.
    calibrate(model, [{"input_ids": fresh, "position_ids": torch.arange(length).expand(len(fresh), -1)}])
    assert fractions(fresh) == pytest.approx([capacity] * 2, abs=1e-3)
    assert fractions(other) == pytest.approx([capacity] * 2, abs=0.02)
