"""What a run has to tell a tracking server, and how much of it has been sent: `tracking.json`."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dynamic_transformers.folders import write_whole

logger = logging.getLogger("dynamic_transformers")

STATE = "tracking.json"
METRICS = "metrics.jsonl"
MAX_PARAM_LENGTH = 500
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"  # MLflow's


@dataclass
class Record:
    """One tracked run."""

    name: str = ""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # a tag: finds a run whose id was never told
    store: str = ""  # to which all of this was sent, as `store_name` calls it
    run_id: str | None = None  # MLflow's
    described: bool = False  # parameters and tags are there
    status: str = RUNNING
    sent_status: str | None = None
    sent_bytes: int = 0  # of metrics.jsonl
    sent_steps: dict[str, int] = field(
        default_factory=dict
    )  # of lines that were sent, and cut off afterwards
    sent_work: int = -1  # last step whose work was sent: a step that is evaluated has two lines
    attachments: list[dict[str, Any]] = field(
        default_factory=list
    )  # data, figures, files: sent in this order
    sent_attachments: int = 0
    replaced: list[str] = field(default_factory=list)  # MLflow's ids of runs that this one took the place of
    sent_replaced: int = 0
    wandb_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def begin_anew(self) -> None:
        """Nothing has been sent: the server does not know the run."""
        self.run_id, self.described, self.sent_status = None, False, None
        self.sent_bytes = self.sent_attachments = self.sent_replaced = 0
        self.sent_steps, self.sent_work = {}, -1


class RecordFile:
    """The record of a run folder, changed by the run and by the thread that sends it."""

    def __init__(self, run_dir: Path, default: Record):
        self.path = run_dir / STATE
        self.record = read_record(run_dir) or default
        self.frozen = False  # by a run that has been closed: a later step may own the file by now
        self._lock = threading.Lock()
        self._told = False

    @contextmanager
    def changing(self) -> Iterator[Record]:
        """Change the record and write it down. A disk that is full costs only the note of what was sent."""
        with self._lock:
            yield self.record
            if not self.frozen:
                try:
                    save_record(self.path.parent, self.record)
                except OSError as error:
                    if not self._told:
                        logger.warning("%s: not written (%s)", self.path, error.strerror)
                    self._told = True


def read_record(run_dir: Path) -> Record | None:
    """The record of a run folder; None: it has none, or a damaged one, which is renamed."""
    path = run_dir / STATE
    if not path.is_file():
        return None
    try:
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        aside = path.with_name(f"{STATE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        logger.warning("%s: damaged (%s); renamed to %s, and the run is sent anew", path, error, aside.name)
        with suppress(OSError):  # nothing can be written there: the next reader is told the same
            path.rename(aside)
        return None


def _record(values: Any) -> Record:
    """A record as another version may have written it.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(values, dict):
        raise TypeError("it is no JSON object")
    known = {name: values[name] for name in (item.name for item in fields(Record)) if name in values}
    for name, default in asdict(Record()).items():
        if default is not None and not isinstance(known.get(name, default), type(default)):
            raise TypeError(f"{name} is {known[name]!r}")
    return Record(**known)


def save_record(run_dir: Path, record: Record) -> None:
    """Write a record down."""
    write_whole(run_dir / STATE, json.dumps(asdict(record), indent=2))


def is_sent(record: Record, run_dir: Path, store: str) -> bool:
    """Whether a run has ended and the store of this name has got all of it."""
    path = run_dir / METRICS
    return (
        record.store == store
        and record.described
        and record.status == record.sent_status != RUNNING
        and record.sent_attachments == len(record.attachments)
        and record.sent_replaced == len(record.replaced)
        and record.sent_bytes == (path.stat().st_size if path.is_file() else 0)
    )


def forget_after(run_dir: Path, step: int, evaluated: bool = True) -> None:
    """Drop what an interrupted run logged after the checkpoint of `step`, from which it goes on.

    MLflow keeps what it was sent of that. Those lines come again, with equal values, but are not sent twice.

    Args:
        evaluated: whether the checkpoint holds that its step was evaluated; else that line comes again, too.
    """
    path = run_dir / METRICS
    if not path.is_file():
        return

    def stays(values: dict[str, Any]) -> bool:
        return values["step"] < step or (values["step"] == step and (evaluated or "eval/loss" not in values))

    lines = list(filter(_is_whole, path.read_bytes().splitlines(keepends=True)))
    kept = b"".join(line for line in lines if stays(json.loads(line)))
    record = read_record(run_dir)
    if record:
        sent, end = 0, 0
        for line in lines:
            end += len(line)
            values = json.loads(line)
            if end > record.sent_bytes:
                break
            if stays(values):
                sent = end
                continue
            for key in values:
                record.sent_steps[key] = max(values["step"], record.sent_steps.get(key, 0))
        # Steps only grow, so that what is kept is the beginning.
        record.sent_bytes = sent
        save_record(run_dir, record)
    write_whole(path, kept.decode())


def _is_whole(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is one, and not what a full disk or a kill has left of one."""
    try:
        return line.endswith(b"\n") and "step" in json.loads(line)
    except (ValueError, TypeError):
        return False


def replace_run(aside: Path, run_dir: Path) -> None:
    """Let the run that begins anew in `run_dir` mark the MLflow run of the one that was moved to `aside`.

    To be called between the two. The old run gets the tag `replaced_by`; if it was RUNNING it ends as KILLED.
    """
    old = read_record(aside)
    if old is None:
        return
    if old.status == RUNNING:
        old.status = KILLED
        save_record(aside, old)
    replaced = [*old.replaced, old.run_id] if old.run_id else old.replaced
    save_record(run_dir, Record(store=old.store, replaced=replaced, sent_replaced=old.sent_replaced))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters `a.b.c`, cut at what every server accepts."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)[:MAX_PARAM_LENGTH]
    return flat
