"""Which blocks the optimizer sees at which step: a function of seed and step alone.

Step s takes places [s·G, (s+1)·G) of an endless sequence of reshuffled epochs, G being the global batch.
So a resumed run continues with the very next block, and the same G on another number of ranks sees the
same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from dynamic_transformers.data.loading import load_split
from dynamic_transformers.settings import Settings


class BlockOrder:
    """Endless shuffled order over `size` blocks."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("no blocks to train on")
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, []

    def __getitem__(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[offset]


class MicroBatches:
    """Batch sampler: this rank's micro-batches from a step onwards, without end.

    Args:
        order: of the blocks.
        batch_size: blocks of one forward on one rank.
        accumulation: forwards of one optimizer step.
        rank, world_size: of this process.
        first_step: optimizer step to begin with.
    """

    def __init__(
        self,
        order: BlockOrder,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        first_step: int,
    ):
        self.order, self.batch_size = order, batch_size
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size * self.world_size
        place = self.first_step * micro * self.accumulation + self.rank * self.batch_size
        while True:
            yield [self.order[place + i] for i in range(self.batch_size)]
            place += micro


def training_batches(
    settings: Settings, data_dir: Path, accelerator: Accelerator, first_step: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless micro-batches of this rank from a step onwards, as `Blocks.batch` gives them."""
    blocks = load_split(data_dir, "train")
    sampler = MicroBatches(
        BlockOrder(len(blocks), settings.run.seed),
        settings.data.batch_size,
        settings.training.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        first_step,
    )
    return map(blocks.batch, sampler)
