"""Work of one process that the others of a training wait for, before there is a process group.

A group ends a process that waits longer than its time-out: some minutes, which data need not keep to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dynamic_transformers.folders import Wait
from dynamic_transformers.settings import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets

_stores: list[Store] = []  # one that rank 0 serves to the others is there as long as its object


def by_one_process(make: Callable[[], Path], what: str) -> Path:
    """What `make` returns in the first process of a node, in all processes of that node.

    Rank 0 goes first; then the first of each other node, which finds finished what it sees in a shared
    folder. The others wait, as long as it takes, and one of each node says so. Where `torchrun` and
    `accelerate launch` have not said which rank a process has, it calls `make` itself.

    Args:
        make: returns where it has written something.
        what: it makes, for the lines of those that wait.

    Raises:
        UserError: rank 0, or its node, has ended; or as `make` does.
    """
    if not all(name in os.environ for name in RANKS):
        return make()
    from torch.distributed import DistNetworkError
    from torch.distributed.rendezvous import rendezvous

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    first = rank - local_rank  # rank of the first process of this node
    store = next(rendezvous("env://"))[0]
    _stores.append(store)
    try:
        if rank != first:
            return Path(_made_by(first, store, what, Wait(aloud=local_rank == 1)))
        if rank:
            _made_by(0, store, what, Wait())
        made = make()
        store.set(_key(rank, what), str(made))
        return made
    except DistNetworkError as error:
        raise UserError(
            f"rank {rank}: rank 0, which makes {what}, has ended: its own lines say why"
        ) from error


def _made_by(rank: int, store: Store, what: str, waiting: Wait) -> str:
    """What a rank has made, once it has."""
    while not store.check([_key(rank, what)]):
        waiting.pause(f"rank {rank}, which makes {what}")
    return store.get(_key(rank, what)).decode()


def _key(rank: int, what: str) -> str:
    return f"dynamic_transformers/{what} of rank {rank}"
