"""Which tokens a routed layer computes: top-k in training, thresholds and predictors in evaluation.

Shapes: B rows, T tokens of a row, R rows with K selected tokens, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROUNDING = 1e-9  # undoes the rounding of products such as 0.29·100


@dataclass
class RoutingResult:
    """What a routed layer reports beside its hidden states.

    Attributes:
        selected: tokens that the block computed, (B, T) bool.
        computed: places that the block ran on ÷ all tokens: a row that selects any token has as many places
            as the row with the most.
        score: what selection compares, detached, (B, T); STT: the student's logits.
        gate: what a token's update is multiplied with if it is selected, detached, (B, T).
        surprise_gate: STT in training: g of the teacher, which chooses the targets, detached, (B, T).
        losses: name → (weight, mean over each row's valid tokens, (B,)); training only.
        quantiles: of the scores, and of the predictor's logits or NaN, at the training capacity, (2,);
            training only.
    """

    selected: Tensor
    computed: float
    score: Tensor
    gate: Tensor
    losses: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    surprise_gate: Tensor | None = None
    quantiles: Tensor | None = None


@dataclass
class Selection:
    """Selected tokens of each row.

    Attributes:
        indices: their indices in the row, ascending, (R, K).
        valid: which of the K places are in use, the first ones of each row, (R, K); None: all.
        mask: membership of each of the row's tokens, (B, T) bool.
        rows: which rows have selected tokens, (R,); None: all B.
        counts: how many tokens each of the B rows has; None where the host has not asked.
    """

    indices: Tensor
    valid: Tensor | None
    mask: Tensor
    rows: Tensor | None = None
    counts: list[int] | None = None

    def result(
        self,
        score: Tensor,
        gate: Tensor,
        losses: dict[str, tuple[float, Tensor]] | None = None,
        surprise_gate: Tensor | None = None,
        quantiles: Tensor | None = None,
    ) -> RoutingResult:
        """What a routed layer with this selection reports."""
        computed = self.indices.numel() / self.mask.numel()
        if surprise_gate is not None:
            surprise_gate = surprise_gate.detach()
        score, gate = score.detach(), gate.detach()
        return RoutingResult(self.mask, computed, score, gate, losses or {}, surprise_gate, quantiles)


def capacity_to_tokens(capacity: float, tokens: int) -> int:
    """k = max(1, ⌊γ·n⌋), at most n."""
    return min(max(1, math.floor(capacity * tokens + ROUNDING)), tokens)


def capacities_to_tokens(capacity: float, tokens: Tensor) -> Tensor:
    """The same for a tensor of n, without waiting for the device."""
    k = (capacity * tokens.double() + ROUNDING).floor().long()
    return torch.minimum(k.clamp(min=1), tokens)


def select_top_k(scores: Tensor, capacity: float, valid: Tensor | None) -> Selection:
    """The k best-scored valid tokens of each row, in ascending order. Non-causal: a training rule.

    Args:
        scores: (B, T).
        capacity: γ in (0, 1].
        valid: (B, T) bool; padding never competes, and k counts valid tokens only.
    """
    length = scores.shape[1]
    width = capacity_to_tokens(capacity, length)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if valid is None:
        indices = scores.topk(width, dim=1, sorted=False).indices
        return Selection(indices.sort(dim=1).values, None, mask.scatter(1, indices, True))
    indices = scores.masked_fill(~valid, -torch.inf).topk(width, dim=1).indices
    used = torch.arange(width, device=scores.device) < capacities_to_tokens(
        capacity, valid.sum(1, keepdim=True)
    )
    mask = mask.scatter(1, indices, used)
    indices = torch.where(used, indices, length).sort(dim=1).values
    return Selection(indices.clamp(max=length - 1), indices < length, mask)


def select_mask(mask: Tensor) -> Selection:
    """The tokens of a membership mask (B, T); rows without any are left out. The host waits once."""
    counts: list[int] = mask.sum(1).tolist()
    used = [count for count in counts if count]
    some, width, total = len(used) < len(counts), max(counts), sum(counts)
    if width * len(used) == total:
        places = torch.nonzero_static(mask, size=total)
        rows = places[:: max(1, width), 0] if some else None
        return Selection(places[:, 1].view(len(used), width), None, mask, rows, counts)
    rows = torch.nonzero_static(mask.any(1), size=len(used)).squeeze(1) if some else None
    members = mask if rows is None else mask[rows]
    indices = members.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return Selection(indices, members.gather(1, indices), mask, rows, counts)


def score_quantile(scores: Tensor, fraction: Tensor | float, valid: Tensor | None) -> Tensor:
    """The score above which `fraction` of the valid tokens lie, between two of them if need be.

    Args:
        scores: (B, T).
        fraction: in [0, 1].
        valid: (B, T); None: all.

    Returns:
        A scalar, NaN where there is no valid token. Nothing waits for the device.
    """
    scores = scores.detach().float().flatten()
    count = scores.new_full((), scores.numel())
    if valid is not None:
        scores, count = scores.masked_fill(~valid.flatten(), torch.inf), valid.sum()
    scores = scores.sort().values
    place = (1.0 - fraction) * (count - 1).clamp(min=0).double()
    below = place.floor()
    low, high = (
        scores.gather(0, at.long().clamp(max=scores.numel() - 1).view(1)) for at in (below, place.ceil())
    )
    value = torch.lerp(low, high, (place - below).float().view(1)).squeeze(0)
    return torch.where(count > 0, value, torch.nan)
