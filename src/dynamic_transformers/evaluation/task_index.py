"""Whether tasks exist and which of them run code: needs the index of lm-eval, no torch, model or data."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynamic_transformers.evaluation.suites import EMBEDDED_PREFIX, QUICK_TEST, SUITES, template_of
from dynamic_transformers.manifest import file_digest
from dynamic_transformers.settings import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger("dynamic_transformers")


@functools.cache
def task_manager(include_defaults: bool, task_dir: Path | None = None) -> TaskManager:
    """lm-eval's index of its own tasks, or of none, and of the task files in a folder.

    Reading lm-eval's thousands of files takes seconds.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults, include_path=task_dir)


def manager_of(names: Sequence[str], task_dir: Path | None) -> TaskManager:
    """An index that has these names, if any has; lm-eval's own tasks are read only if they may be needed."""
    own = task_manager(include_defaults=False, task_dir=task_dir)
    if set(names) <= set(own.all_subtasks):
        return own
    return task_manager(include_defaults=True, task_dir=task_dir)  # a group may hold tasks of lm-eval


def check_tasks(tasks: Sequence[str], confirm_run_unsafe_code: bool, task_dir: Path | None = None) -> None:
    """Refuse tasks that cannot be meant, before anything costs time; no data folder is needed.

    Raises:
        UserError: no task, one that neither we nor lm-eval nor `task_dir` know, one that runs code without
            consent, or as `check_task_dir`.
    """
    if not tasks:
        raise UserError(f"no tasks given; suites: {', '.join(SUITES)}")
    if task_dir is not None:
        check_task_dir(task_dir)
    names: list[str] = []
    for name in tasks:
        if name.startswith(EMBEDDED_PREFIX):
            _check_embedded(name)
        elif name != QUICK_TEST:
            names += SUITES.get(name, [name])
    unsafe = [name for name in names if name in SUITES["code"]]
    # A test compares the suites with lm-eval, so that only other names cost the seconds of reading its index.
    others = [name for name in names if not any(name in suite for suite in SUITES.values())]
    if others:
        unsafe += _unsafe_of_index(others, task_dir)
    if unsafe and not confirm_run_unsafe_code:
        raise UserError(
            f"{', '.join(dict.fromkeys(unsafe))}: runs code that the model writes; "
            "consent with --confirm_run_unsafe_code (evaluation.confirm_run_unsafe_code=true)"
        )


def check_task_dir(task_dir: Path) -> None:
    """Refuse a folder that gives no tasks, or one whose names are taken.

    Raises:
        UserError: no such folder, a file that is no YAML, no task in any, or a name of ours.
    """
    if not task_dir.is_dir():
        raise UserError(f"task_dir {task_dir}: no such folder")
    for file in sorted(task_dir.rglob("*.yaml")):  # lm-eval passes over what it cannot read
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: no YAML: {' '.join(str(error).split())}") from error
    try:
        names = task_manager(include_defaults=False, task_dir=task_dir).all_tasks
    except ModuleNotFoundError:  # only the images that evaluate have it
        return
    if not names:
        raise UserError(
            f"task_dir {task_dir}: no task in it; a task is a file *.yaml with a line `task: NAME`"
        )
    for name in names:
        if name in SUITES or name.startswith(EMBEDDED_PREFIX):
            raise UserError(
                f"task_dir {task_dir}: {name!r} is a name of ours; a task of your own must not be called "
                f"{', '.join(SUITES)} or {EMBEDDED_PREFIX}..."
            )


def task_files(task_dir: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder of tasks, by its path there: other tasks give other figures."""
    files = [path for path in task_dir.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(task_dir)): file_digest(path) for path in sorted(files)}


def _check_embedded(name: str) -> None:
    if not template_of(name.removeprefix(EMBEDDED_PREFIX)).is_file():
        raise UserError(f"no task {name!r}; embedded ones are dt_perplexity_SOURCE, dt_cloze, dt_arithmetic")


def _unsafe_of_index(names: Sequence[str], task_dir: Path | None) -> list[str]:
    try:
        manager = manager_of(names, task_dir)
    except ModuleNotFoundError:  # only the images that evaluate have it
        logger.warning("%s: not checked, since lm-eval is not installed here", ", ".join(names))
        return []
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown_task(name, manager.all_tasks, task_dir))
    return _unsafe_tasks(names, manager)


def _unknown_task(name: str, known: Sequence[str], task_dir: Path | None) -> str:
    near = difflib.get_close_matches(name, [*SUITES, *known], n=5)
    hint = f"did you mean {', '.join(near)}?" if near else f"suites are {', '.join(SUITES)}"
    own = f", and none in {task_dir}" if task_dir else ""
    return f"no suite or lm-eval task {name!r}{own}; {hint}"


def _unsafe_tasks(names: Sequence[str], manager: TaskManager) -> list[str]:
    """Tasks among `names`, or inside their groups and tags, that run code which a model wrote.

    Read from the index, because loading such a task already runs code.
    """
    unsafe = []
    pending: list[Any] = list(names)
    while pending:
        item = pending.pop(0)
        if isinstance(item, dict):  # a member of a group, with overrides
            pending.extend(
                item["task"] if isinstance(item.get("task"), list) else [item.get("task", item.get("group"))]
            )
        elif entry := manager.task_index.get(item):
            config = entry.cfg or {}
            if config.get("unsafe_code"):
                unsafe.append(item)
            if isinstance(config.get("task"), list):
                pending.extend(config["task"])
            elif not config:
                pending.extend(sorted(entry.tags))
    return unsafe
