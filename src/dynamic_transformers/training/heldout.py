"""Held-out loss in eval mode: the causal rule decides, nothing looks at the future."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from dynamic_transformers.data.loading import batches_of


@dataclass
class HeldoutResult:
    """Result over a split.

    Attributes:
        loss: nats per target token.
        bits_per_byte: of the predicted text.
        routed_fraction: layer → fraction of tokens that the layer computed.
        gate_mean, gate_std: layer → mean and standard deviation of g over all tokens.
    """

    loss: float
    bits_per_byte: float
    routed_fraction: dict[int, float]
    gate_mean: dict[int, float]
    gate_std: dict[int, float]


@torch.compiler.set_stance("force_eager")  # a model that is compiled is so for training
@torch.no_grad()
def evaluate_heldout(model: PreTrainedModel, split: datasets.Dataset, batch_size: int) -> HeldoutResult:
    """Evaluate `model` on every block of a split; its training mode and the random state stay as they were.

    Random routing, the control, draws the same noise each time.
    """
    with fixed_randomness(model.device):
        was_training = model.training
        result = measure(model.eval(), split, batch_size)
        model.train(was_training)
    return result


@contextlib.contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers in the body each time, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def measure(model: PreTrainedModel, split: datasets.Dataset, batch_size: int) -> HeldoutResult:
    """The result of a model in eval mode."""
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    targets = blocks = 0
    sums: dict[int, torch.Tensor] = {}
    for batch in batches_of(split, batch_size):
        batch = {name: value.to(device) for name, value in batch.items()}
        outputs = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        labels = batch["labels"][:, 1:]
        logits = outputs.logits[:, :-1].float()
        loss += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        targets += int((labels != -100).sum())
        blocks += len(labels)
        for layer, result in (getattr(outputs, "routing", None) or {}).items():
            gate = result.gate.double()
            moments = torch.stack([result.selected.double().mean(), gate.mean(), gate.square().mean()])
            sums[layer] = sums.get(layer, 0) + len(labels) * moments
    moments = {layer: (total / blocks).tolist() for layer, total in sums.items()}
    return HeldoutResult(
        loss=loss.item() / targets,
        bits_per_byte=loss.item() / math.log(2) / sum(split["num_bytes"]),
        routed_fraction={layer: fraction for layer, (fraction, _, _) in moments.items()},
        gate_mean={layer: mean for layer, (_, mean, _) in moments.items()},
        gate_std={layer: max(0.0, square - mean**2) ** 0.5 for layer, (_, mean, square) in moments.items()},
    )
