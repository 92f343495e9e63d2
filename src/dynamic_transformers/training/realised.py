"""What a model computed of the rows that it read: fractions, their spread over rows, and FLOPs.

Routing may compute much of one row and little of the next while its mean is γ. Attention scores go with the
square of a row's own fraction, so FLOPs are summed row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2Config

from dynamic_transformers.training.flops import forward_flops


@dataclass(frozen=True)
class Spread:
    """Mean over tokens, and standard deviation over rows, each row weighted by its tokens."""

    mean: float
    sd: float


@dataclass(frozen=True)
class Realised:
    """What a model computed of some text.

    Attributes:
        tokens: of the text.
        forward_flops_per_token: of one forward over each row, in eval mode.
        fraction: of tokens computed, mean over routed layers; None where nothing is routed.
        layers: the same of each routed layer.
    """

    tokens: int
    forward_flops_per_token: float
    fraction: Spread | None
    layers: dict[int, Spread]


class SelectionCounts:
    """Tokens of each row, and how many of them each routed layer computed; by domain, where asked for.

    Args:
        domains: how many there are. Tokens of a row may be of several.
    """

    def __init__(self, domains: int = 1):
        self.domains = domains
        self._layers: list[int] = []
        self._tokens: list[torch.Tensor] = []  # (B, S) for each batch
        self._selected: list[torch.Tensor] = []  # (L, B, S)

    def add(
        self,
        selected: Mapping[int, torch.Tensor],
        valid: torch.Tensor,
        domains: torch.Tensor | None = None,
    ) -> None:
        """Count a batch. Nothing waits for the device.

        Args:
            selected: routed layer → tokens that it computed, (B, T) bool.
            valid: tokens that are not padding, (B, T) bool.
            domains: of each token, (B, T) int64; None: all are of the first.
        """
        if domains is None:
            domains = torch.zeros_like(valid, dtype=torch.long)
        self._layers = list(selected)
        counts = [
            torch.zeros(len(valid), self.domains, dtype=torch.long, device=valid.device).scatter_add_(
                1, domains, (mask & valid).long()
            )
            for mask in (valid, *selected.values())
        ]
        self._tokens.append(counts[0])
        self._selected.append(
            torch.stack(counts[1:]) if selected else counts[0].new_empty(0, *counts[0].shape)
        )

    def realised(self, config: Qwen2Config, domain: int | None = None) -> Realised:
        """Summary over all rows that were counted, or over their tokens of one domain.

        A token of a domain is compared with its whole row: FLOPs of the domains add up to those of all.

        Raises:
            ValueError: there is no such token.
        """
        tokens, selected = (
            torch.cat(parts, dim=dim).double().cpu()
            for parts, dim in ((self._tokens, 0), (self._selected, 1))
        )
        row_tokens, row_selected = tokens.sum(-1), selected.sum(-1)  # (N,), (L, N)
        part, chosen = (
            (row_tokens, row_selected) if domain is None else (tokens[:, domain], selected[..., domain])
        )
        total = part.sum()
        if not total:
            raise ValueError("no token was counted")
        sums = chosen.sum(1)
        compared = (chosen * row_selected).sum(1) / sums.clamp(min=1)
        account = forward_flops(
            config,
            float((part * row_tokens).sum() / total),
            dict(zip(self._layers, (sums / total).tolist(), strict=True)),
            dict(zip(self._layers, compared.tolist(), strict=True)),
        )
        return Realised(
            int(total),
            account.total(),
            _spread(chosen.mean(0), part) if self._layers else None,
            {layer: _spread(counts, part) for layer, counts in zip(self._layers, chosen, strict=True)},
        )


def selections(output: Any) -> dict[int, torch.Tensor]:
    """Routed layer → which tokens a forward computed, (B, T) bool; empty for a model that routes nothing."""
    return {layer: result.selected for layer, result in (getattr(output, "routing", None) or {}).items()}


def _spread(selected: torch.Tensor, tokens: torch.Tensor) -> Spread:
    """Of the fractions selected ÷ tokens of the rows, (N,) each."""
    mean = selected.sum() / tokens.sum()
    deviation = selected / tokens.clamp(min=1) - mean
    return Spread(mean.item(), ((tokens * deviation.square()).sum() / tokens.sum()).sqrt().item())
