"""`dynamic-transformers task-texts`: the texts of benchmark tasks, for `data.decontaminate`."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dynamic_transformers.command_line import flag_of, names, path
from dynamic_transformers.evaluation.results import refuse_unwritable
from dynamic_transformers.evaluation.task_index import check_tasks
from dynamic_transformers.folders import make_folder, write_whole
from dynamic_transformers.settings import EvaluationSettings, UserError


def add_task_texts_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dynamic-transformers task-texts`."""
    parser.add_argument(
        "--tasks",
        type=names,
        required=True,
        help="suites (quick_test, general, math, code) and lm-eval tasks, by commas",
    )
    parser.add_argument("--output_path", type=path, required=True, help="file that gets the texts")
    parser.add_argument("--task_dir", type=path, help="folder of lm-eval task files of your own")
    parser.add_argument("--data_dir", type=path, help="data folder of quick_test")
    parser.add_argument(
        "--limit", type=flag_of(EvaluationSettings, "limit"), help="documents per task (default: all)"
    )


def task_texts_command(args: argparse.Namespace) -> None:
    """Write a line for each question with each of its answers, and say how many of which task."""
    check_tasks(args.tasks, True, args.task_dir)
    if args.output_path.is_dir():
        raise UserError(f"{args.output_path}: is a folder; name a file with --output_path")
    make_folder(args.output_path.parent)
    refuse_unwritable(args.output_path)
    lines = []
    for name, documents in task_documents(args.tasks, args.data_dir, args.task_dir, args.limit):
        before = len(lines)
        lines += [
            json.dumps({"task": name, "text": text}, ensure_ascii=False) + "\n"
            for texts in documents
            for text in texts
        ]
        print(f"{name}: {len(lines) - before} texts")
    write_whole(args.output_path, "".join(lines))
    print(f"written: {args.output_path}")


def task_documents(
    tasks: Sequence[str], data_dir: Path | None, task_dir: Path | None, limit: int | None
) -> Iterator[tuple[str, Iterator[list[str]]]]:
    """Each task with the texts of each document that it is evaluated on.

    Args:
        tasks, data_dir, task_dir: as of `run_benchmarks`.
        limit: documents of each task; None: all.

    Raises:
        UserError: lm-eval is missing, no such task or data folder, or a task whose data cannot be had.
    """
    from dynamic_transformers.evaluation.exported import log_level
    from dynamic_transformers.evaluation.harness import load_tasks
    from dynamic_transformers.evaluation.suites import expand_tasks

    specs = expand_tasks(tasks, data_dir)
    with log_level("lm_eval", logging.WARNING):
        # Consent is not asked for: there is no model whose code a task could run.
        manager, loaded = load_tasks(specs, True, task_dir)
        for name, task in manager.load(loaded)["tasks"].items():
            yield name, (texts_of(task, document) for document in islice(task.eval_docs, limit))


def texts_of(task: Any, document: Any) -> list[str]:
    """The question with each of its answers, right and wrong, as lm-eval gives them to a model."""
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    delimiter = task.config.target_delimiter
    choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else []
    if isinstance(question, int):  # the number of the right beginning: each choice is one, the target follows
        return [f"{choice}{delimiter}{target}" for choice in choices]
    answers = choices or (target if isinstance(target, list) else [target])
    return [f"{question}{delimiter}{answer}" for answer in answers]
