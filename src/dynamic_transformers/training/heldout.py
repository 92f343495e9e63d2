"""Held-out loss in eval mode: the causal rule decides, nothing looks at the future."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Qwen2Config

from dynamic_transformers.data.blocks import IGNORED, Blocks
from dynamic_transformers.data.loading import batches_of, domains_of
from dynamic_transformers.training.losses import token_losses
from dynamic_transformers.training.realised import Realised, SelectionCounts, selections


@dataclass
class DomainResult:
    """Result over the tokens of one source.

    Attributes:
        loss: nats per target token.
        realised: what was computed of these tokens.
    """

    loss: float
    realised: Realised


@dataclass
class HeldoutResult(DomainResult):
    """Result over a split.

    Attributes:
        bits_per_byte: of the predicted text.
        gate_mean, gate_std: layer → mean and standard deviation of g over all tokens.
        domains: source → its part, as far as the split has targets of it.
    """

    bits_per_byte: float
    gate_mean: dict[int, float]
    gate_std: dict[int, float]
    domains: dict[str, DomainResult]

    @property
    def routed_fraction(self) -> dict[int, float]:
        """Layer → fraction of tokens that it computed."""
        return {layer: spread.mean for layer, spread in self.realised.layers.items()}


@torch.no_grad()
def evaluate_heldout(
    model: PreTrainedModel, split: Blocks, batch_size: int, sources: Sequence[str] = ()
) -> HeldoutResult:
    """Evaluate `model` on every block of a split; its training mode and the random state stay as they were.

    Random routing, the control, draws the same noise each time.

    Args:
        sources: names of the data folder's sources, in its order; none: the result is not split by domain.
    """
    with fixed_randomness(model.device):
        was_training = model.training
        result = measure(model.eval(), split, batch_size, sources)
        model.train(was_training)
    return result


@contextlib.contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """Draw the same random numbers in the body each time, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def measure(model: PreTrainedModel, split: Blocks, batch_size: int, sources: Sequence[str]) -> HeldoutResult:
    """The result of a model in eval mode."""
    assert isinstance(model.config, Qwen2Config)
    device = next(model.parameters()).device
    domains = domains_of(split) if sources else torch.zeros(len(split), 1, dtype=torch.long)
    count = max(1, len(sources))
    nats = torch.zeros(count, dtype=torch.float64, device=device)
    targets = torch.zeros_like(nats)
    counts = SelectionCounts(count)
    sums: dict[int, torch.Tensor] = {}
    blocks = 0
    for batch in batches_of(split, batch_size):
        ids, positions, labels = (batch[name].to(device) for name in ("input_ids", "position_ids", "labels"))
        of = domains[blocks : blocks + len(ids)].to(device).expand_as(ids)
        outputs = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        present = labels[:, 1:] != IGNORED
        losses, _ = token_losses(model, outputs.last_hidden_state[:, :-1][present], labels[:, 1:][present])
        nats.index_add_(0, of[:, 1:][present], losses.double())
        targets.index_add_(0, of[:, 1:][present], torch.ones_like(losses, dtype=torch.float64))
        counts.add(selections(outputs), torch.ones_like(ids, dtype=torch.bool), of)
        for layer, result in (getattr(outputs, "routing", None) or {}).items():
            gate = result.gate.double()
            moments = torch.stack([gate.mean(), gate.square().mean()])
            sums[layer] = sums.get(layer, 0) + len(ids) * moments
        blocks += len(ids)
    moments = {layer: (total / blocks).tolist() for layer, total in sums.items()}
    loss = (nats.sum() / targets.sum()).item()
    return HeldoutResult(
        loss=loss,
        realised=counts.realised(model.config),
        bits_per_byte=nats.sum().item() / math.log(2) / split.num_bytes,
        gate_mean={layer: mean for layer, (mean, _) in moments.items()},
        gate_std={layer: max(0.0, square - mean**2) ** 0.5 for layer, (mean, square) in moments.items()},
        domains={
            name: DomainResult((nats[i] / targets[i]).item(), counts.realised(model.config, i))
            for i, name in enumerate(sources)
            if targets[i]
        },
    )
