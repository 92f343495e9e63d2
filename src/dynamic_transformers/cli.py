"""Command line: `dynamic-transformers COMMAND`; `train.py` and `bench.py` use two of the commands."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from dynamic_transformers.command_line import add_plugin_argument, flag_of, names, path, run_command
from dynamic_transformers.configure import compose_settings, settings_from_dict
from dynamic_transformers.evaluation.bench import add_bench_arguments, bench_command
from dynamic_transformers.evaluation.task_index import check_tasks
from dynamic_transformers.evaluation.task_texts import add_task_texts_arguments, task_texts_command
from dynamic_transformers.fetch import fetch, in_units, offline_environment, use_folder
from dynamic_transformers.manifest import input_folder, read_manifest
from dynamic_transformers.preflight import check_places, check_writable, preflight
from dynamic_transformers.settings import PRECISIONS, ModelSettings, Settings, UserError
from dynamic_transformers.study import single_run
from dynamic_transformers.tracking.sync import add_sync_arguments, sync_command


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the commands that take a configuration."""
    parser.add_argument(
        "--config-name", default="default", help="a file of config/, or one of ours (default: default)"
    )
    parser.add_argument(
        "--config-dir", type=path, help="your files, which win over ours (default: config/, if there is one)"
    )
    parser.add_argument(
        "--force", action="store_true", help="do it again although a finished output is there"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides")


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `prepare`."""
    parser.add_argument(
        "--preview", action="store_true", help="print what the data are: counts, shares, lengths, some blocks"
    )
    add_config_arguments(parser)


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings that a command line asks for: of one run of a study, if `study.variant` names one."""
    return single_run(compose_settings(args.config_name, args.overrides, args.config_dir))


def prepare_command(args: argparse.Namespace) -> None:
    """`prepare`: write the data folder, print a preview if asked, and say where it is."""
    settings = settings_of(args)
    check_places(settings)
    # Not above: what is refused is refused at once, without seconds of imports.
    from dynamic_transformers.data.prepare import default_data_dir, prepare
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    folder = prepare(settings, default_data_dir(settings), force=args.force)
    if args.preview:
        show(folder)
    print(f"data: {folder}")


def show(folder: Path) -> None:
    """Print a preview of a data folder."""
    from rich.console import Console

    from dynamic_transformers.data.preview import read_preview
    from dynamic_transformers.data.preview_text import print_preview

    print_preview(read_preview(folder), Console())


def fetch_command(args: argparse.Namespace) -> None:
    """`fetch`: bring what the settings need of the hub into a folder, and say how it is used."""
    use_folder(args.output_dir)
    settings = settings_of(args)
    options = settings.evaluation
    options.tasks = args.tasks or options.tasks
    options.confirm_run_unsafe_code |= args.confirm_run_unsafe_code
    check_writable("--output_dir", args.output_dir)
    check_tasks(options.tasks, options.confirm_run_unsafe_code, options.own_tasks)
    # Not above: what is refused is refused at once, without seconds of imports.
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    items = fetch(settings, args.output_dir)
    folder = args.output_dir.absolute()
    print(f"fetched: {folder} ({in_units(sum(item['bytes'] for item in items))})")
    arguments = [f"--config-name={args.config_name}", *args.overrides]
    print(f"offline: {offline_environment(folder)} python train.py {shlex.join(arguments)}")


def train_command(args: argparse.Namespace) -> None:
    """`train` and `train.py`: prepare, train, export."""
    settings = settings_of(args)
    preflight(settings)
    # Not above: what is refused is refused at once, without seconds of imports.
    from accelerate import PartialState

    from dynamic_transformers.export import export
    from dynamic_transformers.launch.one_process import by_one_process
    from dynamic_transformers.training.display import configure_logging
    from dynamic_transformers.training.trainer import on_cpu, train

    configure_logging()
    data_dir = by_one_process(lambda: data_folder(settings, args.force), "the data")
    state = PartialState(cpu=on_cpu(settings))
    if not state.is_main_process:
        logging.getLogger("dynamic_transformers").setLevel(logging.WARNING)
    run_dir = train(settings, data_dir, settings.run_dir, force=args.force)
    if state.is_main_process:
        model_dir = export(run_dir, run_dir / "final_model", force=args.force)
        tasks = ",".join(settings.evaluation.tasks)
        print(
            f"model: {model_dir}\nbench: dynamic-transformers bench --model_path {model_dir} --tasks {tasks}"
        )


def data_folder(settings: Settings, force: bool = False) -> Path:
    """The data to train on: a run that goes on keeps its own; otherwise they are prepared if need be."""
    from dynamic_transformers.data.prepare import default_data_dir, find_content, prepare
    from dynamic_transformers.training.run_folder import content_to_go_on_with

    content = content_to_go_on_with(settings, force)
    own = content and find_content(settings, content)
    return own or prepare(settings, default_data_dir(settings))


def export_command(args: argparse.Namespace) -> None:
    """`export`: write the Hugging Face folder and say where it is."""
    from dynamic_transformers.export import export
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    print(f"model: {export(args.run_dir, args.output_dir or args.run_dir / 'final_model', force=args.force)}")


def compare_command(args: argparse.Namespace) -> None:
    """`compare`: evaluate what is not evaluated yet, print the table and say where the report is."""
    from dynamic_transformers.comparison.compare import compare, print_comparison
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    check_comparable(args.runs)
    evaluations = [evaluation_of(folder, args.dtype) for folder in args.runs]
    models = [input_folder(folder, "model") for folder in evaluations]
    print_comparison(compare(evaluations, args.output_dir, models=models, baseline=args.baseline))


def check_comparable(folders: Sequence[Path]) -> None:
    """Refuse what `compare` would refuse, before a run is evaluated.

    Raises:
        UserError: a folder that is no run and no evaluation, or one training twice.
    """
    trainings: dict[str, Path] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest["step"] not in ("train", "evaluate"):
            raise UserError(
                f"{folder}: is the output of {manifest['step']}; compare takes run folders, and evaluations "
                "of them"
            )
        if manifest["step"] == "train":
            first = trainings.setdefault(manifest["config_digest"], folder)
            if first is not folder:
                raise UserError(
                    f"{first} and {folder} are the same training with the same seed; give one of them"
                )


def evaluation_of(folder: Path, dtype: str | None = None) -> Path:
    """The evaluation of a run folder, made now if need be; a folder of an evaluation is given back.

    Args:
        dtype: in place of the run's `evaluation.dtype`.
    """
    from dynamic_transformers.evaluation.evaluate import evaluate
    from dynamic_transformers.export import export

    manifest = read_manifest(folder)
    if manifest["step"] == "evaluate":
        return folder
    read_manifest(folder, "train")
    data_dir = input_folder(folder, "data")
    settings = settings_from_dict(yaml.safe_load((folder / "config.yaml").read_text()))
    settings.run.output_dir = str(folder.resolve().parent)  # another working folder, or moved
    settings.evaluation.dtype = dtype or settings.evaluation.dtype
    model_dir = export(folder, folder / "final_model")
    return evaluate(settings, data_dir, folder, model_dir, folder / "evaluation")


def calibrate_command(args: argparse.Namespace) -> None:
    """`calibrate`: write the model with other thresholds beside it, and say where."""
    read_manifest(args.model_path, "export")
    read_manifest(args.data_dir, "prepare_data")
    from dynamic_transformers.evaluation.recalibration import recalibrate
    from dynamic_transformers.training.display import configure_logging

    configure_logging()
    print(f"model: {recalibrate(args.model_path, args.data_dir, args.capacity, args.output_dir)}")


def routing_command(args: argparse.Namespace) -> None:
    """`routing`: write the page and the picture, and say where they are."""
    if not (args.model_path / "config.json").is_file():
        raise UserError(f"{args.model_path}: no exported model (it has no config.json)")
    text = read_text(args.file) if args.file else args.text
    from dynamic_transformers.evaluation.exported import load_model, tokenizer_of
    from dynamic_transformers.evaluation.routing_page import PAGE, PICTURE, trace_routing, write_routing

    tokenizer = tokenizer_of(args.model_path)
    routing = trace_routing(load_model(args.model_path), tokenizer, tokenizer(text)["input_ids"])
    folder = args.output_dir or args.model_path
    folder.mkdir(parents=True, exist_ok=True)
    write_routing(routing, folder)
    print(f"page:    {folder / PAGE}\npicture: {folder / PICTURE}")


def read_text(file: Path) -> str:
    """A text file's content.

    Raises:
        UserError: it cannot be read, or is of another encoding.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 (at byte {error.start}); save the file in that encoding"
        ) from error


def add_fetch_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fetch`."""
    parser.add_argument("--output_dir", type=path, required=True, help="becomes an HF_HOME")
    parser.add_argument(
        "--tasks",
        type=names,
        help="suites or tasks of lm-eval, separated by commas (default: evaluation.tasks)",
    )
    parser.add_argument(
        "--confirm_run_unsafe_code",
        action="store_true",
        help="the suite code: lm-eval runs the hub's code_eval when it loads its tasks",
    )
    add_config_arguments(parser)


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `export`."""
    parser.add_argument("run_dir", type=path)
    parser.add_argument("--output_dir", type=path, help="default: RUN_DIR/final_model")
    parser.add_argument("--force", action="store_true", help="export again")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `calibrate`."""
    parser.add_argument("--model_path", type=path, required=True, help="folder of the exported model")
    parser.add_argument(
        "--data_dir", type=path, required=True, help="data folder; its validation split sets the thresholds"
    )
    parser.add_argument(
        "--capacity",
        type=flag_of(ModelSettings, "capacity"),
        help="fraction of the tokens that routed layers compute (default: the model's)",
    )
    parser.add_argument(
        "--output_dir", type=path, help="default: MODEL_PATH-DATA-capacity-G beside the model"
    )
    add_plugin_argument(parser)


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dynamic-transformers routing`."""
    parser.add_argument("--model_path", type=path, required=True, help="folder of the exported model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="what the model reads")
    source.add_argument("--file", type=path, help="a text file that the model reads")
    parser.add_argument("--output_dir", type=path, help="default: the model's folder")
    add_plugin_argument(parser)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `compare`."""
    parser.add_argument("runs", type=path, nargs="+", help="run folders, or folders with evaluation.json")
    parser.add_argument(
        "--baseline",
        default="standard",
        help="label of the variant that ratios and differences refer to (default: standard)",
    )
    parser.add_argument(
        "--dtype", choices=PRECISIONS, help="of the weights (default: as each run was evaluated)"
    )
    parser.add_argument(
        "--output_dir",
        type=path,
        default=Path("outputs/report"),
        help="a report that is there is replaced (default: outputs/report)",
    )
    add_plugin_argument(parser)


COMMANDS = {
    "prepare": (prepare_command, add_prepare_arguments, "mix, tokenize and pack data"),
    "fetch": (
        fetch_command,
        add_fetch_arguments,
        "bring what a configuration needs of the hub into a folder",
    ),
    "train": (train_command, add_config_arguments, "prepare if need be, train one model, export it"),
    "export": (export_command, add_export_arguments, "a run's checkpoint as a Hugging Face folder"),
    "calibrate": (calibrate_command, add_calibrate_arguments, "thresholds for another domain or capacity"),
    "bench": (bench_command, add_bench_arguments, "run lm-eval on an exported model"),
    "task-texts": (task_texts_command, add_task_texts_arguments, "texts of tasks, for data.decontaminate"),
    "routing": (routing_command, add_routing_arguments, "show which tokens each layer computes"),
    "sync": (sync_command, add_sync_arguments, "send to MLflow what it has missed of runs"),
    "compare": (compare_command, add_compare_arguments, "evaluate finished runs; table, plots and report"),
}


def main() -> None:
    """Entry of `dynamic-transformers`."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name not in COMMANDS:
        lines = [f"  {command:10}  {text}" for command, (_, _, text) in COMMANDS.items()]
        usage = "\n".join(["usage: dynamic-transformers COMMAND ...", "", *lines])
        asked = name in ("-h", "--help")
        print(
            usage if asked else f"error: {name or 'no'}: not a command\n{usage}",
            file=None if asked else sys.stderr,
        )
        sys.exit(0 if asked else 2)
    function, add_arguments, text = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"dynamic-transformers {name}", description=text)
    add_arguments(parser)
    run_command(function, parser, arguments)


if __name__ == "__main__":
    main()
