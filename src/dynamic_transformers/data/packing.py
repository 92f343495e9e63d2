"""In which order the documents of a mixture follow each other, and where they are cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dynamic_transformers.data.blocks import PADDING, Piece

WINDOW, WINDOW_TOKENS = 1 << 14, 1 << 24  # pieces that are fitted together, and their tokens: at most, about


@dataclass
class Cuts:
    """What the ends of blocks cut off.

    Attributes:
        documents: that were cut.
        tokens: of them behind their first cut, which do not see what is before it.
        without_loss: tokens, by source, of parts of conversations that the assistant says nothing in: these
            are left out.
    """

    documents: int = 0
    tokens: int = 0
    without_loss: Counter[int] = field(default_factory=Counter)

    def note(self, tokens: int) -> None:
        """So many tokens of a document are behind its first cut."""
        self.documents += tokens > 0
        self.tokens += tokens


def concatenated(pieces: Iterator[Piece], block_size: int, cuts: Cuts) -> Iterator[Piece]:
    """Documents one after the other, cut wherever a block ends."""
    place = 0
    for piece in pieces:
        size = len(piece.input_ids)
        cuts.note(max(0, size - (block_size - place)))
        place = (place + size) % block_size
        yield piece


def best_fit(pieces: Iterator[Piece], block_size: int, cuts: Cuts, padding_id: int) -> Iterator[Piece]:
    """Documents in an order in which no one is cut that fits into a block; what stays free is filled up.

    Longer ones are cut into blocks, and their rest is fitted. A part without any loss is left out. The
    longest piece of a window is placed first, each into the block where it leaves the least room (Ding et al.
    2024, "Fewer Truncations Improve Language Modeling", section 3).
    """
    window: list[Piece] = []
    held = 0
    for piece in pieces:
        size = len(piece.input_ids)
        cuts.note(max(0, size - block_size))
        for start in range(0, size, block_size):
            part = piece.part(start, start + block_size)
            tokens = len(part.input_ids)
            if part.targets is not None and not part.targets[1:].any():
                cuts.without_loss[part.source] += tokens
            elif tokens == block_size:
                yield part
            else:
                window.append(part)
                held += tokens
        if len(window) >= WINDOW or held >= WINDOW_TOKENS:
            yield from _fitted(window, block_size, padding_id)
            window, held = [], 0
    yield from _fitted(window, block_size, padding_id)


def _fitted(window: list[Piece], block_size: int, padding_id: int) -> Iterator[Piece]:
    blocks: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # of each block that is not full, and its number, sorted
    for piece in sorted(window, key=lambda piece: -len(piece.input_ids)):
        size = len(piece.input_ids)
        place = bisect_left(room, (size, -1))
        if place == len(room):
            left, block = block_size, len(blocks)
            blocks.append([])
        else:
            left, block = room.pop(place)
        blocks[block].append(piece)
        if left > size:
            insort(room, (left - size, block))
    free = {block: left for left, block in room}
    for number, block in enumerate(blocks):
        yield from block
        if left := free.get(number):
            nothing = np.zeros(left, dtype=np.int64)
            yield Piece(nothing + padding_id, nothing, None, PADDING)
