"""The last step: evaluations in, comparison.json, plots and report.html out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

from dynamic_transformers.comparison.plots import write_plots
from dynamic_transformers.comparison.report import render_report
from dynamic_transformers.comparison.statistics import group_key, group_runs, named_rules
from dynamic_transformers.comparison.tables import render_realised_table, render_table
from dynamic_transformers.evaluation.efficiency import (
    Prompt,
    Speed,
    Subject,
    in_tokens_of,
    measure_side_by_side,
)
from dynamic_transformers.evaluation.evaluate import PROMPTS
from dynamic_transformers.evaluation.recalibration import TOKENIZER
from dynamic_transformers.evaluation.routing_page import PICTURE
from dynamic_transformers.manifest import (
    digest,
    file_digest,
    read_manifest,
    step_output,
    write_json,
    write_manifest,
)
from dynamic_transformers.settings import ARCHITECTURES, UserError

SCHEMA_VERSION = 1
NUMBERS = (
    "parameters",
    "training_flops",
    "training_tokens",
    "eval.loss",
    "eval.bits_per_byte",
    "reference.unigram_loss",
    "efficiency.forward_flops_per_token",
)
OTHER_KEYS = (
    "seed",
    "training_rule",
    "eval.causal",
    "eval.dtype",
    "eval.domains",
    "eval.selection_rule",
    "bench",
    "bench_stderr",
    "efficiency.kv_bytes_per_token",
    "efficiency.mean_routed_fraction",
    "efficiency.routed_fraction",
    "history",
    "model_dir",
    "mlflow_run_id",
    "variant",
    "model_digest",
    "reference.test_sha256",
)
SPEED = tuple(field.name for field in dataclasses.fields(Speed))  # which `compare` measures
AGAIN = "evaluate the model again with this version"


def compare(
    evaluations: Sequence[Path],
    output_dir: Path,
    models: Sequence[Path] = (),
    title: str = "Dynamic Transformers: comparison",
    force: bool = False,
) -> Path:
    """Compare evaluated models and return `output_dir` with comparison.json, report.html and four PNG plots.

    Args:
        evaluations: folders with evaluation.json and manifest.json, in any order; several seeds of one
            architecture, selection rule and training rule are averaged.
        models: the exported models, in any order: their speed is measured here, in turn in one process,
            since times of different processes do not compare. Without them the evaluations must hold
            earlier measurements.
        output_dir: replaced as a whole; returned as it is when the same evaluations made it, unless `force`.
        title: heading of the report.
        force: make the report again.

    Raises:
        UserError: no evaluation, an unfinished or malformed one, one whose model is not among `models`, runs
            that are no seeds of one another although they claim to be, or an `output_dir` that holds
            something else.
    """
    if not evaluations:
        raise UserError("compare: no evaluation given; name at least one folder with an evaluation.json")
    output_dir = Path(output_dir)
    loaded = [(Path(folder), load_evaluation(Path(folder))) for folder in evaluations]
    # The runs' contents, not their manifests: an evaluation that was repeated has the same configuration.
    config = {"title": title, "runs": sorted(digest(run) for _, run in loaded), "measured": bool(models)}
    with step_output(output_dir, "compare", config, force) as output:
        if output is not None:
            fill(output, loaded, models, config, title)
    return output_dir


def fill(
    output: Path,
    loaded: Sequence[tuple[Path, dict[str, Any]]],
    models: Sequence[Path],
    config: dict[str, Any],
    title: str,
) -> None:
    """Write the comparison's files into an empty folder."""
    for folder, run in loaded:
        check_run(run, folder / "evaluation.json")
    _check_seeds(loaded)
    if models:
        measure(loaded, models)
    for folder, run in loaded:
        if not set(SPEED) <= set(run["efficiency"]):
            raise UserError(f"{folder}: its speed was not measured; give its model to compare")
    folders = {_role(run): folder for folder, run in loaded}
    runs = [run for group in group_runs([run for _, run in loaded]) for run in group.runs]
    inputs = {_role(run): folders[_role(run)] for run in runs}
    manifests = [read_manifest(folder) for folder in inputs.values()]
    write_json(output / "comparison.json", {"schema_version": SCHEMA_VERSION, "runs": runs})
    plots = write_plots(runs, output)
    pictures = {role: inputs[role] / PICTURE for role in inputs if (inputs[role] / PICTURE).is_file()}
    report = render_report(runs, manifests, plots, pictures, title)
    (output / "report.html").write_text(report, encoding="utf-8")
    write_manifest(output, "compare", config, inputs)


def measure(loaded: Sequence[tuple[Path, dict[str, Any]]], models: Sequence[Path]) -> None:
    """Put each model's speed into its run, measured beside that of the standard model on the same text.

    Raises:
        UserError: an evaluation's model is not among `models`, or the text to be read is missing.
    """
    by_digest = {read_manifest(model, "export")["digest"]: model for model in models}
    for folder, run in loaded:
        if run.get("model_digest") not in by_digest:
            raise UserError(f"{folder}: its model is not among {', '.join(map(str, models))}")
    # The standard model of the lowest seed first, else the first run.
    order = sorted(loaded, key=lambda entry: (entry[1]["architecture"] != "standard", entry[1]["seed"]))
    prompts = read_prompts(order[0][0] / PROMPTS)
    own_tokenizer = tokenizer_digest(by_digest[order[0][1]["model_digest"]])
    subjects = []
    for _, run in order:
        model = by_digest[run["model_digest"]]
        given = prompts
        if tokenizer_digest(model) != own_tokenizer:
            given = in_tokens_of(AutoTokenizer.from_pretrained(model, trust_remote_code=False), prompts)
        subjects.append(Subject(model, run["eval"]["dtype"], given))
    for (_, run), speed in zip(order, measure_side_by_side(subjects[0], subjects[1:]), strict=True):
        run["efficiency"] |= json.loads(json.dumps(dataclasses.asdict(speed)))  # layers become text


def tokenizer_digest(model: Path) -> str:
    """SHA-256 of a model's tokenizer.json: models with the same one read the same ids.

    Raises:
        UserError: the model has none.
    """
    file = model / TOKENIZER
    if not file.is_file():
        raise UserError(f"{model}: has no {TOKENIZER}; export the model again")
    return file_digest(file)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts that `evaluate` wrote.

    Raises:
        UserError: the file is missing, or not what this version writes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {AGAIN}")
    try:
        return [Prompt(**prompt) for prompt in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error}); {AGAIN}") from error


def tracked_runs(output_dir: Path) -> list[str]:
    """MLflow ids of the runs of a finished comparison, as far as they were tracked."""
    comparison = json.loads((output_dir / "comparison.json").read_text(encoding="utf-8"))
    return [run["mlflow_run_id"] for run in comparison["runs"] if run["mlflow_run_id"]]


def print_comparison(output_dir: Path) -> None:
    """Print the table of a finished comparison, and where its report is.

    Raises:
        UserError: the folder is missing or unfinished.
    """
    read_manifest(output_dir)
    console = Console()
    comparison = json.loads((output_dir / "comparison.json").read_text(encoding="utf-8"))
    console.print(render_table(comparison))
    if (realised := render_realised_table(comparison)) is not None:
        console.print("", realised)
    console.print(f"report: {output_dir / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def load_evaluation(folder: Path) -> dict[str, Any]:
    """The run of an evaluation folder, checked, without its `schema_version`.

    Raises:
        UserError: the folder is unfinished, or its evaluation.json is not what `evaluate` writes.
    """
    read_manifest(folder)
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no evaluation.json; give the folder that `evaluate` wrote")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    version = run.pop("schema_version", None) if isinstance(run, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, must be {SCHEMA_VERSION}")
    if run.get("architecture") not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture is {run.get('architecture')}, must be one of {', '.join(ARCHITECTURES)}"
        )
    return run


def check_run(run: dict[str, Any], path: Path) -> None:
    """Refuse a run that lacks a key or whose numbers are not finite.

    Raises:
        UserError: names the key.
    """
    for key in (*NUMBERS, *OTHER_KEYS):
        value = _value(run, key, path)
        if key in NUMBERS and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(f"{path}: {key} is {value}, must be a finite number; leave a diverged run out")
    if run["eval"]["selection_rule"] == "topk" and run["eval"]["causal"]:
        raise UserError(f"{path}: eval.causal is true with selection rule topk, which looks at later tokens")


def _value(run: dict[str, Any], key: str, path: Path) -> Any:
    value: Any = run
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{path}: has no key {key}; {AGAIN}")
        value = value[part]
    return value


def _role(run: dict[str, Any]) -> str:
    rules = [rule.replace(" ", "-") for rule in named_rules(run, selection=True)]
    return "-".join([run["architecture"], *rules, f"seed{run['seed']}"])


def _check_seeds(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse runs that would be averaged as seeds of one another but are not."""
    counts = Counter(_role(run) for _, run in loaded)
    for role, count in counts.items():
        if count > 1:
            where = ", ".join(str(folder) for folder, run in loaded if _role(run) == role)
            raise UserError(f"compare: {count} evaluations of {role} ({where}); give each seed once")
    variants: dict[Any, str] = {}
    for folder, run in loaded:
        if run["variant"] != variants.setdefault(group_key(run), run["variant"]):
            raise UserError(
                f"{folder}: {_role(run)} was trained with other settings than another seed of it; "
                "compare seeds of one configuration"
            )
