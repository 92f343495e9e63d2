"""Kills the steps of a pipeline at random moments, alone and three at once, and compares what they end in.

python -m benchmarks.kills --kills 100 [--seed 0] [--steps prepare,train] [--mlflow] [--folder outputs/kills]

Each trial starts a step, kills all of its processes with SIGKILL after a random time, at most three times,
then lets one end. Its output must have the bytes of one that nobody disturbed, but for what a clock says,
and nothing half-made may lie beside it. Speeds are measured by a clock that stands still, so that a
comparison's pages and pictures can be compared by their bytes, too. With --mlflow runs are tracked in a local
store, which must have the same values of the run and know that it is finished. With --folder what was done is
kept there, and the same command goes on. Prints a table; the exit code is 1 where an output differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.evaluation import efficiency
from dynamic_transformers.evaluation.evaluate import evaluate
from dynamic_transformers.export import export
from dynamic_transformers.manifest import source_revision, write_json
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking.store import load_mlflow
from dynamic_transformers.training.trainer import train

FORK = multiprocessing.get_context("fork")  # imports are done: a kill hits nothing but the step
STORE = "mlflow.db"  # of a folder's runs
MOST_KILLS = 3  # of one trial
# What a clock says, or a place, and what follows from it: digests of manifests that hold times.
CLOCKS = ("time", "seconds", "per_second", "path", "_dir", "digest", "mlflow_run_id", "git_revision")
RECORD = "tracking.json"  # how far a run has been sent; what has arrived is asked of the store


@dataclass
class Step:
    """One step.

    Attributes:
        output: its folder, below that of a trial.
        run: does it, in a trial's folder, which holds the outputs of the steps before it.
    """

    output: str
    run: Callable[[Path], Any]


def steps(mlflow: bool) -> dict[str, Step]:
    """The five steps, of one routed model."""

    def settings(place: Path) -> Settings:
        return quick_settings(place, mlflow)

    return {
        "prepare": Step("data", lambda place: prepare(settings(place), place / "data")),
        "train": Step("run", lambda place: train(settings(place), place / "data", place / "run")),
        "export": Step("model", lambda place: export(place / "run", place / "model", place / "data")),
        "evaluate": Step(
            "evaluation",
            lambda place: evaluate(
                settings(place), place / "data", place / "run", place / "model", place / "evaluation"
            ),
        ),
        "compare": Step(
            "report",
            lambda place: compare([place / "evaluation"], place / "report", models=[place / "model"]),
        ),
    }


def quick_settings(place: Path, mlflow: bool) -> Settings:
    """A run of seconds with lines, evaluations and checkpoints between."""
    return settings_from_dict(
        {
            "run": {"name": "killed", "output_dir": str(place)},
            "model": {"type": "stt", "size": "micro"},
            "data": {
                "dataset_configs": [
                    {"name": "math", "path": "embedded"},
                    {"name": "prose", "path": "embedded"},
                ],
                "vocab_size": 400,
                "block_size": 64,
                "batch_size": 4,
                "max_tokens": 60_000,
                "max_eval_tokens": 6000,
                "cloze_examples": 8,
                "arithmetic_examples": 8,
            },
            "training": {"max_flops": 4e10, "log_every": 2, "eval_every": 8, "checkpoint_every": 5},
            "tracking": {"mlflow": mlflow},
            "system": {"device": "cpu"},
        }
    )


def started(step: Step, place: Path, processes: int) -> list[Any]:
    """Processes that do the step at once."""

    def run() -> None:
        try:
            step.run(place)
        except UserError:  # another process trains there
            sys.exit(2)

    family = [FORK.Process(target=run) for _ in range(processes)]
    for process in family:
        process.start()
    return family


def contents(folder: Path) -> dict[str, Any]:
    """What each file holds, without what a clock says."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == RECORD:
            found[name] = None
        elif path.suffix in (".json", ".jsonl", ".yaml"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [timeless(yaml.safe_load(line)) for line in lines]
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """A value of JSON or YAML without the keys that hold times and places."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if not key.endswith(CLOCKS)}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def told(place: Path) -> dict[str, Any]:
    """What MLflow knows of the runs: their status and values, without what a clock says."""
    if not (place / STORE).is_file():
        return {}
    with closing(sqlite3.connect(place / STORE)) as store:
        runs = store.execute("SELECT name, status FROM runs").fetchall()
        values = store.execute("SELECT DISTINCT key, step, value FROM metrics ORDER BY key, step").fetchall()
    return {"MLflow's runs": runs, "MLflow's values": [row for row in values if not row[0].endswith(CLOCKS)]}


def trial(
    step: Step, before: Path, after: Path, processes: int, seconds: float, chance: random.Random
) -> tuple[int, str]:
    """Kill and let end; returns the number of kills that hit, and what differs.

    Args:
        before, after: the folder of the steps before, and with this one, that nobody disturbed.
        seconds: within which a kill comes.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = shutil.copytree(before, Path(folder) / "place")
        kills = 0
        for _ in range(chance.randint(1, MOST_KILLS)):
            family = started(step, place, processes)
            time.sleep(chance.uniform(0, seconds))
            for process in family:
                process.kill()
                process.join()
            kills += any(process.exitcode == -9 for process in family)
        (last,) = started(step, place, 1)
        last.join()
        left = ["exit code"] if last.exitcode else []
        left += [path.name for path in place.iterdir() if path.name.startswith(f".{step.output}.new-")]
        ours, expected = (contents(folder / step.output) | told(folder) for folder in (place, after))
        left += [name for name in {**ours, **expected} if ours.get(name, 0) != expected.get(name, 0)]
        return kills, ", ".join(left)


@dataclass
class Round:
    """The trials of one step.

    Attributes:
        step: its name.
        processes: at once.
        seconds: that the step takes undisturbed.
        kills: of each trial.
        differing: what differed, of each trial in which something did.
    """

    step: str
    processes: int
    seconds: float
    kills: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def row(self) -> list[str]:
        """Of the table."""
        seconds = f"{self.seconds:.1f}"
        figures = (self.step, self.processes, seconds, len(self.kills), sum(self.kills), len(self.differing))
        return list(map(str, figures))


def undisturbed(step: Step, before: Path, after: Path) -> float:
    """Do a step that nobody disturbs, or find it done; returns the seconds that it takes."""
    file = after.with_name(f"{after.name}.seconds")
    if not file.is_file():
        shutil.rmtree(after, ignore_errors=True)
        shutil.copytree(before, after)
        begin = time.monotonic()
        (process,) = started(step, after, 1)
        process.join()
        if process.exitcode:
            sys.exit(f"{after}: the step failed, although nobody disturbed it")
        file.write_text(str(time.monotonic() - begin))
    return float(file.read_text())


def add_trials(done: Round, step: Step, before: Path, kills: float, seed: int) -> None:
    """Try a step until so many kills have hit; each trial is written down beside `before`."""
    after = before.with_name(done.step)
    file = before.with_name(f"{done.step}-{done.processes}-seed-{seed}.json")
    if file.is_file():
        vars(done).update(json.loads(file.read_text()))
    while sum(done.kills) < kills:
        chance = random.Random(f"{seed} {done.step} {done.processes} {len(done.kills)}")
        hits, differing = trial(step, before, after, done.processes, done.seconds, chance)
        done.kills.append(hits)
        if differing:
            done.differing.append(differing)
            print(f"{done.step}, {done.processes} at once: {differing}", file=sys.stderr)
        write_json(file, asdict(done))
    print(*done.row, file=sys.stderr)


def one_second(_model: Any, function: Callable[[], None]) -> float:
    """Seconds that `function` takes by a clock that stands still."""
    function()
    return 1.0


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="prepare,train,export,evaluate,compare")
    parser.add_argument("--mlflow", action="store_true", help="track the runs in a local store")
    parser.add_argument("--folder", type=Path, help="keep what was done here, and go on from it")
    args = parser.parse_args()
    logging.getLogger("dynamic_transformers").setLevel(logging.ERROR)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if args.mlflow:
        load_mlflow("sqlite:///")  # before the forks, each of which would do it
    efficiency.timed = one_second
    asked = args.steps.split(",")
    table = Table("step", "processes", "seconds undisturbed", "trials", "kills", "differing")
    failures = 0
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as top:
        # Other code, or another store, makes other outputs.
        folder = Path(top) / (source_revision() + ("-mlflow" if args.mlflow else ""))
        before = folder / "nothing"
        before.mkdir(parents=True, exist_ok=True)
        for name, step in steps(args.mlflow).items():
            seconds = undisturbed(step, before, folder / name)
            for processes in (1, 3) if name in asked else ():
                done = Round(name, processes, seconds)
                add_trials(done, step, before, args.kills / (2 * len(asked)), args.seed)
                failures += len(done.differing)
                table.add_row(*done.row)
            before = folder / name
    Console().print(table)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
