"""Selection rules against one another: `python -m benchmarks.rules evaluation|training`.

Trains routed models at the quickstart's size and budget on the embedded data with several seeds, and
evaluates them on the test split: held-out loss and realised fraction, of all text and of each domain.

- `evaluation`: who selects in evaluation. Models with every part that a rule needs; the same weights by each
  rule, with precision, recall and F1 against top-k membership. MoD's `aux` rule changes the training loss, so
  it has runs of its own.
- `training`: who selects in training, and the controls, random and evenly spaced tokens. Each model is
  evaluated by the rule that it is shipped with.

All that is measured is kept in a file beside the tables; a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dynamic_transformers.comparison.statistics import mean_interval
from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data.loading import batches_of, load_split, source_names
from dynamic_transformers.data.prepare import default_data_dir, prepare
from dynamic_transformers.export import load_run
from dynamic_transformers.manifest import read_manifest, revision
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.models.selection import select_top_k
from dynamic_transformers.settings import CONTROLS, Settings
from dynamic_transformers.training.calibration import calibrate, calibration_rows
from dynamic_transformers.training.display import configure_logging
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train

# run → (overrides, rules to evaluate). All MoD runs train a predictor, so that they differ in one thing only.
EVALUATION = {
    "MoD": (
        ["model.type=mod", "model.predictor_weight=0.01", "model.mod.aux_weight=0"],
        ["threshold", "predictor", "calibrated_predictor", "topk"],
    ),
    "MoD, aux loss": (
        ["model.type=mod", "model.predictor_weight=0.01"],
        ["threshold", "aux", "predictor", "calibrated_predictor", "topk"],
    ),
    "SDT": (
        ["model.type=sdt", "model.predictor_weight=0.01"],
        ["threshold", "predictor", "calibrated_predictor", "topk"],
    ),
    "STT": (["model.type=stt"], ["threshold", "predictor", "topk"]),
}
TRAINING = {
    f"{name}, {rule}": (
        [f"model.type={name.lower()}", *overrides],
        [rule if rule in CONTROLS else "threshold"],
    )
    for name in ("MoD", "SDT", "STT")
    for rule, overrides in {
        "top-k": [],
        "threshold": ["model.training_rule=threshold"],
        "random": ["model.selection_rule=random"],
        "even": ["model.selection_rule=even"],
    }.items()
}
RUNS = {"evaluation": EVALUATION, "training": TRAINING}


@dataclass
class Part:
    """What one rule does on some text."""

    loss: float
    fraction: float


@dataclass
class Measured(Part):
    """One rule on one model; precision, recall and F1 are None for a control."""

    tokens: float
    worst_miss: float
    domains: dict[str, Part]
    precision: float | None
    recall: float | None
    f1: float | None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measured:
        """Inverse of `dataclasses.asdict`."""
        values["domains"] = {name: Part(**part) for name, part in values["domains"].items()}
        return cls(**values)


Results = dict[tuple[str, str], list[Measured]]


def membership(model, split, batch_size: int) -> tuple[float, float, float]:
    """Precision, recall and F1 of the model's rule against top-k of the same scores, over all routed layers.

    STT's top-k is its teacher's, which training mode computes; the rule is then applied to the student's
    logits of that same forward.
    """
    hits = chosen = wanted = 0
    teacher = model.config.model_type == "qwen2_stt"
    for batch in batches_of(split, batch_size):
        with torch.no_grad():
            model.train(teacher)
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            routing = model(**inputs, use_cache=False).routing
        for place, result in enumerate(routing.values()):
            if teacher:
                target = result.selected
                rule = model.config.selection_rule
                cut = {"threshold": model.routing_state.thresholds[0, place], "predictor": 0.0}.get(rule)
                selected = (
                    select_top_k(result.score, model.config.capacity, None).mask
                    if cut is None
                    else result.score > cut
                )
            else:
                target = select_top_k(result.score, model.config.capacity, None).mask
                selected = result.selected
            hits += int((selected & target).sum())
            chosen += int(selected.sum())
            wanted += int(target.sum())
    model.eval()
    precision, recall = hits / max(1, chosen), hits / wanted
    return precision, recall, 2 * hits / (chosen + wanted)


def measure(run_dir: Path, data_dir: Path, rule: str, batch_size: int, tokens: float) -> Measured:
    """Evaluate a run's model by `rule`, calibrated for it as at the end of a run with that rule."""
    model = load_run(run_dir)
    assert isinstance(model, RoutedForCausalLM)
    model.config.selection_rule = rule
    validation, split = (load_split(data_dir, name) for name in ("validation", "test"))
    rows = calibration_rows(validation, read_manifest(data_dir)["block_size"])
    calibrate(model, batches_of(rows, batch_size))
    heldout = evaluate_heldout(model, split, batch_size, source_names(data_dir))
    fractions = heldout.routed_fraction.values()
    domains = {
        name: Part(domain.loss, domain.realised.fraction.mean)
        for name, domain in heldout.domains.items()
        if domain.realised.fraction
    }
    scores = (None, None, None) if rule in CONTROLS else membership(model, split, batch_size)
    worst = max(abs(fraction - model.config.capacity) for fraction in fractions)
    return Measured(heldout.loss, statistics.fmean(fractions), tokens, worst, domains, *scores)


def losses_table(results: Results) -> Table:
    """Mean over seeds, with 95 % intervals of the loss."""
    columns = ("training tokens", "test loss", "±", "fraction", "worst layer off by")
    table = Table("run", "rule", *columns, "precision", "recall", "F1", box=box.MARKDOWN)
    for (run, rule), seeds in results.items():
        loss = mean_interval([seed.loss for seed in seeds])
        assert loss is not None
        others = [
            mean_interval([getattr(seed, name) for seed in seeds])
            for name in ("fraction", "worst_miss", "precision", "recall", "f1")
        ]
        table.add_row(
            run,
            label(rule),
            f"{statistics.fmean(seed.tokens for seed in seeds) / 1e6:.2f} M",
            f"{loss.mean:.4f}",
            "" if loss.half_width is None else f"{loss.half_width:.3f}",
            *("–" if value is None else f"{value.mean:.3f}" for value in others),
        )
    return table


def domains_table(results: Results) -> Table:
    """Mean over seeds of loss and realised fraction by domain."""
    domains = list(dict.fromkeys(name for seeds in results.values() for name in seeds[0].domains))
    heads = [f"{name} {what}" for what in ("loss", "fraction") for name in domains]
    table = Table("run", "rule", *heads, box=box.MARKDOWN)
    for (run, rule), seeds in results.items():
        cells = [
            f"{statistics.fmean(getattr(seed.domains[name], what) for seed in seeds):.3f}"
            for what in ("loss", "fraction")
            for name in domains
        ]
        table.add_row(run, label(rule), *cells)
    return table


def differences_table(results: Results, part: str) -> Table:
    """Loss minus that of the reference, paired over seeds: mean, 95 % interval.

    The reference of `evaluation` is `threshold` on the same weights, that of `training` the top-k run.
    """
    table = Table("run", "rule", "loss − reference's", "±", box=box.MARKDOWN)
    for (run, rule), seeds in results.items():
        reference = run if part == "evaluation" else f"{run.partition(',')[0]}, top-k"
        base = results.get((reference, "threshold"), [])
        if (run, rule) == (reference, "threshold") or len(base) != len(seeds):
            continue
        gap = mean_interval([one.loss - other.loss for one, other in zip(seeds, base, strict=True)])
        assert gap is not None
        half = "" if gap.half_width is None else f"{gap.half_width:.4f}"
        table.add_row(run, label(rule), f"{gap.mean:+.4f}", half)
    return table


def label(rule: str) -> str:
    """Name of a rule in the tables."""
    return f"{rule} (non-causal)" if rule == "topk" else rule


def run_settings(name: str, overrides: list[str], seed: int) -> Settings:
    """Settings of one training."""
    common = ["tracking.mlflow=false", "training.eval_every=0", "training.log_every=100"]
    settings = compose_settings("quickstart", [*common, *overrides, f"run.seed={seed}"])
    # A run of another commit is another run: one table is of one program.
    settings.run.name = f"rules-{revision()[:16]}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    return settings


def main(arguments: Iterable[str] | None = None) -> None:
    """Train, evaluate, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=RUNS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: outputs/rules-PART.md")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides over config/quickstart.yaml")
    args = parser.parse_intermixed_args(None if arguments is None else list(arguments))
    output = args.output or Path(f"outputs/rules-{args.part}.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    kept = output.with_suffix(".jsonl")
    configure_logging()
    done = {}
    for line in kept.read_text().splitlines() if kept.exists() else ():
        entry = json.loads(line)
        done[tuple(map(json.dumps, entry["key"]))] = Measured.from_json(entry["measured"])
    results: Results = {}
    for seed in range(args.seeds):
        for name, (overrides, rules) in RUNS[args.part].items():
            for rule in rules:
                key = [revision(), name, rule, seed, [*overrides, *args.overrides]]
                if (found := done.get(tuple(map(json.dumps, key)))) is None:
                    settings = run_settings(name, [*overrides, *args.overrides], seed)
                    data_dir = prepare(settings, default_data_dir(settings))
                    run_dir = train(settings, data_dir, settings.run_dir)  # a finished run is found
                    tokens = read_manifest(run_dir)["training_tokens"]
                    found = measure(run_dir, data_dir, rule, settings.evaluation.batch_size, tokens)
                    with kept.open("a") as file:
                        file.write(json.dumps({"key": key, "measured": dataclasses.asdict(found)}) + "\n")
                results.setdefault((name, rule), []).append(found)
        tables = losses_table(results), domains_table(results), differences_table(results, args.part)
        Console(width=160).print(*tables)
        with output.open("w") as file:
            Console(file=file, width=200).print(*tables)


if __name__ == "__main__":
    main()
