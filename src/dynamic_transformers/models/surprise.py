"""The surprise gate of SDT and STT, and the small network that predicts a block's update.

Sources: Wieser et al. 2025 (arXiv 2511.21408), after Zakharov et al. 2022.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import SurpriseConfig
from .routing import RoutingContext
from .state import Fp32Module


class PriorNetwork(nn.Module):
    """Δ̂ = SwiGLU(RMSNorm(x)), bias-free, of width max(2, ⌈f·d⌉ rounded up to even)."""

    def __init__(self, config: SurpriseConfig):
        super().__init__()
        width = prior_width(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Predicted update (B, T, D) for (B, T, D)."""
        hidden_states = self.norm(hidden_states.to(self.norm.weight.dtype))
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class SurpriseGate(Fp32Module):
    """g = S_CE + S_CU − S_CE·S_CU from expected and unexpected change (docs/architectures.md).

    With u = β·CE and v = β·CU the gate is σ(logsumexp(u, v, u + v)), exactly: both sides have the odds
    e^u + e^v + e^(u+v). What selection compares is that logit divided by β and shifted,
    s = (logsumexp(u, v, u + v) − log 3) / β. At a given β it orders tokens as g does, but it does not
    saturate in floating point where β is large (g of two very surprising tokens would both be 1), and its
    scale does not follow β's schedule, so that a moving average over steps can calibrate a threshold.
    """

    def __init__(self, config: SurpriseConfig):
        super().__init__()
        self.config = config
        # Shape (1,): FSDP refuses parameters without dimensions.
        self.raw_offset_ce = nn.Parameter(torch.full((1,), inverse_softplus(config.offset_ce_init)))
        self.raw_multiplier_cu = nn.Parameter(torch.full((1,), inverse_softplus(config.multiplier_cu_init)))

    def forward(
        self,
        update: Tensor,
        predicted: Tensor,
        state: Tensor,
        beta: Tensor,
        context: RoutingContext,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Score s and gate g of each token, fp32.

        Args:
            update: Δ, (B, T, D).
            predicted: Δ̂, (B, T, D).
            state: x, what the update was added to, (B, T, D); used by `surprise_normalize: state`.
            beta: β, (1,).
            context, layer: give the earlier tokens' D_st when there is a cache.

        Returns:
            (B, T) each; g in (0, 1).
        """
        static = update.float().square().mean(-1)
        change = (update.float() - predicted.float()).square().mean(-1)
        if self.config.surprise_normalize == "state":
            scale = 1 / state.float().square().mean(-1).clamp(min=1e-12)
            static, change = static * scale, change * scale
        window = self.config.surprise_window
        history = context.with_history(static.detach(), layer, window - 1)
        if static.shape[1] == 1 and context.segments is None:
            average = history.mean(1, keepdim=True)  # decoding: the window is all that there is
        else:
            starts = context.document_starts(history.shape[1])
            average = moving_average(history, window, starts)[:, -static.shape[1] :]
        if self.config.surprise_normalize == "moving_average":
            scale = 1 / average.clamp(min=1e-12)
            static, change, average = static * scale, change * scale, torch.ones_like(average)
        offset_ce = F.softplus(self.raw_offset_ce.float())
        multiplier_cu = F.softplus(self.raw_multiplier_cu.float())
        expected = static - change + offset_ce.log()
        unexpected = static - multiplier_cu * average
        u, v = beta * expected, beta * unexpected
        score = (torch.logaddexp(torch.logaddexp(u, v), u + v) - math.log(3)) / beta
        return score, torch.sigmoid(score * beta + math.log(3))


def prior_width(config: SurpriseConfig) -> int:
    """Width of the prior network: max(2, ⌈f·d⌉ rounded up to even)."""
    width = math.ceil(config.prior_factor * config.hidden_size)
    return max(2, width + width % 2)


def inverse_softplus(value: float) -> float:
    """The x with softplus(x) = value > 0."""
    return value + math.log(-math.expm1(-value))


def moving_average(values: Tensor, window: int, starts: Tensor | None) -> Tensor:
    """Causal mean over the last min(window, t + 1) tokens of the same document, the current one included.

    Args:
        values: (B, T).
        window: W.
        starts: index of the first token of each token's document, (B, T); None: 0.
    """
    index = torch.arange(values.shape[1], device=values.device)
    first = (index - (window - 1)).clamp(min=0).expand_as(values)
    if starts is not None:
        first = torch.maximum(first, starts)
    # fp64, since the difference of two long sums loses what fp32 has.
    total = F.pad(values.double().cumsum(1), (1, 0))
    return ((total[:, 1:] - total.gather(1, first)) / (index + 1 - first)).to(values.dtype)
