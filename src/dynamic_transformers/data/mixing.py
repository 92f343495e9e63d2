"""How many tokens of each source a mixture takes."""

from __future__ import annotations

import math
from collections.abc import Mapping


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights scaled to a sum of 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def quotas(
    available: Mapping[str, int], weights: Mapping[str, float], max_tokens: int | None, exhausted: str
) -> dict[str, float]:
    """Tokens that a mixture asks of each source.

    Args:
        available: tokens that each source has.
        weights: by source, any positive scale; the proportions of tokens.
        max_tokens: of the mixture; None: as many as `exhausted` allows.
        exhausted: what happens where a source has fewer tokens than its part. `stop`: the mixture ends with
            the first source that runs dry, and holds the proportions. `repeat`: that source is read again;
            without `max_tokens`, until every source is read once. `redistribute`: the others take its part
            over, by their weights; without `max_tokens`, every source is read once.
    """
    proportions = shares(weights)
    largest = {name: available[name] / share for name, share in proportions.items()}
    limit = math.inf if max_tokens is None else float(max_tokens)
    if exhausted == "redistribute":
        return _redistributed(available, proportions, min(limit, sum(available.values())))
    if exhausted == "repeat":
        limit = max(largest.values()) if max_tokens is None else limit
    else:
        limit = min(limit, *largest.values())
    return {name: limit * share for name, share in proportions.items()}


def _redistributed(
    available: Mapping[str, int], proportions: Mapping[str, float], limit: float
) -> dict[str, float]:
    """Each source's part of `limit`, or all that it has; what is missing then comes from the others."""
    dry: dict[str, float] = {}
    while True:
        rest = {name: share for name, share in proportions.items() if name not in dry}
        left = limit - sum(dry.values())
        parts = {name: left * share for name, share in shares(rest).items()}
        emptied = {name: float(available[name]) for name, part in parts.items() if part >= available[name]}
        if not emptied:
            return dry | parts
        dry |= emptied
        if len(dry) == len(proportions):
            return dry
