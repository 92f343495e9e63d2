"""Held-out loss and bits per byte, token by token."""

import math

import pytest
import torch

from dynamic_transformers.data.loading import load_split
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.heldout import evaluate_heldout


@pytest.mark.parametrize("architecture", ["standard", "mod"])
@torch.no_grad()
def test_loss_is_the_mean_over_targets_and_bits_count_predicted_bytes(architecture, make_settings, data_dir):
    split = load_split(data_dir, "validation")
    model = build_model(make_settings(architecture), 300)
    result = evaluate_heldout(model, split, batch_size=3)
    assert model.training
    model.eval()
    nats = targets = 0
    for block in split:
        ids, positions = (torch.tensor(block[name]).long()[None] for name in ("input_ids", "position_ids"))
        probabilities = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
        )
        for place in range(1, ids.shape[1]):
            if positions[0, place] != 0:  # the first token of a document has nothing to be predicted from
                nats -= probabilities[place - 1, ids[0, place]].item()
                targets += 1
    assert result.loss == pytest.approx(nats / targets, rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / sum(split["num_bytes"]), rel=1e-4)
