"""The folder of a training run: what a command means for it, found out before anything there changes."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamic_transformers.folders import make_folder, set_aside, write_whole
from dynamic_transformers.manifest import MANIFEST, read_manifest, write_json
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import METRICS, forget_after, replace_run
from dynamic_transformers.training.budget import Budget
from dynamic_transformers.training.checkpoint import Checkpoint, checkpoints, newest_whole, read_checkpoint

logger = logging.getLogger("dynamic_transformers")

CONFIG = "config.yaml"
IDENTITY = "identity.json"
# Settings of `training` that change no number of a run; the batch is in `global_batch`.
FREE = (
    "max_steps",
    "max_tokens",
    "max_flops",
    "gradient_accumulation_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "max_skipped_steps",
    "resume",
    "reschedule",
    "gradient_checkpointing",
)


def run_identity(settings: Settings, data_dir: Path, processes: int = 1) -> dict[str, Any]:
    """The settings that decide a run's numbers, by key; with the budget, what a finished run depends on.

    Args:
        processes: that train it, over all nodes; how the batch is split over them does not count.
    """
    values = settings.to_dict()
    training = values["training"]
    return {
        **flat({"model": values["model"]}),
        **flat({"training": {key: value for key, value in training.items() if key not in FREE}}),
        "run.seed": settings.run.seed,
        "system.precision": settings.system.precision,
        "global_batch": settings.data.batch_size * training["gradient_accumulation_steps"] * processes,
        "data_digest": read_manifest(data_dir, "prepare_data")["content_digest"],
    }


def training_config(settings: Settings, data_dir: Path, processes: int = 1) -> dict[str, Any]:
    """What a finished run depends on, without places and names: its identity and its budget."""
    budget = Budget.from_settings(settings.training)
    return run_identity(settings, data_dir, processes) | {"budget": dataclasses.asdict(budget)}


@dataclass
class Start:
    """What a command does to a run folder.

    Attributes:
        checkpoint: to go on from; None: from the beginning.
        aside: the run that stands there is renamed first.
        copies: with `aside`: the new run takes over the checkpoint and the lines before it.
        line: that a person is told.
    """

    checkpoint: Checkpoint | None = None
    aside: bool = False
    copies: bool = False
    line: str = ""


def plan_start(run_dir: Path, identity: dict[str, Any], settings: Settings, force: bool) -> Start:
    """Decide what a command means for `run_dir`, and change nothing.

    Raises:
        UserError: the folder is no run's; its run has other settings, which the line names, or is finished;
            the checkpoint to go on from is none, damaged, or of other settings.
    """
    resume = settings.training.resume
    given = None if resume in ("auto", "none") else read_checkpoint(Path(resume))
    if given is not None:
        refuse_differences(given.folder, given.identity, identity)
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return Start(given)
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir}: holds something else than a run; choose another run.name")
    if force or resume == "none":
        return Start(given, aside=True)
    if not (run_dir / IDENTITY).is_file():
        raise UserError(f"{run_dir}: holds a run of an older version; choose another run.name, or --force")
    refuse_differences(run_dir, json.loads((run_dir / IDENTITY).read_text(encoding="utf-8")), identity)
    done = (run_dir / MANIFEST).is_file()
    if given is not None:
        own = given.folder.resolve().parent == (run_dir / "checkpoints").resolve()
        if own and given.folder.name == checkpoints(run_dir)[-1].name and not done:
            return Start(given, line=f"going on from {given.folder}")
        if done:
            raise UserError(f"{run_dir}: holds a finished run; choose another run.name, or --force")
        return Start(given, aside=True, copies=own)
    newest = newest_whole(run_dir)
    if done:
        return extended(run_dir, newest, settings)
    if newest is None:
        return Start(line=f"{run_dir} holds no checkpoint yet: beginning anew")
    return Start(newest, line=f"going on from {newest.folder}")


def extended(run_dir: Path, newest: Checkpoint | None, settings: Settings) -> Start:
    """A finished run, of the same identity, goes on to a larger budget.

    Raises:
        UserError: the budget is not larger, or in another unit; its checkpoints are gone; it would go on
            without a learning rate.
    """
    old, new = (
        Budget(**read_manifest(run_dir, "train")["config"]["budget"]),
        Budget.from_settings(settings.training),
    )
    if (old.unit, old.limit) > (new.unit, new.limit) or old.unit != new.unit:
        raise UserError(
            f"{run_dir}: holds a finished run of {old.limit:g} {old.unit}, which a budget of {new.limit:g} "
            f"{new.unit} does not extend; choose another run.name, or --force"
        )
    if newest is None:
        raise UserError(f"{run_dir}: holds a finished run without checkpoints; --force begins anew")
    if not (settings.training.reschedule or settings.training.optimizer.min_lr_fraction):
        raise UserError(
            f"{run_dir}: its learning rate has ended at 0 with its {old.limit:g} {old.unit}; "
            "training.reschedule=true takes that of a schedule over the new budget"
        )
    return Start(newest, line=f"extending the finished run from {newest.folder}")


def refuse_differences(place: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to go on with other settings.

    Raises:
        UserError: names each that differs, with both values.
    """
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys:
        listed = ", ".join(f"{key} ({old.get(key)} there, {new.get(key)} now)" for key in keys)
        raise UserError(
            f"{place}: made with other settings: {listed}; choose another run.name, or --force, which moves "
            "the old run aside"
        )


def claim(run_dir: Path, start: Start, identity: dict[str, Any], settings: Settings) -> None:
    """Carry `start` out. Nothing is deleted: a run that does not go on is renamed.

    Of a run that goes on, the lines after its checkpoint are dropped, since they come again.
    """
    if start.aside:
        aside = set_aside(run_dir)
        logger.info("the run that was in %s is now in %s", run_dir, aside)
        if start.copies:
            assert start.checkpoint is not None
            shutil.copytree(
                aside / "checkpoints" / start.checkpoint.folder.name,
                run_dir / "checkpoints" / start.checkpoint.folder.name,
            )
            shutil.copy(aside / METRICS, run_dir / METRICS)
    make_folder(run_dir)
    if start.aside:
        replace_run(aside, run_dir)
    for folder in (run_dir, run_dir / "checkpoints"):
        remove_leftovers(folder)
    (run_dir / MANIFEST).unlink(missing_ok=True)
    forget_after(run_dir, start.checkpoint.progress.step if start.checkpoint else 0)
    write_whole(run_dir / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True))
    write_json(run_dir / IDENTITY, identity)
    if start.line:
        logger.info("train: %s", start.line)


def remove_leftovers(folder: Path) -> None:
    """Remove what a writer that was killed left half-made in `folder`."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") and ".new-" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_a_full_disk(run_dir: Path, parameters: int) -> None:
    """Refuse to start where two checkpoints do not fit: weights and AdamW's two moments in fp32, twice.

    Raises:
        UserError: names what is free and what is needed.
    """
    place = run_dir
    while not place.exists():
        place = place.parent
    needed, free = 2 * 3 * 4 * parameters, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{run_dir}: {free / 1e9:.1f} GB are free there, two checkpoints need {needed / 1e9:.1f} GB"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c`, JSON-able."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result
