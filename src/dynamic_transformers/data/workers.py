"""Work that several processes share, which end with the one that began it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from dynamic_transformers.interruption import SIGNALS
from dynamic_transformers.settings import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def done_by(
    processes: int, function: Callable[[Job], Result], jobs: Sequence[Job]
) -> Generator[tuple[Job, Result], None, None]:
    """Each job with its result, in the order in which they are done; one process is this one.

    Jobs, results and the function are pickled between processes of this program.

    Raises:
        UserError: as `function`, or the system has killed a process.
    """
    if processes <= 1:
        for job in jobs:
            yield job, function(job)
        return
    context = multiprocessing.get_context("spawn")  # forked, the threads of tokenizers may hang
    executor = ProcessPoolExecutor(processes, context, _end_with_the_parent)
    others = multiprocessing.active_children()
    try:
        with _signals_held():
            # Each begins one process. The executor overlooks the death of one that began after it looked at
            # them, which it does again at each result: there are some before those of the first jobs.
            for _ in range(processes):
                executor.submit(os.getpid)
        waiting = iter(jobs)
        running: dict[Future[Result], Job] = {}
        while True:
            while len(running) < processes + 1 and (job := next(waiting, None)) is not None:
                running[executor.submit(function, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenized was killed, usually for want of memory: give fewer, with "
            "data.processes; what was finished stays, and the same command goes on from there"
        ) from error
    finally:
        for child in set(multiprocessing.active_children()).difference(others):
            child.kill()  # on success all of them wait for work
        executor.shutdown(cancel_futures=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals to this process wait, and processes that begin here never be told of any.

    A terminal's Ctrl-C reaches all of them: this one ends the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_the_parent() -> None:
    """Let this process not outlive the one that began it, however that ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
