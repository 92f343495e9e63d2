"""Padding of a training batch: it counts in no loss and moves no threshold."""

import pytest
import torch

from tests.models.tiny import DENSE, ROUTED, loss_weights, tiny_model, tokens

LENGTH = 24
# Weights of 1, so that a loss which is wrong shows in the sum.
WEIGHTS = {name: dict.fromkeys(loss_weights(name), 1.0) for name in ROUTED}
MODELS = {name: (name, weights) for name, weights in WEIGHTS.items()} | {
    "stt": ("stt", {**WEIGHTS["stt"], "gate_mean_weight": 0.0}),  # only with threshold targets
    "stt threshold targets": ("stt", {**WEIGHTS["stt"], "targets": "threshold"}),
}


def padded(side):
    """Rows of several lengths, the batch of them with other tokens as padding, its mask and its labels."""
    rows = [tokens(1, length, seed=length) for length in (LENGTH, 13, 6)]
    ids, mask = tokens(4, LENGTH, seed=1), torch.zeros(4, LENGTH, dtype=torch.long)  # the last is all padding
    for row, values in enumerate(rows):
        n = values.shape[1]
        place = slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = values[0], 1
    return rows, ids, mask, ids.masked_fill(mask == 0, -100)


def watch_predictors(model):
    """Lists, one for each routed layer that has a predictor, of the logits that it gives from now on."""
    seen = {}
    for layer, router in model.model.routers.items():
        if router.predictor is not None:
            logits = seen[int(layer)] = []
            router.predictor.register_forward_hook(lambda _, inputs, output, to=logits: to.append(output[0]))
    return seen


@pytest.mark.parametrize("at_end", [False, True], ids=["first step", "last step"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_auxiliary_losses_and_thresholds_are_those_of_the_valid_tokens(name, side, at_end):
    architecture, options = MODELS[name]
    rows, ids, mask, labels = padded(side)
    model, single = (tiny_model(architecture, at_end=at_end, **options) for _ in range(2))
    predicted = watch_predictors(single)
    alone = [single(input_ids=row, labels=row) for row in rows]
    counts = torch.tensor([row.shape[1] for row in rows])
    batch = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert len(batch.auxiliary_losses) == sum(value == 1.0 for value in options.values()) > 0
    for loss, value in batch.auxiliary_losses.items():
        targets = (labels[:3, 1:] != -100).sum(1)  # a left-padded row has one more: its first token
        expected = (torch.stack([output.auxiliary_losses[loss] for output in alone]) * targets).sum()
        torch.testing.assert_close(value, expected / targets.sum(), atol=1e-5, rtol=1e-4)
    model.advance()  # by one step, whose quantiles are hence not averaged with others
    for place, layer in enumerate(model.config.routed_layers):
        router, results = model.model.routers[str(layer)], [output.routing[layer] for output in alone]
        assert not batch.routing[layer].selected[mask == 0].any()
        fraction = model.config.capacity
        if architecture == "stt":  # the share of tokens that the teacher selects
            fraction = (sum(result.selected.sum() for result in results) / counts.sum()).item()
        seen = [torch.cat([result.score[0] for result in results])]
        if router.predictor is not None:
            seen.append(torch.cat(predicted[layer]))
        for scores, threshold in zip(seen, model.routing_state.thresholds[:, place], strict=False):
            torch.testing.assert_close(threshold, scores.quantile(1 - fraction), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*DENSE, *MODELS])
def test_losses_of_micro_batches_sum_to_the_loss_of_the_batch(name, side):
    architecture, options = MODELS.get(name, (name, {}))
    _, ids, mask, labels = padded(side)
    model = tiny_model(architecture, **options)
    whole = model(input_ids=ids, attention_mask=mask, labels=labels)
    if architecture in ROUTED:
        assert whole.loss - whole.language_model_loss > 0.1
    count = {"num_items_in_batch": (labels[:, 1:] != -100).sum()}
    first = model(input_ids=ids[:1], labels=labels[:1], **count).loss  # no padding, and no mask
    rest = model(input_ids=ids[1:], attention_mask=mask[1:], labels=labels[1:], **count).loss
    torch.testing.assert_close(first + rest, whole.loss, atol=1e-5, rtol=1e-4)
