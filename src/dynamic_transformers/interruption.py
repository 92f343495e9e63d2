"""SIGTERM and SIGINT: noted when they come, obeyed where nothing is half-done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """Ends the command with the exit code that a shell expects: 143 after SIGTERM, 130 after SIGINT."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def leave(number: int) -> NoReturn:
    """End the command because of a signal."""
    raise Interrupted(number)


class Interruption:
    """Notes the first signal that comes in its body; a second SIGINT ends the program at once.

    Only a program's main thread can be told of signals; elsewhere nothing is noted.

    Args:
        then: is told of the signal, too.
    """

    def __init__(self, then: Callable[[int], None] | None = None):
        self.number: int | None = None
        self.then = then

    def __enter__(self) -> Interruption:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Obey, in the body, a signal where it comes, and before it one that has come.

        Raises:
            Interrupted: a signal came.
        """
        before, self.then = self.then, leave
        try:
            self.obey()
            yield
        finally:
            self.then = before

    def obey(self) -> None:
        """End the command if a signal has come.

        Raises:
            Interrupted: it has.
        """
        if self.number is not None:
            leave(self.number)

    def _note(self, number: int, _frame) -> None:
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.then is not None:
            self.then(number)
