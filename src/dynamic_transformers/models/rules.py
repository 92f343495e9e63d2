"""Selections that need no ranking: by a threshold within a bound in training, and the controls.

Shapes: B rows, T tokens of a row. Widths follow from shapes and settings alone: nothing waits for the device.
"""

import torch
from torch import Tensor

from .selection import ROUNDING, Selection, capacities_to_tokens, capacity_to_tokens


def select_first(mask: Tensor, capacity: float, valid: Tensor | None) -> Selection:
    """The first tokens of a mask in each row, as many as `capacity` allows.

    Those beyond are left out whatever they are: to keep the best ones would look at later tokens.

    Args:
        mask: (B, T) bool.
        capacity: of a row's valid tokens at most this fraction; so wide are all rows.
        valid: (B, T) bool; padding is never selected.
    """
    length = mask.shape[1]
    width = capacity_to_tokens(capacity, length)
    most: Tensor | int = width
    if valid is not None:
        mask, most = mask & valid, capacities_to_tokens(capacity, valid.sum(1, keepdim=True))
    mask = mask & (mask.cumsum(1) <= most)
    index = torch.arange(length, device=mask.device)
    indices = torch.where(mask, index, length).sort(dim=1).values[:, :width]
    return Selection(indices.clamp(max=length - 1), indices < length, mask)


def evenly_spaced(places: Tensor, capacity: float) -> Tensor:
    """Whether place t is one of the evenly spaced ones of its document: ⌊(t+1)·γ⌋ > ⌊t·γ⌋.

    The first n tokens of a document have ⌊γ·n⌋ of them, so that a row never has more than its k.

    Args:
        places: t, counted from 0 in each document, (B or 1, T).

    Returns:
        (B or 1, T) bool.
    """
    before, after = ((capacity * t.double() + ROUNDING).floor() for t in (places, places + 1))
    return after > before
