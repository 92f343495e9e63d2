"""Which blocks the optimizer sees at which step: a function of seed and step alone.

Step s takes places [s·G, (s+1)·G) of an endless sequence of reshuffled epochs, G being the global batch.
So a resumed run continues with the very next block, and the same G on another number of ranks sees the
same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from dynamic_transformers.data.loading import load_split
from dynamic_transformers.settings import Settings

Item = TypeVar("Item")


class BlockOrder:
    """Endless shuffled order over `size` blocks."""

    def __init__(self, size: int, seed: int):
        if size < 1:
            raise ValueError("no blocks to train on")
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return int(self._order[offset])


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
    """Endless micro-batches of this rank from a step onwards, as `Blocks.batch` gives them.

    The next one is read while the training computes; for a GPU it is in pinned memory.
    """
    blocks = load_split(data_dir, "train")
    places = MicroBatches(
        BlockOrder(len(blocks), settings.run.seed),
        settings.data.batch_size,
        settings.training.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        first_step,
    )
    batches = map(blocks.batch, places)
    if accelerator.device.type == "cuda":
        batches = map(pinned, batches)
    return read_ahead(batches)


def pinned(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in memory from which a GPU copies without waiting."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Endless items, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, items)
        while True:
            item = coming.result()
            coming = thread.submit(next, items)
            yield item
