"""The last step: evaluations in, comparison.json, plots and report.html out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dynamic_transformers.comparison.labels import label_runs
from dynamic_transformers.comparison.plots import write_plots
from dynamic_transformers.comparison.report import name_of, render_report
from dynamic_transformers.comparison.statistics import Comparison, difference_to
from dynamic_transformers.comparison.tables import differences, render_realised_table, render_table
from dynamic_transformers.data.preview import Preview
from dynamic_transformers.evaluation.efficiency import (
    Prompt,
    Speed,
    Subject,
    in_tokens_of,
    measure_side_by_side,
)
from dynamic_transformers.evaluation.evaluate import DATA, PROMPTS, SCHEMA_VERSION
from dynamic_transformers.evaluation.exported import tokenizer_digest, tokenizer_of
from dynamic_transformers.evaluation.routing_page import PICTURE
from dynamic_transformers.folders import write_whole
from dynamic_transformers.manifest import (
    digest,
    read_manifest,
    step_output,
    write_json,
    write_manifest,
)
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import SEED_KEY, Settings, UserError

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
    "variant",
    "point",
    "seed",
    "architecture",
    "overrides",
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
    "settings",
    "model_digest",
    "reference.test_sha256",
    "reference.data_digest",
    "reference.tokenizer_sha256",
)
COMPARISON = "comparison.json"
SPEED = tuple(field.name for field in dataclasses.fields(Speed))  # which `compare` measures
AGAIN = "evaluate the model again with this version"


def compare(
    evaluations: Sequence[Path],
    output_dir: Path,
    models: Sequence[Path] = (),
    baseline: str | None = "standard",
    title: str = "Dynamic Transformers: comparison",
    settings: Settings | None = None,
    force: bool = False,
) -> Path:
    """Compare evaluated models and return `output_dir` with comparison.json, report.html and four plots.

    Args:
        evaluations: folders with evaluation.json and manifest.json, of runs of any configuration; variants
            stand in the order in which they come, seeds of one variant and point are averaged.
        models: the exported models, in any order: their speed is measured here, in turn in one process,
            since times of different processes do not compare. Without them the evaluations must hold
            earlier measurements.
        baseline: label of the variant that ratios and differences refer to; without such a variant there
            are none.
        output_dir: replaced as a whole; returned as it is when the same evaluations made it, unless `force`.
        title: heading of the report.
        settings: what all runs have, if they are of one study; study.yaml is then the study as a
            configuration.
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
    runs = [digest(run) for _, run in loaded]
    config = {"title": title, "runs": runs, "measured": bool(models), "baseline": baseline}
    with step_output(output_dir, "compare", config, force) as output:
        if output is not None:
            fill(output, loaded, models, config, settings)
    return output_dir


def fill(
    output: Path,
    loaded: Sequence[tuple[Path, dict[str, Any]]],
    models: Sequence[Path],
    config: dict[str, Any],
    settings: Settings | None,
) -> None:
    """Write the comparison's files into an empty folder."""
    for folder, run in loaded:
        check_run(run, folder / "evaluation.json")
    label_runs([run for _, run in loaded])
    _check_seeds(loaded)
    baseline = config["baseline"] if any(run["variant"] == config["baseline"] for _, run in loaded) else None
    if models:
        measure(loaded, models, baseline)
    for _, run in loaded:
        run["config_digest"] = digest(run.pop("settings"))
    for folder, run in loaded:
        if not set(SPEED) <= set(run["efficiency"]):
            raise UserError(f"{folder}: its speed was not measured; give its model to compare")
    comparison = Comparison.of([run for _, run in loaded], baseline)
    folders = {role_of(run): folder for folder, run in loaded}
    inputs = {role_of(run): folders[role_of(run)] for run in comparison.runs}
    manifests = [read_manifest(folder) for folder in inputs.values()]
    write_json(
        output / COMPARISON,
        {
            "schema_version": SCHEMA_VERSION,
            "baseline": baseline,
            "runs": comparison.runs,
            "differences": differences(comparison),
        },
    )
    plots = write_plots(comparison, output)
    pictures = {role: inputs[role] / PICTURE for role in inputs if (inputs[role] / PICTURE).is_file()}
    study = settings and write_study(settings, comparison, output / "study.yaml")
    report = render_report(
        comparison, manifests, plots, pictures, read_previews(inputs), config["title"], study
    )
    (output / "report.html").write_text(report, encoding="utf-8")
    write_manifest(output, "compare", config, inputs)


def write_study(settings: Settings, comparison: Comparison, path: Path) -> Path:
    """Write the runs as a study, which a pipeline would run again; returns `path`."""
    values = settings.to_dict()
    grid: dict[str, dict[Any, None]] = {}
    for run in comparison.runs:
        for key, value in {**run["point"], SEED_KEY: run["seed"]}.items():
            grid.setdefault(key, {})[value] = None
    values["study"] = {
        "baseline": comparison.baseline,
        "variants": {run["variant"]: run["overrides"] for run in comparison.runs},
        "grid": {key: list(found) for key, found in grid.items()},
    }
    write_whole(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return path


def measure(
    loaded: Sequence[tuple[Path, dict[str, Any]]], models: Sequence[Path], baseline: str | None
) -> None:
    """Put each model's speed into its run, measured beside that of the baseline on the same text.

    Raises:
        UserError: an evaluation's model is not among `models`, or the text to be read is missing.
    """
    by_digest = {read_manifest(model, "export")["digest"]: model for model in models}
    for folder, run in loaded:
        if run.get("model_digest") not in by_digest:
            raise UserError(f"{folder}: its model is not among {', '.join(map(str, models))}")
    # The baseline of the lowest seed first, else the first run.
    order = sorted(loaded, key=lambda entry: (entry[1]["variant"] != baseline, entry[1]["seed"]))
    prompts = read_prompts(order[0][0] / PROMPTS)
    own_tokenizer = tokenizer_digest(by_digest[order[0][1]["model_digest"]])
    subjects = []
    for _, run in order:
        model = by_digest[run["model_digest"]]
        given = prompts
        if tokenizer_digest(model) != own_tokenizer:
            given = in_tokens_of(tokenizer_of(model), prompts)
        subjects.append(Subject(model, run["eval"]["dtype"], given))
    for (_, run), speed in zip(order, measure_side_by_side(subjects[0], subjects[1:]), strict=True):
        run["efficiency"] |= json.loads(json.dumps(dataclasses.asdict(speed)))  # layers become text


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


def read_previews(evaluations: Mapping[str, Path]) -> list[tuple[list[str], Preview]]:
    """The data of all runs, each once, with the names of the runs that were trained on them.

    Args:
        evaluations: folder of each run, by its name; one that an older version wrote has no preview.

    Raises:
        UserError: the file of one is not what this version writes.
    """
    found: dict[str, tuple[list[str], Preview]] = {}
    for name, folder in evaluations.items():
        if not (path := folder / DATA).is_file():
            continue
        try:
            preview = Preview.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: damaged, or of another version ({error}); {AGAIN}") from error
        found.setdefault(preview.digest, ([], preview))[0].append(name)
    return list(found.values())


def tracked_runs(output_dir: Path) -> list[str]:
    """MLflow ids of the runs of a finished comparison, as far as they were tracked."""
    return [run["mlflow_run_id"] for run in read_comparison(output_dir).runs if run["mlflow_run_id"]]


def read_comparison(output_dir: Path) -> Comparison:
    """A finished comparison.

    Raises:
        UserError: it is of another version.
    """
    path = output_dir / COMPARISON
    content = json.loads(path.read_text(encoding="utf-8"))
    check_version(path, content)
    return Comparison.of(content["runs"], content["baseline"])


def check_version(path: Path, content: dict[str, Any]) -> None:
    """Refuse a file of another version.

    Raises:
        UserError: names both versions.
    """
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version}, must be {SCHEMA_VERSION}; {AGAIN}")


def shown_figures(output_dir: Path) -> dict[str, float]:
    """Of a finished comparison each group's test loss, and its difference to the baseline, by name."""
    comparison, shown = read_comparison(output_dir), {}
    for group in comparison.groups:
        loss = group.interval("eval.loss")
        assert loss is not None
        shown[f"{group.label}: test loss"] = loss.mean
        if baseline := comparison.baseline_of(group):
            difference = difference_to(group, baseline, lambda run: run["eval"]["loss"])
            if difference is not None:
                shown[f"{group.label}: test loss − {baseline.label}"] = difference.mean
    return shown


def print_comparison(output_dir: Path) -> None:
    """Print the table of a finished comparison, and where its report is.

    Raises:
        UserError: the folder is missing or unfinished.
    """
    read_manifest(output_dir)
    console = Console()
    comparison = read_comparison(output_dir)
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
    check_version(path, run if isinstance(run, dict) else {})
    del run["schema_version"]
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


def role_of(run: dict[str, Any]) -> str:
    """Name of a run among those of its comparison."""
    return f"{name_of(run)}, seed {run['seed']}"


def _check_seeds(loaded: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Refuse a run that is given twice."""
    counts = Counter(role_of(run) for _, run in loaded)
    for role, count in counts.items():
        if count > 1:
            where = ", ".join(str(folder) for folder, run in loaded if role_of(run) == role)
            raise UserError(f"compare: {count} evaluations of {role} ({where}); give each seed once")
