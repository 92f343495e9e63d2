"""What can be refused before any work is done, found in one place and as fast as it can be.

`check` looks at the settings alone; this at what is around them: files, devices, packages, lm-eval's tasks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamic_transformers.accelerate_environment import check_accelerate_environment
from dynamic_transformers.evaluation.suites import EMBEDDED_PREFIX
from dynamic_transformers.evaluation.task_index import check_tasks
from dynamic_transformers.folders import check_target
from dynamic_transformers.manifest import MANIFEST
from dynamic_transformers.settings import ModelSettings, Settings, UserError


def preflight(settings: Settings, runs: Sequence[Settings] = (), here: bool = True) -> None:
    """Refuse what training, or a later step, would refuse.

    Args:
        settings: of one run, or of a study.
        runs: those of the study's runs.
        here: whether the work is done by this machine, with its folders, packages and devices.

    Raises:
        UserError: names the setting, and what would be right.
    """
    if not runs:
        check_standard(settings.model)
        check_plugin_is_used(settings)
    if here:
        check_accelerate_environment(settings)
        check_packages(settings)
        check_resume(settings)
        check_places(settings)
    check_evaluation(settings)
    if here:
        for run in runs or [settings]:
            check_device(run)
            check_code(run.model)


def check_plugin_is_used(settings: Settings) -> None:
    """Refuse a plugin beside the model of another architecture, but for a variant of a study."""
    model = settings.model
    if model.plugin and not model.uses_plugin and not settings.study.variant:
        raise UserError(
            f"model.plugin={next(iter(model.plugin))} and model.type={model.type}: give the type that the "
            "plugin's record names"
        )


def check_code(model: ModelSettings) -> None:
    """Refuse a plugin whose model cannot be imported, or is of another `model_type` than its record says.

    Raises:
        UserError: says what is wrong.
    """
    record = model.architecture
    if not model.uses_plugin:
        return
    try:
        found, _ = record.config_class.model_type, record.model_class
    except Exception as error:  # whatever the file does
        raise UserError(f"model.plugin: {record.module}.py: {type(error).__name__}: {error}") from error
    if found != record.model_type:
        raise UserError(
            f"model.plugin: {record.module}.py: model_type {found!r}, the record says {record.model_type!r}"
        )


def check_standard(model: ModelSettings) -> None:
    """Refuse settings of routing for a model that routes nothing."""
    defaults = ModelSettings()
    for name in ("capacity", "selection_rule", "training_rule", "predictor_weight"):
        value = getattr(model, name)
        if not model.architecture.routed and value != getattr(defaults, name):
            raise UserError(
                f"model.{name}={value}: a {model.type} model routes nothing; leave it out, or give "
                "another model.type"
            )


def check_packages(settings: Settings) -> None:
    """Refuse tracking by a package that is not installed."""
    if settings.tracking.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "tracking.wandb=true: wandb is not installed; pip install 'dynamic-transformers[wandb]', "
            "or leave it at false"
        )


def check_resume(settings: Settings) -> None:
    """Refuse to go on from what is no checkpoint."""
    resume = settings.training.resume
    if resume in ("auto", "none"):
        return
    if not Path(resume).is_dir():
        raise UserError(
            f"training.resume={resume}: no such folder; give auto, none, or a checkpoint such as "
            f"{settings.run_dir}/checkpoints/step-00000100"
        )
    from dynamic_transformers.training.checkpoint import STATE

    if not (Path(resume) / STATE).is_file():
        raise UserError(f"training.resume={resume}: not a checkpoint (no {STATE})")


def check_places(settings: Settings) -> None:
    """Refuse folders that cannot be made or written; leaves nothing behind.

    Finished data may lie where nobody may write.
    """
    check_writable("run.output_dir", settings.run_dir)
    check_target(settings.run_dir.resolve())
    data = settings.data.output_dir
    if data and not os.path.isfile(f"{data}/{MANIFEST}"):  # noqa: PTH113  pathlib raises where a name is too long
        check_writable("data.output_dir", Path(data))


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder in which, or in the nearest one above it that exists, nothing can be made."""
    place = folder
    try:
        while not place.exists():
            if place.is_symlink():
                raise UserError(f"{key}: {place} is a link that leads nowhere")
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{key}: {place} is a file, not a folder")
        with tempfile.TemporaryDirectory(dir=place, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written ({place}: {error.strerror})") from error


def check_evaluation(settings: Settings) -> None:
    """Refuse tasks that do not exist, and those that run a model's code without consent."""
    options = settings.evaluation
    check_tasks(options.tasks, options.confirm_run_unsafe_code, options.own_tasks)
    sources = [source.name for source in settings.data.dataset_configs]
    for name in options.tasks:
        source = name.removeprefix(f"{EMBEDDED_PREFIX}perplexity_")
        if source != name and source not in sources:
            raise UserError(f"evaluation.tasks: {name} is of no source; there are {', '.join(sources)}")


def check_device(settings: Settings) -> None:
    """Refuse CUDA where there is none, and `system.compile` where it cannot work."""
    reason = settings.model.architecture.why_not_compiled(settings.model)
    if settings.system.compile and reason:
        raise UserError(f"system.compile=true: {reason}")
    if settings.system.compile and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("system.compile=true: needs g++ or clang++, and finds neither; leave it at false")
    if settings.system.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("system.device=cuda: no CUDA device is available; use system.device=cpu or auto")
