"""Kills the steps of a pipeline at random moments, alone and three at once, and compares what they end in.

python -m benchmarks.kills --kills 100 [--seed 0] [--steps prepare,train]

Each trial starts a step, kills all of its processes with SIGKILL after a random time, at most three times,
then lets one end. Its output must have the bytes of one that nobody disturbed, but for what a clock says,
and nothing half-made may lie beside it. Prints a table; the exit code is 1 where an output differs.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.evaluation.evaluate import evaluate
from dynamic_transformers.export import export
from dynamic_transformers.settings import Settings
from dynamic_transformers.training.trainer import train

FORK = multiprocessing.get_context("fork")  # imports are done: a kill hits nothing but the step
MOST_KILLS = 3  # of one trial
# What a clock says, or a place, and what follows from it: digests of manifests that hold times. Pictures and
# pages of a comparison draw measured speeds; that they are there is all that is asked of them.
CLOCKS = ("time", "seconds", "per_second", "path", "_dir", "digest", "mlflow_run_id", "git_revision")
DRAWN_FROM_CLOCKS = ("report.html", ".png", ".csv")


@dataclass
class Step:
    """One step.

    Attributes:
        output: its folder, below that of a trial.
        needs: the folders that it reads.
        run: does it, in a trial's folder.
    """

    output: str
    needs: tuple[str, ...]
    run: Callable[[Path], Any]


def steps(settings: Settings) -> dict[str, Step]:
    """The five steps, of one routed model."""
    return {
        "prepare": Step("data", (), lambda place: prepare(settings, place / "data")),
        "train": Step("run", ("data",), lambda place: train(settings, place / "data", place / "run")),
        "export": Step(
            "model", ("data", "run"), lambda place: export(place / "run", place / "model", place / "data")
        ),
        "evaluate": Step(
            "evaluation",
            ("data", "run", "model"),
            lambda place: evaluate(
                settings, place / "data", place / "run", place / "model", place / "evaluation"
            ),
        ),
        "compare": Step(
            "report",
            ("data", "run", "model", "evaluation"),
            lambda place: compare([place / "evaluation"], place / "report", models=[place / "model"]),
        ),
    }


def quick_settings() -> Settings:
    """A run of seconds with lines, evaluations and checkpoints between."""
    return settings_from_dict(
        {
            "run": {"name": "killed"},
            "model": {"type": "stt", "size": "micro"},
            "data": {
                "dataset_configs": [
                    {"name": "math", "type": "embedded"},
                    {"name": "prose", "type": "embedded"},
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
            "tracking": {"mlflow": False},
            "system": {"device": "cpu"},
        }
    )


def started(step: Step, place: Path, processes: int) -> list[Any]:
    """Processes that do the step at once."""
    family = [FORK.Process(target=step.run, args=(place,)) for _ in range(processes)]
    for process in family:
        process.start()
    return family


def contents(folder: Path) -> dict[str, Any]:
    """What each file holds, without what a clock says."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name.endswith(DRAWN_FROM_CLOCKS):
            found[name] = None
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [timeless(json.loads(line)) for line in lines]
        else:
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    """A JSON value without the keys that hold times and places."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if not key.endswith(CLOCKS)}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def trial(
    step: Step, reference: Path, processes: int, seconds: float, chance: random.Random
) -> tuple[int, str]:
    """Kill and let end; returns the number of kills that hit, and what differs."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in step.needs:
            shutil.copytree(reference / name, place / name)
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
        ours, expected = contents(place / step.output), contents(reference / step.output)
        differing = [name for name in {**ours, **expected} if ours.get(name, 0) != expected.get(name, 0)]
        return kills, ", ".join(differing + left)


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="prepare,train,export,evaluate,compare")
    args = parser.parse_args()
    logging.getLogger("dynamic_transformers").setLevel(logging.ERROR)
    chance = random.Random(args.seed)
    everything = steps(quick_settings())
    asked = args.steps.split(",")
    table = Table("step", "processes", "seconds undisturbed", "trials", "kills", "differing")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder)
        for name, step in everything.items():
            begin = time.monotonic()
            for process in started(step, reference, 1):
                process.join()
            seconds = time.monotonic() - begin
            if name not in asked:
                continue
            for processes in (1, 3):
                trials = kills = 0
                wrong = []
                while kills < args.kills / (2 * len(asked)):
                    hits, differing = trial(step, reference, processes, seconds, chance)
                    trials, kills = trials + 1, kills + hits
                    if differing:
                        wrong.append(differing)
                        print(f"{name}, {processes} at once: {differing}", file=sys.stderr)
                failures += len(wrong)
                row = (name, processes, f"{seconds:.1f}", trials, kills, len(wrong))
                table.add_row(*map(str, row))
                print(*row, file=sys.stderr)
    Console().print(table)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
