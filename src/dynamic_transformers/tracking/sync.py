"""`dynamic-transformers sync`: what a server has missed of runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.folders import sole_writer
from dynamic_transformers.manifest import MANIFEST
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking.record import FINISHED, KILLED, METRICS, RUNNING, is_sent, read_record
from dynamic_transformers.tracking.store import store_name, tracking_uri
from dynamic_transformers.tracking.tracker import RunTracker, description

CONFIG = "config.yaml"


def add_sync_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sync`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")


def sync_command(args: argparse.Namespace) -> None:
    """`sync`: send to MLflow what it has not got of these runs.

    Raises:
        UserError: a folder is no run, or is being written; not everything has arrived.
    """
    missing = [str(run_dir) for run_dir in args.runs if not sync(run_dir)]
    if missing:
        raise UserError(f"not everything was sent of: {', '.join(missing)}")


def sync(run_dir: Path) -> bool:
    """Send what MLflow has not got of a run that nobody trains now; whether all has arrived.

    A run that was killed is marked so. Where tracking was off it is sent all the same.

    Raises:
        UserError: the folder is no run, or another process writes there.
    """
    for name in (CONFIG, METRICS):
        if not (run_dir / name).is_file():
            raise UserError(f"{run_dir}: no run that has begun (it has no {name})")
    settings = trained_settings(run_dir)
    settings.tracking.mlflow, settings.tracking.wandb = True, False
    # Not as config.yaml says: the output folder may have been moved, with the run in it.
    settings.run.output_dir = str(run_dir.resolve().parents[len(Path(settings.run.name).parts) - 1])
    print(f"{run_dir} → {store_name(tracking_uri(settings.tracking, settings.run.output_dir))}")
    with sole_writer(run_dir):
        return send_rest(settings, run_dir)


def send_rest(settings: Settings, run_dir: Path) -> bool:
    """The same, by the owner of the run folder; as quick as a look at two files where nothing is missing."""
    if not settings.tracking.mlflow:
        return True
    store = store_name(tracking_uri(settings.tracking, settings.run.output_dir))
    if (record := read_record(run_dir)) and is_sent(record, run_dir, store):
        return True
    ended = FINISHED if (run_dir / MANIFEST).is_file() else KILLED
    tracker = reopened(settings, run_dir)
    return tracker.close(ended if tracker.file.record.status == RUNNING else None)


def reopened(settings: Settings, run_dir: Path) -> RunTracker:
    """The tracker of a run that an earlier step has trained, and may not have tracked."""
    told = {}
    if settings.tracking.mlflow and not ((record := read_record(run_dir)) and record.name):
        told = description(trained_settings(run_dir))
    return RunTracker(run_dir, settings.tracking, settings.run.output_dir, **told, trained=True)


def trained_settings(run_dir: Path) -> Settings:
    """With which a run was trained."""
    return settings_from_dict(yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8")))
