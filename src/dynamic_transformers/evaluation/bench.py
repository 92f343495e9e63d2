"""The body of `bench.py` and of `dynamic-transformers bench`."""

from __future__ import annotations

import argparse

from dynamic_transformers.command_line import add_plugin_argument, flag_of, names, path
from dynamic_transformers.evaluation.results import add_results, identity, read_results, results_path
from dynamic_transformers.evaluation.task_index import check_tasks
from dynamic_transformers.settings import PRECISIONS, EvaluationSettings, RunSettings


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark command."""
    parser.add_argument("--model_path", type=path, required=True, help="folder of the exported model")
    parser.add_argument(
        "--tasks",
        type=names,
        default="quick_test",
        help="suites (quick_test, general, math, code) and lm-eval tasks, by commas (default: quick_test)",
    )
    parser.add_argument("--task_dir", type=path, help="folder of lm-eval task files of your own")
    parser.add_argument("--batch_size", type=flag_of(EvaluationSettings, "batch_size"), default=8)
    parser.add_argument("--data_dir", type=path, help="data folder of quick_test (default: the model's own)")
    parser.add_argument(
        "--limit", type=flag_of(EvaluationSettings, "limit"), help="documents per task (default: all)"
    )
    parser.add_argument(
        "--num_fewshot",
        type=flag_of(EvaluationSettings, "num_fewshot"),
        help="examples in front of each question (default: the task's)",
    )
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="of the model's weights (default: the precision in which the model was trained)",
    )
    parser.add_argument("--seed", type=flag_of(RunSettings, "seed"), default=0)
    parser.add_argument(
        "--selection_rule", help="replaces a routed model's rule; topk is a non-causal upper bound"
    )
    parser.add_argument(
        "--output_path",
        type=path,
        help="file that gets the results (default: results.json in the model's folder)",
    )
    parser.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="allow tasks that run code which the model writes",
    )
    add_plugin_argument(parser)


def bench_command(args: argparse.Namespace) -> None:
    """Run the benchmarks, print the table, add to `results.json` beside the model or to `--output_path`."""
    check_tasks(args.tasks, args.confirm_run_unsafe_code, args.task_dir)
    file, model = results_path(args.model_path, args.output_path), identity(args.model_path)
    read_results(file, model)
    # Not above: what is refused is refused at once, without seconds of imports.
    import torch
    from rich.console import Console

    from dynamic_transformers.evaluation.exported import trained_precision
    from dynamic_transformers.evaluation.harness import render_table, run_benchmarks

    result = run_benchmarks(
        args.model_path,
        args.tasks,
        data_dir=args.data_dir,
        task_dir=args.task_dir,
        batch_size=args.batch_size,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        seed=args.seed,
        selection_rule=args.selection_rule,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=args.dtype or trained_precision(args.model_path),
    )
    add_results(file, result, model)
    Console().print(render_table(result))
    print(f"written: {file}")
