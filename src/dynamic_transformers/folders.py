"""Folders that one process writes at a time, and that are whole whenever anybody looks.

What belongs to `folder` while it is made lies beside it: `.<name>.lock` and `.<name>.new-…`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dynamic_transformers.settings import UserError

logger = logging.getLogger("dynamic_transformers")


class InUseError(UserError):
    """Another process writes there now: unlike other mistakes, this passes by itself."""


_held: set[TextIO] = set()  # the open lock files of this process
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
SECONDS_OF_SILENCE = 60  # of a process that waits


class Wait:
    """The waiting of a process.

    Args:
        aloud: it says at once what it waits for, and every minute again.
    """

    def __init__(self, aloud: bool = True) -> None:
        self.aloud = aloud
        self.began = time.monotonic()
        self.silent_until = self.began

    def pause(self, reason: str) -> None:
        """Sleep for a tenth of the time since the beginning, up to a second."""
        now = time.monotonic()
        if self.aloud and now >= self.silent_until:
            since = f" (for {now - self.began:.0f} s)" if self.silent_until > self.began else ""
            logger.info("waiting for %s%s", reason, since)
            self.silent_until = now + SECONDS_OF_SILENCE
        time.sleep(min(1, 0.001 + (now - self.began) / 10))


@contextmanager
def sole_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep other processes that ask for the same folder out of the body.

    The kernel frees the lock of a process that has died, and what it left half-made is removed.

    Args:
        wait: for the process that writes there now, and say for whom; otherwise that is an error.

    Raises:
        InUseError: another process writes there; the line names it and its host.
    """
    folder = folder.resolve()
    make_folder(folder.parent)
    path = folder.parent / f".{folder.name}.lock"
    file = _locked(path, folder, wait)
    if file is None:
        yield
        return
    _held.add(file)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        sweep(folder)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: whoever waits for this file opens another
        fcntl.flock(file, fcntl.LOCK_UN)
        _held.discard(file)
        file.close()


def _let_go() -> None:
    """Close, in a process that was forked, the locks of its parent: they end with the parent alone."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)


def _locked(path: Path, folder: Path, wait: bool) -> TextIO | None:
    """The open lock file, locked; None where nothing can be written, or the file system has no locks."""
    waiting = Wait()
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
            return None  # nobody writes there
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            if not wait:
                file.close()
                raise InUseError(
                    f"{folder}: {owner} writes there now; wait for its end, or choose another name"
                ) from None
            waiting.pause(f"{owner}, which writes {folder}")
        except OSError as error:
            file.close()
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            logger.warning("%s: this file system has no locks; start one process there at a time", folder)
            return None
        else:
            with suppress(FileNotFoundError):  # its owner has removed it meanwhile
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        file.close()


def check_target(folder: Path) -> None:
    """Refuse what cannot be put in place as a whole.

    Raises:
        UserError: a file, a mount point, or the working folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    for what, there in (
        ("a mount point", folder.is_mount()),
        ("the working folder", folder.resolve() == Path.cwd()),
    ):
        if there:
            raise UserError(f"{folder}: is {what}, which cannot be replaced as a whole; name a folder in it")


def new_sibling(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and put in its place."""
    sibling = _free_sibling(folder)
    make_folder(sibling)
    return sibling


def _free_sibling(folder: Path) -> Path:
    """A name that the next writer of `folder` sweeps away."""
    return folder.parent / f".{folder.name}.new-{uuid.uuid4().hex[:12]}"


def put_in_place(new: Path, folder: Path) -> None:
    """Let `new` be `folder`, all at once; what stood there is removed afterwards.

    What `new` holds is on the disk before. There is a moment without any folder only where the file system
    cannot exchange two.
    """
    flush(new)
    try:
        new.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        old = new
        if not _exchange(new, folder):
            old = folder.parent / f".{folder.name}.new-old-{uuid.uuid4().hex[:12]}"
            folder.rename(old)
            new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed now is swept by the next writer
    _flush_one(folder.parent)


def set_aside(folder: Path) -> Path:
    """Rename a folder to `<name>.replaced-<time>`, and return that."""
    return folder.rename(_aside(folder))


def replace(new: Path, folder: Path) -> Path:
    """Let `new` be `folder` at once, as `put_in_place`; returns where what stood there is kept."""
    flush(new)
    aside = new.rename(_aside(folder))
    if not _exchange(aside, folder):
        new, aside = aside, set_aside(folder)
        new.rename(folder)
    _flush_one(folder.parent)
    return aside


def _aside(folder: Path) -> Path:
    """A free name for a folder that is replaced."""
    stem = f"{folder.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}"
    aside = folder.with_name(stem)
    count = 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{stem}-{count}")
    return aside


def sweep(folder: Path) -> None:
    """Remove what writers of `folder` that were killed have left beside it. Call it as the sole writer."""
    for path in list(folder.parent.iterdir()):
        if path.name.startswith(f".{folder.name}.new-"):
            if path.name.startswith(f".{folder.name}.new-old-") and not folder.exists():
                path.rename(folder)  # killed between two renames
            else:
                shutil.rmtree(path, ignore_errors=True)


def discard(path: Path, folder: Path) -> None:
    """Remove a folder that lies beside `folder`, if it is there: nobody finds half of it, however this ends.

    Call it as the sole writer of `folder`. What cannot be removed stays as it is.
    """
    aside = _free_sibling(folder)
    with suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        UserError: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be made: {error.strerror}") from error


def flush(folder: Path) -> None:
    """Bring every file and folder below `folder` to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _flush_one(path)
    _flush_one(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders at once; whether the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(one), os.fsencode(other))
    return rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
