"""Selection rules against one another: `python -m benchmarks.rules`.

Trains each routed architecture at the quickstart's size and budget on the embedded data with several seeds,
with every part that a rule needs, and evaluates the same model by each rule on the test split: held-out loss,
realised fraction, and precision, recall and F1 against top-k membership. MoD's `aux` rule changes the
training loss, so it has runs of its own; so has random routing, the control.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dynamic_transformers.comparison.statistics import mean_interval
from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data.loading import batches_of, load_split
from dynamic_transformers.data.prepare import default_data_dir, prepare
from dynamic_transformers.export import load_run
from dynamic_transformers.models import RoutedForCausalLM
from dynamic_transformers.models.selection import select_top_k
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.display import configure_logging
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train

# run → (overrides, rules to evaluate). All MoD runs train a predictor, so that they differ in one thing only.
RUNS = {
    "MoD": (
        ["model.type=mod", "model.predictor_weight=0.01"],
        ["threshold", "predictor", "calibrated_predictor", "topk"],
    ),
    "MoD, aux loss": (
        ["model.type=mod", "model.predictor_weight=0.01", "model.mod.aux_weight=0.01"],
        ["threshold", "aux", "predictor", "calibrated_predictor", "topk"],
    ),
    "MoD, random": (
        ["model.type=mod", "model.predictor_weight=0.01", "model.mod.routing=random"],
        ["threshold"],
    ),
    "SDT": (
        ["model.type=sdt", "model.predictor_weight=0.01"],
        ["threshold", "predictor", "calibrated_predictor", "topk"],
    ),
    "STT": (["model.type=stt"], ["threshold", "predictor", "topk"]),
}


@dataclass
class Measured:
    """One rule on one model."""

    loss: float
    fraction: float
    worst_miss: float
    precision: float
    recall: float
    f1: float


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


def measure(run_dir: Path, data_dir: Path, rule: str, batch_size: int) -> Measured:
    """Evaluate a run's model by `rule`, calibrated for it as at the end of a run with that rule."""
    model = load_run(run_dir)
    assert isinstance(model, RoutedForCausalLM)
    model.config.selection_rule = rule
    validation, split = (load_split(data_dir, name) for name in ("validation", "test"))
    calibrate(model, batches_of(validation, batch_size))
    heldout = evaluate_heldout(model, split, batch_size)
    fractions = heldout.routed_fraction.values()
    return Measured(
        heldout.loss,
        statistics.fmean(fractions),
        max(abs(fraction - model.config.capacity) for fraction in fractions),
        *membership(model, split, batch_size),
    )


def table_of(results: dict[tuple[str, str], list[Measured]]) -> Table:
    """Mean over seeds, with 95 % intervals of the loss."""
    columns = ("run", "rule", "test loss", "±", "fraction", "worst layer off by", "precision", "recall", "F1")
    table = Table(*columns, box=box.MARKDOWN)
    for (run, rule), seeds in results.items():
        loss = mean_interval([seed.loss for seed in seeds])
        assert loss is not None
        others = [
            statistics.fmean(getattr(seed, name) for seed in seeds)
            for name in ("fraction", "worst_miss", "precision", "recall", "f1")
        ]
        label = f"{rule} (non-causal)" if rule == "topk" else rule
        spread = "" if loss.half_width is None else f"{loss.half_width:.3f}"
        table.add_row(run, label, f"{loss.mean:.4f}", spread, *(f"{value:.3f}" for value in others))
    return table


def differences_of(results: dict[tuple[str, str], list[Measured]]) -> Table:
    """Loss of each rule minus that of `threshold` on the same weights: mean over seeds, 95 % interval."""
    table = Table("run", "rule", "loss − threshold's", "±", box=box.MARKDOWN)
    for (run, rule), seeds in results.items():
        if rule == "threshold":
            continue
        base = results[run, "threshold"]
        gap = mean_interval([one.loss - other.loss for one, other in zip(seeds, base, strict=True)])
        assert gap is not None
        table.add_row(
            run, rule, f"{gap.mean:+.4f}", "" if gap.half_width is None else f"{gap.half_width:.4f}"
        )
    return table


def main(arguments: Iterable[str] | None = None) -> None:
    """Train, evaluate, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/rules.md"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides over config/quickstart.yaml")
    args = parser.parse_args(None if arguments is None else list(arguments))
    configure_logging()
    results: dict[tuple[str, str], list[Measured]] = {}
    for seed in range(args.seeds):
        for name, (overrides, rules) in RUNS.items():
            common = [
                "tracking.mlflow=false",
                "model.mod.aux_weight=0",  # the default is for users; here each run says what it has
                "training.eval_every=0",
                "training.log_every=100",
            ]
            settings = compose_settings(
                "quickstart", [*common, *overrides, *args.overrides, f"run.seed={seed}"]
            )
            settings.run.name = f"rules/{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            data_dir = prepare(settings, default_data_dir(settings))
            run_dir = train(settings, data_dir, settings.run_dir)
            for rule in rules:
                measured = measure(run_dir, data_dir, rule, settings.evaluation.batch_size)
                results.setdefault((name, rule), []).append(measured)
        tables = table_of(results), differences_of(results)
        Console(width=160).print(*tables)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("w") as file:
            Console(file=file, width=200).print(*tables)


if __name__ == "__main__":
    main()
