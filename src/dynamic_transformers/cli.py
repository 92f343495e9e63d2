"""Command line: `dynamic-transformers prepare|train|export|bench|compare`; `train.py` uses the second."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dynamic_transformers.configure import CONFIG_DIR, compose_settings, run_command
from dynamic_transformers.evaluation.bench import add_bench_arguments, bench_command
from dynamic_transformers.settings import Settings


def main() -> None:
    """Entry of `dynamic-transformers`."""
    parser = argparse.ArgumentParser(prog="dynamic-transformers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="prepare|train|export|bench|compare")

    for name, function, text in (
        ("prepare", prepare_command, "mix, tokenize and pack data"),
        ("train", train_command, "prepare if need be, train one model, export it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add_config_arguments(command)
        command.set_defaults(function=function)

    command = commands.add_parser("export", help="a training run's checkpoint as a Hugging Face folder")
    command.add_argument("run_dir", type=Path)
    command.add_argument("--output_dir", type=Path, help="default: RUN_DIR/final_model")
    command.add_argument("--force", action="store_true", help="export again")
    command.set_defaults(function=export_command)

    command = commands.add_parser("bench", help="run lm-eval on an exported model")
    add_bench_arguments(command)
    command.set_defaults(function=bench_command)

    command = commands.add_parser("compare", help="table, plots and report over evaluations")
    command.add_argument("evaluations", type=Path, nargs="+", help="folders with evaluation.json")
    command.add_argument("--output_dir", type=Path, default=Path("outputs/report"))
    command.set_defaults(function=compare_command)

    run_command(lambda args: args.function(args), parser)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that take a configuration."""
    parser.add_argument(
        "--config-name", default="default", help="a file of the configuration folder (default: default)"
    )
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="default: config/")
    parser.add_argument(
        "--force", action="store_true", help="do it again although a finished output is there"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings that a command line asks for; also switches plain logging on."""
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    return compose_settings(args.config_name, args.overrides, args.config_dir)


def prepare_command(args: argparse.Namespace) -> None:
    """`prepare`: write the data folder and say where it is."""
    from dynamic_transformers.data.prepare import default_data_dir, prepare

    settings = settings_of(args)
    folder = prepare(settings, default_data_dir(settings), force=args.force)
    print(f"data: {folder}")


def train_command(args: argparse.Namespace) -> None:
    """`train` and `train.py`: prepare, train, export."""
    from accelerate import PartialState

    from dynamic_transformers.data.prepare import default_data_dir, prepare
    from dynamic_transformers.export import export
    from dynamic_transformers.training.trainer import train

    settings = settings_of(args)
    state = PartialState(cpu=settings.system.device == "cpu")
    if not state.is_main_process:
        logging.getLogger("dynamic_transformers").setLevel(logging.WARNING)
    with state.main_process_first():
        data_dir = prepare(settings, default_data_dir(settings))
    run_dir = train(settings, data_dir, settings.run_dir, force=args.force)
    if state.is_main_process:
        model_dir = export(run_dir, run_dir / "final_model", force=args.force)
        print(f"model: {model_dir}\nbench: python bench.py --model_path {model_dir} --tasks quick_test")


def export_command(args: argparse.Namespace) -> None:
    """`export`: write the Hugging Face folder and say where it is."""
    from dynamic_transformers.export import export
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    print(f"model: {export(args.run_dir, args.output_dir or args.run_dir / 'final_model', force=args.force)}")


def compare_command(args: argparse.Namespace) -> None:
    """`compare`: print the table and say where the report is."""
    from dynamic_transformers.comparison.compare import compare, print_comparison
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    print_comparison(compare(args.evaluations, args.output_dir))
