"""The evaluate step: one exported model → `evaluation.json`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config

from dynamic_transformers.data.loading import load_split, load_tokenizer, source_names, verify_split
from dynamic_transformers.data.preview import read_preview
from dynamic_transformers.evaluation.efficiency import choose_prompts, kv_bytes_per_token
from dynamic_transformers.evaluation.exported import load_model, tokenizer_digest, trained_precision
from dynamic_transformers.evaluation.harness import run_benchmarks
from dynamic_transformers.evaluation.results import RESULTS, identity
from dynamic_transformers.evaluation.routing_page import trace_routing, write_routing
from dynamic_transformers.evaluation.task_index import check_task_dir, task_files
from dynamic_transformers.manifest import (
    digest,
    read_manifest,
    revision,
    step_output,
    write_json,
    write_manifest,
)
from dynamic_transformers.model_card import CARD, with_results
from dynamic_transformers.models.configuration import RoutedConfig
from dynamic_transformers.settings import CONTROLS, SEED_KEY, Settings, UserError
from dynamic_transformers.tracking import METRICS, RunTracker, reopened, send_rest
from dynamic_transformers.training.flops import target_fraction
from dynamic_transformers.training.heldout import evaluate_heldout

logger = logging.getLogger("dynamic_transformers")

ROUTING_TOKENS = 128  # of the test split, shown on the routing page
SCHEMA_VERSION = 2  # of evaluation.json and comparison.json
PROMPTS = "prompts.json"  # of the test split, for the measurement of speed
DATA = "data.json"  # the preview of the data, for the report


def evaluate(
    settings: Settings, data_dir: Path, run_dir: Path, model_dir: Path, output_dir: Path, force: bool = False
) -> Path:
    """Held-out loss on the test split, lm-eval suites and FLOPs of an exported model.

    Writes `evaluation.json`, `results.json` (lm-eval's own), the model card with the results, `prompts.json`
    (the blocks of the test split on which `compare` measures speed), `data.json` (the preview of the data)
    and, for a routed model, `routing.html` and `routing.png` into `output_dir`, and attaches the figures to
    the training run in MLflow.

    Args:
        data_dir, run_dir, model_dir: folders of `prepare`, `train` and `export`.

    Raises:
        UserError: the model is recalibrated: it would pass for the one that the run trained.
    """
    exported = read_manifest(model_dir, "export")
    if "model" in exported["inputs"]:
        raise UserError(
            f"{model_dir}: is recalibrated; evaluate the model that the run exported: only `bench` takes "
            "recalibrated models"
        )
    config = {
        "evaluation": settings.to_dict()["evaluation"],
        "model_digest": exported["digest"],
        "data_digest": read_manifest(data_dir, "prepare_data")["digest"],
    }
    if (own_tasks := settings.evaluation.own_tasks) is not None:
        check_task_dir(own_tasks)
        config["task_files"] = task_files(own_tasks)
    with step_output(output_dir, "evaluate", config, force) as output:
        if output is None:
            send_rest(settings, run_dir)
            return output_dir
        tracker = reopened(settings, run_dir)
        result = fill(output, settings, data_dir, run_dir, model_dir, tracker.run_id)
        write_manifest(output, "evaluate", config, {"data": data_dir, "run": run_dir, "model": model_dir})
    track(tracker, model_dir, output_dir, result, comparison_of(settings))
    return output_dir


def fill(
    output: Path,
    settings: Settings,
    data_dir: Path,
    run_dir: Path,
    model_dir: Path,
    mlflow_run_id: str | None,
) -> dict[str, Any]:
    """Evaluate, and write the evaluation's files into an empty folder; returns `evaluation.json`."""
    model_manifest = read_manifest(model_dir, "export")
    data_manifest = read_manifest(data_dir, "prepare_data")
    options = settings.evaluation
    dtype = options.dtype or trained_precision(model_dir)
    model = load_model(model_dir, dtype=dtype)
    assert isinstance(model.config, Qwen2Config)
    verify_split(data_dir, "test")
    test, tokenizer = load_split(data_dir, "test"), load_tokenizer(data_dir)
    heldout = evaluate_heldout(model, test, options.batch_size, source_names(data_dir))
    logger.info("test loss %.4f nats/token, %.4f bits/byte", heldout.loss, heldout.bits_per_byte)
    kv_bytes = kv_bytes_per_token(model, test, options.batch_size)
    if isinstance(model.config, RoutedConfig):
        ids = test.input_ids(0).tolist()[:ROUTING_TOKENS]
        write_routing(trace_routing(model, tokenizer, ids), output)
    config, device = model.config, model.device.type
    del model  # the benchmarks load their own
    bench = run_benchmarks(
        model_dir,
        options.tasks,
        data_dir=data_dir,
        batch_size=options.batch_size,
        task_dir=options.own_tasks,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        seed=settings.run.seed,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        device=device,
        dtype=dtype,
    )
    metrics, errors = split_results(bench["results"])
    for task, of_task in bench["realised"].items():
        metrics.setdefault(task, {}).update(realised_figures(of_task))
    train_fraction = {int(k): v for k, v in model_manifest["train_routed_fraction"].items()}
    realised = heldout.realised
    result = {
        "schema_version": SCHEMA_VERSION,
        **{key: model_manifest[key] for key in ("variant", "point", "seed", "architecture", "overrides")},
        "training_rule": training_rule(config),
        "parameters": model_manifest["parameters"],
        "training_flops": model_manifest["training_flops"],
        "training_tokens": model_manifest["training_tokens"],
        "training_seconds": model_manifest["training_seconds"],
        "eval": {
            "loss": heldout.loss,
            "bits_per_byte": heldout.bits_per_byte,
            "causal": bench["config"]["causal"],
            "selection_rule": bench["config"]["selection_rule"],
            "dtype": dtype,
            "domains": {
                name: {"loss": domain.loss, **dataclasses.asdict(domain.realised)}
                for name, domain in heldout.domains.items()
            },
        },
        "reference": {
            "unigram_loss": data_manifest["unigram_loss"]["test"],
            "test_sha256": data_manifest["splits"]["test"]["sha256"],
            "data_digest": data_manifest["content_digest"],
            "tokenizer_sha256": tokenizer_digest(model_dir),
        },
        "bench": metrics,
        "bench_stderr": errors,
        "efficiency": {
            "forward_flops_per_token": realised.forward_flops_per_token,
            "kv_bytes_per_token": kv_bytes,
            "mean_routed_fraction": realised.fraction and dataclasses.asdict(realised.fraction),
            "routed_fraction": {
                str(layer): {
                    "target": target_fraction(config),
                    "train": train_fraction.get(layer),
                    "eval": spread.mean,
                    "eval_sd": spread.sd,
                    "gate_mean": heldout.gate_mean[layer],
                    "gate_std": heldout.gate_std[layer],
                }
                for layer, spread in realised.layers.items()
            },
        },
        "history": [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()],
        "model_dir": str(model_dir.resolve()),
        "mlflow_run_id": mlflow_run_id,
        "settings": without_seed(model_manifest["run_config"]),
        "model_digest": model_manifest["digest"],
    }
    write_json(output / "evaluation.json", result)
    write_json(output / RESULTS, {"model": identity(model_dir), **bench})
    if (model_dir / CARD).is_file():
        card = (model_dir / CARD).read_text(encoding="utf-8")
        card = with_results(card, tracked_figures(result), conditions(result))
        (output / CARD).write_text(card, encoding="utf-8")
    write_json(output / DATA, read_preview(data_dir).to_dict())
    write_json(output / PROMPTS, [vars(prompt) for prompt in choose_prompts(test, tokenizer)])
    return result


def training_rule(config: PreTrainedConfig) -> str | None:
    """The rule that selected tokens in training, a control's own; None where nothing is routed."""
    if not isinstance(config, RoutedConfig):
        return None
    return config.selection_rule if config.selection_rule in CONTROLS else config.training_rule


def realised_figures(realised: dict[str, Any]) -> dict[str, float]:
    """What was computed for a task, beside its scores: `run_benchmarks` returns it in full."""
    figures = {"forward_flops_per_token": realised["forward_flops_per_token"]}
    if fraction := realised["fraction"]:
        figures |= {"routed_fraction": fraction["mean"], "routed_fraction_sd": fraction["sd"]}
    return figures


def shown_figures(output_dir: Path) -> dict[str, Any]:
    """The few figures of a finished evaluation by which a person tells models apart."""
    run = json.loads((output_dir / "evaluation.json").read_text(encoding="utf-8"))
    fraction = run["efficiency"]["mean_routed_fraction"]
    return {
        "variant": run["variant"],
        "seed": run["seed"],
        **run["point"],
        "test_loss": run["eval"]["loss"],
        "bits_per_byte": run["eval"]["bits_per_byte"],
        "forward_flops_per_token": run["efficiency"]["forward_flops_per_token"],
        "training_flops": run["training_flops"],
        **({"routed_fraction": fraction["mean"]} if fraction else {}),
    }


def comparison_of(settings: Settings) -> str:
    """Digest of what evaluated runs must share to be compared: settings and the program's revision."""
    return digest({"settings": settings.to_dict(), "revision": revision()})


def without_seed(run_config: dict[str, Any]) -> dict[str, Any]:
    """What runs must share to count as seeds of one another: all but the seed and the data it shuffles."""
    return {key: value for key, value in run_config.items() if key not in (SEED_KEY, "data_digest")}


def split_results(results: dict[str, dict[str, Any]]) -> tuple[dict, dict]:
    """lm-eval's `metric,filter` entries as {task: {metric: value}} and {task: {metric: standard error}}."""
    metrics: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, entries in results.items():
        for key, value in entries.items():
            name = key.split(",")[0]
            if not isinstance(value, float):
                continue
            if name.endswith("_stderr"):
                errors.setdefault(task, {})[name.removesuffix("_stderr")] = value
            else:
                metrics.setdefault(task, {})[name] = value
    return metrics, errors


def tracked_figures(result: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation as MLflow names them."""
    figures = {"test/loss": result["eval"]["loss"], "test/bits_per_byte": result["eval"]["bits_per_byte"]}
    for task, metrics in result["bench"].items():
        figures |= {f"bench/{task}/{name}": value for name, value in metrics.items()}
    for source, domain in result["eval"]["domains"].items():
        figures[f"test/{source}/loss"] = domain["loss"]
        if domain["fraction"]:
            figures[f"test/{source}/routed_fraction"] = domain["fraction"]["mean"]
    figures["efficiency/forward_flops_per_token"] = result["efficiency"]["forward_flops_per_token"]
    return figures


def conditions(result: dict[str, Any]) -> str:
    """What the figures of an evaluation hold for, in one sentence."""
    rule, dtype = result["eval"]["selection_rule"], result["eval"]["dtype"]
    routed = f", tokens selected by `{rule}`" if rule else ""
    bound = "" if result["eval"]["causal"] else " This rule looks at later tokens: a non-causal upper bound."
    return f"On the test split, weights in {dtype}{routed}.{bound}"


def track(tracker: RunTracker, model_dir: Path, output_dir: Path, result: dict, comparison: str) -> None:
    """Attach the test figures, the evaluation and, last, the model to the training run.

    It can be found by its `comparison` only once all files have arrived.
    """
    tracker.log_final(result["training_tokens"], tracked_figures(result))
    for path in (tracker.run_dir / "config.yaml", tracker.run_dir / "manifest.json"):
        tracker.log_artifacts(path, "config")
    tracker.log_artifacts(output_dir, "evaluation")
    tracker.log_artifacts(model_dir, "model", large=True)
    if (output_dir / CARD).is_file():
        tracker.log_artifacts(output_dir / CARD, "model")  # in place of the one without results
    tracker.log_comparison(comparison)
    tracker.close("FINISHED")
