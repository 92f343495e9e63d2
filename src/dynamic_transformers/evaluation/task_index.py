"""Whether tasks exist and which of them run code: needs the index of lm-eval, no torch, model or data."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dynamic_transformers.evaluation.suites import EMBEDDED_PREFIX, QUICK_TEST, SUITES, template_of
from dynamic_transformers.settings import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger("dynamic_transformers")


@functools.cache
def task_manager(include_defaults: bool) -> TaskManager:
    """lm-eval's index of its own tasks, or an empty one: reading thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def check_tasks(tasks: Sequence[str], confirm_run_unsafe_code: bool) -> None:
    """Refuse tasks that cannot be meant, before anything costs time; no data folder is needed.

    Raises:
        UserError: no task, one that neither we nor lm-eval know, or one that runs code without consent.
    """
    if not tasks:
        raise UserError(f"no tasks given; suites: {', '.join(SUITES)}")
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
        unsafe += _unsafe_of_index(others)
    if unsafe and not confirm_run_unsafe_code:
        raise UserError(
            f"{', '.join(dict.fromkeys(unsafe))}: runs code that the model writes; "
            "consent with --confirm_run_unsafe_code (evaluation.confirm_run_unsafe_code=true)"
        )


def _check_embedded(name: str) -> None:
    if not template_of(name.removeprefix(EMBEDDED_PREFIX)).is_file():
        raise UserError(f"no task {name!r}; embedded ones are dt_perplexity_SOURCE, dt_cloze, dt_arithmetic")


def _unsafe_of_index(names: Sequence[str]) -> list[str]:
    try:
        manager = task_manager(include_defaults=True)
    except ModuleNotFoundError:  # only the images that evaluate have it
        logger.warning("%s: not checked, since lm-eval is not installed here", ", ".join(names))
        return []
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown_task(name, manager.all_tasks))
    return _unsafe_tasks(names, manager)


def _unknown_task(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, [*SUITES, *known], n=5)
    hint = f"did you mean {', '.join(near)}?" if near else f"suites are {', '.join(SUITES)}"
    return f"no suite or lm-eval task {name!r}; {hint}"


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
