"""Which tokens a routed layer computes: top-k in training, thresholds and predictors in evaluation.

Shapes: B rows, T tokens of a row, R rows with K selected tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import RoutedConfig

LONGEST_DECAY = 0.99  # ρ of a threshold's moving average; shorter runs take less


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
        losses: name → (weight, mean over valid tokens); training only.
    """

    selected: Tensor
    computed: float
    score: Tensor
    gate: Tensor
    losses: dict[str, tuple[float, Tensor]] = field(default_factory=dict)
    surprise_gate: Tensor | None = None


@dataclass
class Selection:
    """Selected tokens of each row.

    Attributes:
        indices: their indices in the row, ascending, (R, K).
        valid: which of the K places are in use, the first ones of each row, (R, K); None: all.
        mask: membership of each of the row's tokens, (B, T) bool.
        rows: which rows have selected tokens, (R,); None: all B.
    """

    indices: Tensor
    valid: Tensor | None
    mask: Tensor
    rows: Tensor | None = None

    def result(
        self,
        score: Tensor,
        gate: Tensor,
        losses: dict[str, tuple[float, Tensor]] | None = None,
        surprise_gate: Tensor | None = None,
    ) -> RoutingResult:
        """What a routed layer with this selection reports."""
        computed = self.indices.numel() / self.mask.numel()
        if surprise_gate is not None:
            surprise_gate = surprise_gate.detach()
        return RoutingResult(self.mask, computed, score.detach(), gate.detach(), losses or {}, surprise_gate)


def capacity_to_tokens(capacity: float, tokens: Tensor | int) -> Tensor:
    """k = max(1, ⌊γ·n⌋), at most n; the small term undoes rounding of products such as 0.29·100."""
    tokens = torch.as_tensor(tokens)
    k = (capacity * tokens.double() + 1e-9).floor().long()
    return torch.minimum(k.clamp(min=1), tokens)


def select_top_k(scores: Tensor, capacity: float, valid: Tensor | None) -> Selection:
    """The k best-scored valid tokens of each row, in ascending order. Non-causal: a training rule.

    Args:
        scores: (B, T).
        capacity: γ in (0, 1].
        valid: (B, T) bool; padding never competes, and k counts valid tokens only.
    """
    length = scores.shape[1]
    width = int(capacity_to_tokens(capacity, length))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if valid is None:
        indices = scores.topk(width, dim=1, sorted=False).indices
        return Selection(indices.sort(dim=1).values, None, mask.scatter(1, indices, True))
    indices = scores.masked_fill(~valid, -torch.inf).topk(width, dim=1).indices
    used = torch.arange(width, device=scores.device) < capacity_to_tokens(
        capacity, valid.sum(1, keepdim=True)
    )
    mask = mask.scatter(1, indices, used)
    indices = torch.where(used, indices, length).sort(dim=1).values
    return Selection(indices.clamp(max=length - 1), indices < length, mask)


def select_mask(mask: Tensor) -> Selection:
    """The tokens of a membership mask (B, T); rows without any are left out."""
    if len(mask) == 1:
        return Selection(mask.nonzero()[:, 1].unsqueeze(0), None, mask)
    counts = mask.sum(1)
    some = counts > 0
    most = counts.amax()
    fewest = torch.where(some, counts, most).amin()
    rows_used, least, width = torch.stack([some.sum(), fewest, most]).tolist()  # one transfer from a GPU
    members, rows = mask, None
    if rows_used < len(mask):
        rows = some.nonzero().squeeze(1)
        members = mask[rows]
    indices = members.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    if least == width:
        return Selection(indices, None, mask, rows)
    return Selection(indices, members.gather(1, indices), mask, rows)


class Fp32Scalars(nn.Module):
    """A module whose own parameters and buffers stay in fp32 when a model is cast: rounding decides."""

    def _apply(self, fn, recurse=True):
        before = {name: value.detach() for name, value in self._own()}
        super()._apply(fn, recurse)
        for name, value in self._own():
            if value.dtype != before[name].dtype:
                value.data = before[name].to(value.device)
        return self

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters(recurse=False)
        yield from self.named_buffers(recurse=False)


class CalibratedThreshold(Fp32Scalars):
    """τ of the `threshold` rule: bias-corrected moving average of the scores' (1 − γ) quantile.

    Exactly causal: τ is a constant of the checkpoint. After Expert Threshold routing (arXiv 2603.11535).
    Before any training step τ is 0.

    Attributes:
        value: τ, a scalar in fp32.
        weight: total weight of the quantiles in `value` before the correction; towards 1.
        decay: ρ.
    """

    value: Tensor
    weight: Tensor

    def __init__(self):
        super().__init__()
        self.decay = LONGEST_DECAY
        self.register_buffer("value", torch.zeros((), dtype=torch.float32))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float32))

    def set_progress(self, total_steps: int, forwards: int) -> None:
        """Look back over a twentieth of the run at most, but ten steps at least.

        In a run of a few hundred steps ρ = 0.99 would still hold what early weights scored.

        Args:
            total_steps: optimizer steps of the run.
            forwards: how often each of them calls `update`.
        """
        decay = min(LONGEST_DECAY, 1 - 1 / max(10.0, total_steps / 20))
        self.decay = decay ** (1 / forwards)

    @torch.no_grad()
    def update(self, scores: Tensor, fraction: Tensor | float, valid: Tensor | None) -> None:
        """One step of the average, over valid tokens, averaged over ranks.

        Args:
            scores: (B, T).
            fraction: share of the tokens that shall lie above τ.
        """
        quantile = score_quantile(scores, fraction, valid)
        known = ~quantile.isnan()  # a batch of nothing but padding leaves the average as it is
        step = (1 - self.decay) * known
        self.weight.lerp_(torch.ones_like(self.weight), step)
        self.value += torch.where(known, step / self.weight * (quantile - self.value), 0)


def score_quantile(scores: Tensor, fraction: Tensor | float, valid: Tensor | None) -> Tensor:
    """The score above which `fraction` of the valid tokens (B, T) lie, averaged over the ranks that have any.

    NaN where no rank has a valid token.
    """
    scores = scores.detach().float()
    if valid is not None:
        scores = torch.where(valid, scores, torch.nan)
    level = torch.as_tensor(1.0 - fraction, dtype=torch.float32, device=scores.device)
    quantile = scores.flatten().nanquantile(level)
    known = ~quantile.isnan()
    total = torch.stack([quantile.nan_to_num(), known.float()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total[0] / total[1]


class Predictor(nn.Module):
    """Membership of the training top-k, predicted from the token alone (MoD, section 3.5, method 2).

    d → d/2 → 1, SiLU, no biases. The input is detached: no gradient reaches the language model. Its own
    threshold cuts its logits for the `calibrated_predictor` rule.
    """

    def __init__(self, config: RoutedConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.threshold = CalibratedThreshold()
        self.up_proj = nn.Linear(hidden_size, hidden_size // 2, bias=False)
        self.down_proj = nn.Linear(hidden_size // 2, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (B, T) in fp32 for hidden states (B, T, D)."""
        features = F.silu(self.up_proj(hidden_states.detach())).float()
        # A sum of products keeps logits in fp32 under autocast, where nn.Linear would not.
        return (features * self.down_proj.weight.float().squeeze(0)).sum(-1)
