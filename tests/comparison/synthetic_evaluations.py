"""Evaluation folders made up for the tests: the contract of evaluation.json, with plausible numbers."""

import math
import random
from pathlib import Path
from typing import Any

from dynamic_transformers.manifest import write_json, write_manifest
from dynamic_transformers.settings import CONTROLS

# capacity, loss below standard, forward FLOPs ratio, prefill ratio, KV ratio
SHAPES = {
    "standard": (None, 0.0, 1.0, 1.0, 1.0),
    "mod": (0.125, 0.030, 0.60, 1.42, 0.5625),
    "sdt": (0.5, -0.012, 0.78, 1.12, 0.75),
    "stt": (0.5, -0.061, 0.76, 1.15, 0.75),
}
LAYERS = 8
UNIGRAM = 5.873


def make_run(
    architecture: str,
    seed: int = 0,
    rule: str = "threshold",
    flops: float = 1.234e13,
    training_rule: str = "topk",
    variant: str | None = None,
    point: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One evaluation.json, different for each variant, point and seed but reproducible."""
    point = point or {}
    rng = random.Random(f"{variant or architecture}-{seed}" + ("".join(map(str, point.values()))))
    capacity, gain, flops_ratio, speed, kv = SHAPES[architecture]
    routed = capacity is not None
    causal = rule != "topk" or not routed
    loss = 4.240 - gain + rng.gauss(0, 0.004) - (0 if causal else 0.05)
    fractions = {
        str(layer): {
            "target": capacity,
            "train": capacity + rng.gauss(0, 0.001),
            "eval": capacity * (1 + rng.uniform(-0.08, 0.08)) if causal else capacity,
            "eval_sd": 0.3 * capacity,
        }
        for layer in range(1, LAYERS, 2)
        if routed
    }
    domains = {
        name: {
            "loss": loss + difference,
            "tokens": 20_000,
            "forward_flops_per_token": 5.43e6 * flops_ratio * (1 + 0.1 * difference),
            "fraction": {"mean": capacity * (1 - 0.8 * difference), "sd": 0.1 * capacity} if routed else None,
            "layers": {},
        }
        for name, difference in (("prose", 0.4), ("code", 0.1), ("math", -0.9))
    }
    history: list[dict[str, float]] = []
    for step in range(10, 401, 10):
        value = loss + 3.4 * math.exp(-step / 60) + rng.gauss(0, 0.03)
        row = {"step": step, "tokens": step * 2048, "training_flops": flops * step / 400, "train/loss": value}
        history.append(row)
        if step % 100 == 0:
            history.append({**row, "eval/loss": loss + 3.4 * math.exp(-step / 60) + 0.02})
            del history[-1]["train/loss"]
    return {
        "schema_version": 2,
        "variant": variant or architecture,
        "point": point,
        "seed": seed,
        "architecture": architecture,
        "overrides": [f"model.type={architecture}"],
        "parameters": 2_468_352 + (12_345 if routed else 0),
        "training_flops": flops,
        "training_rule": (rule if rule in CONTROLS else training_rule) if routed else None,
        "training_tokens": int(819_200 / flops_ratio),
        "eval": {
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / 2.9,
            "causal": causal,
            "selection_rule": rule if routed else None,
            "dtype": "fp32",
            "domains": domains,
        },
        "reference": {
            "unigram_loss": UNIGRAM,
            "test_sha256": "a" * 64,
            "data_digest": "c" * 64,
            "tokenizer_sha256": "d" * 64,
        },
        "bench": {
            "dt_cloze": {
                "forward_flops_per_token": 5.2e6 * flops_ratio,
                **(
                    {"routed_fraction": 0.9 * capacity, "routed_fraction_sd": 0.2 * capacity}
                    if routed
                    else {}
                ),
                "acc": 0.34 + rng.gauss(0, 0.03),
                "acc_norm": 0.36,
            },
            "dt_arithmetic": {"acc": 0.27 + rng.gauss(0, 0.03)},
            "dt_perplexity_prose": {"bits_per_byte": 2.31 - gain, "word_perplexity": 8123.4},
            "dt_perplexity_code": {"bits_per_byte": 1.62 - gain, "word_perplexity": 4321.0},
            "dt_perplexity_math": {"bits_per_byte": 0.91 - gain, "word_perplexity": 12.0},
        },
        "bench_stderr": {"dt_cloze": {"acc": 0.058, "acc_norm": 0.06}, "dt_arithmetic": {"acc": 0.055}},
        "efficiency": {
            "forward_flops_per_token": 5.43e6 * flops_ratio,
            "prefill_tokens_per_second": 10_400 * speed * (1 + rng.gauss(0, 0.02)),
            "decode_tokens_per_second": 212 * (1 + rng.gauss(0, 0.03)),
            "kv_bytes_per_token": 4096 * kv,
            "mean_routed_fraction": {"mean": capacity, "sd": 0.3 * capacity} if routed else None,
            "timed_routed_fraction": {
                work: {layer: 1.04 * capacity for layer in fractions} for work in ("prefill", "decode")
            },
            "timed_prompts": {"number": 64, "prefill": 496.0, "decode": 16.0},
            "routed_fraction": fractions,
        },
        "history": history,
        "model_dir": f"outputs/quickstart/{architecture}-seed{seed}/final_model",
        "mlflow_run_id": f"{rng.getrandbits(128):032x}",
        "settings": {
            "model.type": architecture,
            "model.selection_rule": rule,
            "model.training_rule": training_rule,
            **point,
        },
        "model_digest": f"{rng.getrandbits(256):064x}",
    }


def write_run(folder: Path, run: dict[str, Any]) -> Path:
    """Write an evaluation folder as `evaluate` does."""
    folder.mkdir(parents=True)
    write_json(folder / "evaluation.json", run)
    write_manifest(folder, "evaluate", {"architecture": run["architecture"]}, {}, seed=run["seed"])
    return folder


def write_runs(parent: Path, runs: list[dict[str, Any]]) -> list[Path]:
    """One evaluation folder per run, in the order given."""
    return [write_run(parent / f"evaluation_{index}", run) for index, run in enumerate(runs)]
