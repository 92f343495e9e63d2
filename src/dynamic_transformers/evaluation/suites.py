"""Suites of lm-eval tasks, and the embedded tasks that need no network.

The hub suites hold only tasks whose data set, as far as public threads tell, is published as plain files,
since `datasets` no longer runs loading scripts. Sources: lm-evaluation-harness issue 3171 and pull request
3943 (`regisss/math_qa`), brevitas pull request 1624 (`Rowan/hellaswag`). The tests check that the pinned
lm-eval has every task and reads it from the data set named here; the data sets themselves were not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynamic_transformers.settings import UserError

if TYPE_CHECKING:
    from datasets import Dataset

QUICK_TEST = "quick_test"
EMBEDDED_PREFIX = "dt_"
TEMPLATES = Path(__file__).parent / "tasks"

# suite → task → hub data set that the task reads. `quick_test` is made from the data folder: embedded_tasks.
# minerva_math is left out: it needs antlr4 4.11, and omegaconf needs 4.9.
SUITES: dict[str, dict[str, str]] = {
    QUICK_TEST: {},
    "general": {
        "arc_easy": "allenai/ai2_arc",
        "arc_challenge": "allenai/ai2_arc",
        "hellaswag": "Rowan/hellaswag",
        "winogrande": "allenai/winogrande",
        "piqa": "baber/piqa",
        "boolq": "aps/super_glue",
        "openbookqa": "allenai/openbookqa",
        "sciq": "allenai/sciq",
        "lambada_openai": "EleutherAI/lambada_openai",
    },
    "math": {
        "gsm8k": "openai/gsm8k",
        "hendrycks_math500": "HuggingFaceH4/MATH-500",
        "mathqa": "regisss/math_qa",
    },
    "code": {
        "humaneval": "openai/openai_humaneval",
        "mbpp": "google-research-datasets/mbpp",
    },
}


def embedded_tasks(data_dir: Path) -> dict[str, dict[str, Any]]:
    """lm-eval configurations, by task name, of the task files in a data folder.

    Raises:
        UserError: the folder has no task files.
    """
    folder = Path(data_dir).resolve() / "tasks"
    tasks = {}
    for path in sorted(folder.glob("*.jsonl")):
        template = template_of(path.stem)
        if template.is_file():
            config = yaml.safe_load(template.read_text())
            name = f"{EMBEDDED_PREFIX}{path.stem}"
            tasks[name] = {"task": name, **config, "custom_dataset": partial(_read_rows, path)}
    if not tasks:
        raise UserError(f"{folder}: no task files; --data_dir must be a folder that prepare_data wrote")
    return tasks


def template_of(stem: str) -> Path:
    """File of lm-eval settings for the embedded task file `stem`.jsonl; it exists if there is such a task."""
    return TEMPLATES / f"{stem.partition('_')[0]}.yaml"


def _read_rows(path: Path, **_: Any) -> dict[str, Dataset]:
    """The split `test`. Read here, since `datasets` takes a path for a pattern or an address."""
    from datasets import Dataset

    with path.open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def needs_data_folder(tasks: Sequence[str]) -> bool:
    """Whether any of these names is an embedded task or the suite of them."""
    return any(name == QUICK_TEST or name.startswith(EMBEDDED_PREFIX) for name in tasks)


def expand_tasks(tasks: Sequence[str], data_dir: Path | None) -> dict[str, str | dict[str, Any]]:
    """Resolve suites into tasks, in order and each once.

    Args:
        tasks: suites, embedded tasks, or names that lm-eval may know (not checked here).
        data_dir: the data folder; only the embedded tasks need it.

    Returns:
        Name → what lm-eval's TaskManager loads: the name itself, or the configuration of an embedded task.

    Raises:
        UserError: an embedded task without a data folder, or one that the folder does not have.
    """
    embedded: dict[str, dict[str, Any]] = {}
    if needs_data_folder(tasks):
        if data_dir is None:
            raise UserError(f"{', '.join(tasks)}: the embedded tasks need the data folder; give --data_dir")
        embedded = embedded_tasks(data_dir)
    specs: dict[str, str | dict[str, Any]] = {}
    for name in tasks:
        if name == QUICK_TEST:
            specs |= embedded
        elif name in SUITES:
            specs |= {task: task for task in SUITES[name]}
        elif not name.startswith(EMBEDDED_PREFIX):
            specs[name] = name
        elif name in embedded:
            specs[name] = embedded[name]
        else:
            raise UserError(f"no task {name!r} in {data_dir}; there are: {', '.join(embedded)}")
    if not specs:
        raise UserError(f"no tasks given; suites: {', '.join(SUITES)}")
    return specs
