"""lm-eval on an exported model: task checks, one evaluation, and a table of the result."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from tqdm import tqdm
from transformers import Qwen2Config

from dynamic_transformers.evaluation.exported import load_config, load_model, log_level, tokenizer_of
from dynamic_transformers.evaluation.recalibration import refuse_an_unset_threshold
from dynamic_transformers.evaluation.suites import expand_tasks, needs_data_folder
from dynamic_transformers.evaluation.task_index import check_tasks, manager_of
from dynamic_transformers.manifest import MANIFEST, input_folder, read_manifest
from dynamic_transformers.refusals import reason_of
from dynamic_transformers.settings import UserError

logger = logging.getLogger("dynamic_transformers")

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NOT_INSTALLED = "lm-eval is not installed: pip install 'lm-eval[hf]'"
NON_CAUSAL_LABEL = "non-causal upper bound"
SHORTEST_CONTEXT = 128  # tokens; lm-eval refuses a choice that is longer than the context
BOOTSTRAP_ITERATIONS = 100  # lm-eval's 100 000 take minutes; means, our usual case, have a closed form


def run_benchmarks(
    model_dir: Path,
    tasks: list[str],
    *,
    data_dir: Path | None,
    batch_size: int,
    task_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    selection_rule: str | None = None,
    confirm_run_unsafe_code: bool = False,
    device: str = "cpu",
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Evaluate an exported model with lm-eval.

    Args:
        model_dir: a folder that `export` wrote.
        tasks: suites, lm-eval tasks, groups or tags.
        data_dir: data folder of the embedded tasks; None: the one that the model's manifest names.
        task_dir: folder of further task files, as lm-eval's `include_path`.
        limit: documents per task; None: all.
        num_fewshot: examples in front of each question; None: the task's own. Tasks that fix 0 keep it.
        selection_rule: replaces the routed model's own rule.
        confirm_run_unsafe_code: consent to run code that the model writes (humaneval, mbpp).
        dtype: of the model's weights, fp32 or bf16; likelihoods are computed in fp32.

    Returns:
        `{"results": lm-eval's results, "config": how they were made, "configs": the same by task, "realised":
        what was computed, by task}`, with the few-shot examples that lm-eval really gave. `config["causal"]`
        is False, and `config["label"]` says so, exactly when the selection rule looks at the future (`topk`).

    Raises:
        UserError: lm-eval is missing, no such model, task or data folder, no consent, an impossible
            selection rule, or a task whose data cannot be had.
    """
    config = load_config(model_dir)
    if selection_rule is not None:
        _check_selection_rule(config, selection_rule)
        refuse_an_unset_threshold(model_dir, selection_rule)
        config.selection_rule = selection_rule
    try:
        from lm_eval.evaluator import simple_evaluate

        from dynamic_transformers.evaluation.language_model import CountingLM
    except ModuleNotFoundError as error:
        raise UserError(NOT_INSTALLED) from error
    if data_dir is None and needs_data_folder(tasks):
        data_dir = _data_dir_of(model_dir)
    specs = expand_tasks(tasks, data_dir)
    with log_level("lm_eval", logging.WARNING), _bars_on_terminals_only():
        manager, loaded = load_tasks(specs, confirm_run_unsafe_code, task_dir)
        model = load_model(model_dir, config, device, dtype)
        # A pretrained model's own length would go before the task's.
        model.generation_config.max_new_tokens = None
        tokenizer = tokenizer_of(model_dir)
        # HFLM warns that it did not load the model itself, which is meant.
        with log_level("lm_eval.models.huggingface", logging.ERROR):
            context = max(model.config.max_position_embeddings, SHORTEST_CONTEXT)
            lm = CountingLM(model, tokenizer, batch_size, context)
        _check_room(manager.load(loaded)["tasks"], context, lm.max_gen_toks)
        output: Any = simple_evaluate(
            model=lm,
            tasks=loaded,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    rule = getattr(model.config, "selection_rule", None)
    causal = rule != "topk"
    results = json.loads(json.dumps(output["results"], default=float))  # numpy scalars become plain numbers
    shots = {task: output["n-shot"].get(task) for task in results}
    if num_fewshot is not None and (
        fixed := [task for task, n in shots.items() if n not in (None, num_fewshot)]
    ):
        logger.warning("%s: fixed at 0 examples; num_fewshot=%d is not used", ", ".join(fixed), num_fewshot)
    made = {
        "batch_size": batch_size,
        "limit": limit,
        "seed": seed,
        "dtype": dtype,
        "selection_rule": rule,
        "causal": causal,
        "label": None if causal else NON_CAUSAL_LABEL,
    }
    return {
        "results": results,
        "config": {"tasks": tasks, "num_fewshot": shots, **made},
        "configs": {task: {"num_fewshot": n, **made} for task, n in shots.items()},
        "realised": {
            task: json.loads(json.dumps(asdict(counts.realised(model.config))))  # layers become text
            for task, counts in lm.counts.items()
            if isinstance(model.config, Qwen2Config)
        },
    }


def render_table(result: dict[str, Any]) -> Table:
    """Table of task × metric with standard errors, from what `run_benchmarks` returns.

    And what was computed: of a routed model the mean fraction of tokens over its routed layers, with its
    standard deviation over rows.
    """
    table = Table("task", "metric", title=result["config"]["label"])
    table.add_column("value", justify="right")
    table.add_column("± stderr", justify="right")
    for task, entries in result["results"].items():
        for key, value in entries.items():
            metric, _, chosen_filter = key.partition(",")
            if not chosen_filter or metric.endswith("_stderr"):
                continue
            error = entries.get(f"{metric}_stderr,{chosen_filter}")
            table.add_row(
                task,
                metric if chosen_filter == "none" else f"{metric} ({chosen_filter})",
                f"{value:.4f}" if isinstance(value, float) else str(value),
                f"{error:.4f}" if isinstance(error, float) else "",
            )
        if realised := result["realised"].get(task):
            if fraction := realised["fraction"]:
                table.add_row(task, "tokens routed (sd)", f"{fraction['mean']:.4f} ({fraction['sd']:.4f})")
            table.add_row(task, "forward FLOPs per token", f"{realised['forward_flops_per_token']:.3e}")
    return table


def _check_room(tasks: Mapping[str, Any], context: int, usual: int) -> None:
    """Refuse tasks whose answers may be as long as the context: no question fits before them."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        longest = (task.config.generation_kwargs or {}).get("max_gen_toks", usual)
        if longest >= context:
            raise UserError(
                f"task {name!r}: its answers have up to {longest} tokens, the model's context {context}: "
                "leave it out, or train with a larger data.block_size"
            )


def _data_dir_of(model_dir: Path) -> Path | None:
    if not (model_dir / MANIFEST).is_file() or "data" not in read_manifest(model_dir)["inputs"]:
        return None
    return input_folder(model_dir, "data")


def _check_selection_rule(config: Any, rule: str) -> None:
    if not hasattr(config, "selection_rule"):
        raise UserError(f"--selection_rule={rule}: a {config.model_type} model routes nothing; leave it out")
    if rule not in config.available_rules:
        raise UserError(
            f"--selection_rule={rule}: this model was trained for {', '.join(config.available_rules)}"
        )


def load_tasks(
    specs: dict[str, str | dict[str, Any]], confirm_run_unsafe_code: bool, task_dir: Path | None
) -> tuple[TaskManager, list[Any]]:
    """The manager, and the tasks and groups of `specs` (`expand_tasks`), their data loaded.

    Raises:
        UserError: lm-eval is missing, as `check_tasks`, a task whose data cannot be had, or one beside a
            group that holds it.
    """
    check_tasks(list(specs), confirm_run_unsafe_code, task_dir)
    names = [name for name, spec in specs.items() if isinstance(spec, str)]
    try:
        manager = manager_of(names, task_dir)
    except ModuleNotFoundError as error:
        raise UserError(NOT_INSTALLED) from error
    if confirm_run_unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    loaded: list[Any] = []
    for name, spec in specs.items():
        try:
            with log_level("lm_eval.api.task", logging.ERROR if isinstance(spec, dict) else logging.WARNING):
                found = manager.load([spec])  # which warns that data of our own take no options
        except Exception as error:  # whatever a data set, a hub or a missing package brings up
            raise UserError(f"task {name!r} cannot be loaded: {reason_of(error)}") from error
        group = found.get("groups", {}).get(name)
        loaded += [group] if group else list(found["tasks"].values())
    try:
        manager.load(loaded)
    except ValueError as error:  # a task beside a group that holds it
        raise UserError(str(error)) from error
    return manager, loaded


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """lm-eval draws a progress bar per batch, into log files too, and has no option against it."""
    from lm_eval.api import model, task
    from lm_eval.models import huggingface

    def quiet(*args: Any, disable: bool = False, **options: Any) -> tqdm:
        return tqdm(*args, **options | {"disable": disable or None, "leave": False})

    modules: Sequence[Any] = (model, task, huggingface)
    before = [module.tqdm for module in modules]
    try:
        for module in modules:
            module.tqdm = quiet
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.tqdm = original
