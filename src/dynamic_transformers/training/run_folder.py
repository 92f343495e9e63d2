"""The folder of a training run: what a command means for it, found out before anything there changes."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamic_transformers.folders import check_target, new_sibling, put_in_place, replace, write_whole
from dynamic_transformers.manifest import MANIFEST, read_manifest, write_json
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import METRICS, forget_after, replace_run
from dynamic_transformers.training.budget import Budget
from dynamic_transformers.training.checkpoint import (
    STATE,
    Checkpoint,
    checkpoints,
    newest_whole,
    read_checkpoint,
)
from dynamic_transformers.training.identity import settings_identity

logger = logging.getLogger("dynamic_transformers")

CONFIG = "config.yaml"
IDENTITY = "identity.json"


def run_identity(settings: Settings, data_dir: Path, processes: int = 1) -> dict[str, Any]:
    """The settings and data that decide a run's numbers; with the budget, what a finished run depends on."""
    data_digest = read_manifest(data_dir, "prepare_data")["content_digest"]
    return settings_identity(settings, processes) | {"data_digest": data_digest}


def training_config(identity: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What a finished run depends on, without places and names: its identity and its budget."""
    return identity | {"budget": dataclasses.asdict(Budget.from_settings(settings.training))}


@dataclass
class Start:
    """What a command does to a run folder.

    Attributes:
        checkpoint: to go on from; None: from the beginning.
        aside: the run that stands there is renamed first.
        copies: with `aside`: the new run takes over the checkpoint and the lines before it.
        source: the checkpoint that the run was told to begin from, if any.
        line: that a person is told.
    """

    checkpoint: Checkpoint | None = None
    aside: bool = False
    copies: bool = False
    source: str | None = None
    line: str = ""


def plan_start(run_dir: Path, identity: dict[str, Any], settings: Settings, force: bool) -> Start:
    """Decide what a command means for `run_dir`, and change nothing.

    Raises:
        UserError: the folder is no run's; its run has other settings, which the line names, or is finished;
            the checkpoint to go on from is none, damaged, of other settings, or beyond the budget.
    """
    check_target(run_dir)
    start = find_start(run_dir, identity, settings, force)
    if start.checkpoint is not None:
        refuse_an_unfit_budget(start.checkpoint, settings)
    return start


def find_start(run_dir: Path, identity: dict[str, Any], settings: Settings, force: bool) -> Start:
    """The same, whatever the budget is."""
    resume = settings.training.resume
    given, source = None, None
    if resume not in ("auto", "none"):
        given, source = read_checkpoint(Path(resume)), str(Path(resume).resolve())
        refuse_differences(given.folder, given.identity, identity)
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return Start(given, source=source)
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir}: holds something else than a run; choose another run.name")
    own = source in [str(folder.resolve()) for folder in checkpoints(run_dir)]
    if force or resume == "none":
        return Start(given, aside=True, copies=own, source=source)
    old = read_identity(run_dir)
    refuse_differences(run_dir, old["identity"], identity)
    done = (run_dir / MANIFEST).is_file()
    newest = newest_whole(run_dir)
    if given is None or source == old["source"]:
        if newest is None:
            return Start(given, source=source, line=f"{run_dir} holds no checkpoint yet: beginning anew")
        return Start(newest, source=old["source"], line=f"going on from {newest.folder}")
    if done:
        raise UserError(f"{run_dir}: holds a finished run; choose another run.name, or --force")
    if own and newest is not None and newest.folder.resolve() == given.folder.resolve():
        return Start(given, source=old["source"], line=f"going on from {given.folder}")
    return Start(given, aside=True, copies=own, source=source)


def refuse_an_unfit_budget(checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse a budget that the checkpoint is beyond, or for which its schedule has no learning rate.

    Raises:
        UserError: says which, and what would be right.
    """
    training, done, schedule = settings.training, checkpoint.progress, checkpoint.schedule
    budget = Budget.from_settings(training)
    spent = getattr(done, budget.unit)
    if spent > budget.limit + spent / max(1, done.step) / 2:  # a run may end half a step after its limit
        raise UserError(
            f"{checkpoint.folder}: has done {Budget(budget.unit, spent)}, more than the budget of {budget}; "
            "choose another run.name, or --force"
        )
    longer = budget.unit != schedule.unit or budget.limit > schedule.limit
    if longer and not training.reschedule and not training.optimizer.min_lr_fraction:
        raise UserError(
            f"{checkpoint.folder}: its learning rate ends at 0 after {schedule}; training.reschedule=true "
            f"stretches its schedules over the {budget} asked for"
        )


def read_identity(run_dir: Path) -> dict[str, Any]:
    """What `claim` has written of a run: its `identity`, and the `source` that it was told to begin from.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = run_dir / IDENTITY
    if not path.is_file():
        raise UserError(
            f"{run_dir}: its {IDENTITY} is missing, so what its run was made with is not known; choose "
            "another run.name, or --force, which moves the old run aside"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": dict(values["identity"]), "source": values["source"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged; --force begins anew") from error


def content_to_go_on_with(settings: Settings, force: bool) -> str | None:
    """Digest of the data of the run that a command goes on with; None: it begins anew, or cannot be read."""
    resume = settings.training.resume
    if force or resume == "none":
        return None
    file = settings.run_dir / IDENTITY if resume == "auto" else Path(resume) / STATE
    try:
        return json.loads(file.read_text(encoding="utf-8"))["identity"]["data_digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # told when the run's folder is looked at


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
    """Carry `start` out. Nothing is deleted: a run that does not go on is renamed, a damaged checkpoint too.

    A new run's folder is filled before it gets its name, so that a kill leaves a run or nothing. Of a run
    that goes on, the lines after its checkpoint are dropped, since they come again.
    """
    step, evaluated = 0, True
    if start.checkpoint is not None:
        step = start.checkpoint.progress.step
        evaluated = start.checkpoint.progress.evaluation.get("step") == step
    if start.aside or not run_dir.exists():
        new = new_sibling(run_dir)
        if start.aside:
            fill_from_the_old(new, run_dir, start)
        write_claim(new, start, identity, settings)
        forget_after(new, step, evaluated)
        if start.aside:
            logger.info("the run that was in %s is now in %s", run_dir, replace(new, run_dir))
        else:
            put_in_place(new, run_dir)
    else:
        remove_leftovers(run_dir)
        remove_leftovers(run_dir / "checkpoints")
        for later in checkpoints(run_dir):
            if int(later.name.removeprefix("step-")) > step:  # damaged, else it would be gone on from
                later.rename(later.with_name(f"{later.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"))
        (run_dir / MANIFEST).unlink(missing_ok=True)
        forget_after(run_dir, step, evaluated)
        write_claim(run_dir, start, identity, settings)
    if start.line:
        logger.info("train: %s", start.line)


def fill_from_the_old(new: Path, run_dir: Path, start: Start) -> None:
    """Give a new run's folder what it takes over from the one that it replaces."""
    replace_run(run_dir, new)
    if start.copies:
        assert start.checkpoint is not None
        name = start.checkpoint.folder.name
        shutil.copytree(start.checkpoint.folder, new / "checkpoints" / name)
        if (run_dir / METRICS).is_file():
            shutil.copy(run_dir / METRICS, new / METRICS)


def write_claim(folder: Path, start: Start, identity: dict[str, Any], settings: Settings) -> None:
    """Write down what the run is."""
    write_json(folder / IDENTITY, {"identity": identity, "source": start.source})
    write_whole(folder / CONFIG, yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True))


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
            f"{run_dir}: {free / 1e6:,.0f} MB are free there, two checkpoints need {needed / 1e6:,.0f} MB"
        )
