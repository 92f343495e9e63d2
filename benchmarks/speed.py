"""Time of each architecture against standard, beside its FLOPs: `make speed`.

All models of a row run in turn (A B C D, A B C D, …) in one process, so that drift of the machine hits all
alike; figures are medians of the ratio within a turn. Weights are random; thresholds are calibrated on random
tokens, and FLOP ratios use the fractions that the measured forwards realised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, Qwen2Config

from dynamic_transformers.evaluation.efficiency import timed
from dynamic_transformers.models import MODEL_CLASSES
from dynamic_transformers.settings import ModelSettings, OptimizerSettings
from dynamic_transformers.training.build import model_config
from dynamic_transformers.training.flops import forward_flops, training_flops
from dynamic_transformers.training.optimizer import build_optimizer

VOCAB = 8192
CALIBRATION_ROWS = 8
VARIANTS = {
    "standard": ModelSettings("standard"),
    "mod 0.125": ModelSettings("mod"),
    "mod 0.5": ModelSettings("mod", capacity=0.5),
    "sdt 0.5": ModelSettings("sdt"),
    "stt 0.5": ModelSettings("stt"),
}


@dataclass
class Row:
    """One line of the table; ratios are to standard."""

    size: str
    work: str
    variant: str
    fraction: float | None
    flop_ratio: float
    time_ratio: float
    memory_ratio: float | None = None
    kv_overhead: float | None = None


def build(variant: str, size: str, device: str) -> PreTrainedModel:
    """A model with random weights and calibrated thresholds."""
    torch.manual_seed(0)
    settings = VARIANTS[variant]
    settings.size = size
    config = model_config(settings, VOCAB)
    config._attn_implementation = "sdpa"
    model = MODEL_CLASSES[settings.type][1](config).to(device)
    if settings.type != "standard":
        model.set_progress(1, 2)
        positions = torch.arange(512, device=device).expand(CALIBRATION_ROWS, -1)
        model.calibrate(tokens(CALIBRATION_ROWS, 512, device, seed=1), positions)
    return model


def tokens(rows: int, length: int, device: str, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)


def side_by_side(
    models: dict[str, PreTrainedModel], work: Callable[[PreTrainedModel], float], repeats: int
) -> dict[str, float]:
    """Median of each model's time ÷ standard's within a turn; one warm-up turn."""
    turns = [{name: work(model) for name, model in models.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(turn[name] / turn["standard"] for turn in turns) for name in models}


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor) -> int:
    """Bytes that a training forward keeps for its backward; on a GPU the peak of allocated memory."""
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cuda.max_memory_allocated()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(input_ids=ids, labels=ids, use_cache=False)
    total = sum(kept.values())
    del output
    return total


def fractions_of(routing: dict | None, computed: bool) -> dict[int, float]:
    """Layer → fraction of tokens selected, or of places computed."""
    return {
        layer: result.computed if computed else result.selected.float().mean().item()
        for layer, result in (routing or {}).items()
    }


def rows_of(
    size: str,
    work: str,
    shares: dict[str, dict[int, float]],
    flops: dict[str, float],
    ratios: dict[str, float],
) -> list[Row]:
    """A row for each model, from what it computed (layer → fraction), its FLOPs and its time ratio."""
    return [
        Row(
            size,
            work,
            name,
            statistics.fmean(shares[name].values()) if shares[name] else None,
            flops[name] / flops["standard"],
            ratio,
        )
        for name, ratio in ratios.items()
    ]


def training_rows(models: dict, size: str, rows: int, length: int, repeats: int, device: str) -> list[Row]:
    """Forward, backward and AdamW step."""
    ids = tokens(rows, length, device)
    optimizers = {id(model): build_optimizer(model, OptimizerSettings()) for model in models.values()}

    def step(model: PreTrainedModel) -> None:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizers[id(model)].step()
        optimizers[id(model)].zero_grad()

    times = side_by_side(models, lambda model: timed(model, lambda: step(model)), repeats)
    flops, memory, shares = {}, {}, {}
    for name, model in models.items():
        memory[name] = saved_bytes(model, ids)
        with torch.no_grad():
            output = model.train()(input_ids=ids, use_cache=False)
        shares[name] = fractions_of(getattr(output, "routing", None), computed=True)
        flops[name] = training_flops(model.config, length, shares[name]).total()
    table = rows_of(size, f"training {rows}×{length}", shares, flops, times)
    return [replace(row, memory_ratio=memory[row.variant] / memory["standard"]) for row in table]


@torch.inference_mode()
def prefill_rows(models: dict, size: str, length: int, repeats: int, device: str) -> list[Row]:
    """Forward over one prompt, filling a cache, with logits of the last token."""
    ids = tokens(1, length, device, seed=99)

    def forward(model: PreTrainedModel):
        return model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)

    times = side_by_side(models, lambda model: timed(model, lambda: forward(model)), repeats)
    flops, shares, overhead = {}, {}, {}
    for name, model in models.items():
        output = forward(model)
        shares[name] = fractions_of(getattr(output, "routing", None), computed=False)
        account = forward_flops(model.config, length, shares[name])
        flops[name] = account.total() - account["lm_head"] * (1 - 1 / length)
        overhead[name] = kv_overhead(output.past_key_values, shares[name], length)
    table = rows_of(size, f"prefill 1×{length}", shares, flops, times)
    return [replace(row, kv_overhead=overhead[row.variant]) for row in table]


def kv_overhead(cache, fractions: dict[int, float], length: int) -> float:
    """Bytes of the cache's keys and values ÷ those of the tokens that the layers selected."""
    held = used = 0.0
    for index, layer in enumerate(cache.layers):
        if layer.keys is None:
            continue
        rows, heads, _, head_dim = layer.keys.shape
        held += 2 * layer.keys.numel() * layer.keys.element_size()
        used += 2 * rows * heads * head_dim * layer.keys.element_size() * fractions.get(index, 1.0) * length
    return held / used


@torch.inference_mode()
def decode_rows(
    models: dict, size: str, rows: int, prompt: int, steps: int, repeats: int, device: str
) -> list[Row]:
    """Cached greedy steps after a prompt of `prompt` tokens, without the prefill."""
    ids = tokens(rows, prompt, device, seed=98)
    shares: dict[str, dict[int, float]] = {name: {} for name in models}
    overhead = {}

    def decode(name: str, model: PreTrainedModel) -> float:
        output = model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = output.logits[:, -1:].argmax(-1)
        seen: list[dict] = []

        def run() -> None:
            nonlocal token
            for _ in range(steps):
                output = model(input_ids=token, past_key_values=cache, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                seen.append(getattr(output, "routing", None) or {})

        seconds = timed(model, run)
        routed = {layer: [step[layer].selected.float().mean().item() for step in seen] for layer in seen[0]}
        shares[name] = {layer: statistics.fmean(values) for layer, values in routed.items()}
        past = fractions_of(getattr(output, "routing", None), computed=False)
        whole = {
            layer: (past[layer] * prompt + shares[name][layer] * steps) / (prompt + steps) for layer in past
        }
        overhead[name] = kv_overhead(cache, whole, prompt + steps)
        return seconds

    names = {id(model): name for name, model in models.items()}
    times = side_by_side(models, lambda model: decode(names[id(model)], model), repeats)
    flops = {name: decode_flops(model, shares[name], prompt + steps / 2) for name, model in models.items()}
    table = rows_of(size, f"decode {rows}×{steps} after {prompt}", shares, flops, times)
    return [replace(row, kv_overhead=overhead[row.variant]) for row in table]


def decode_flops(model: PreTrainedModel, fractions: dict[int, float], length: float) -> float:
    """FLOPs of one token at `length`: one row of scores, over what each layer's cache holds."""
    assert isinstance(model.config, Qwen2Config)
    return forward_flops(model.config, round(length), fractions).total()


def trainer_rows(size: str, rows: int, length: int, steps: int, turns: int) -> list[Row]:
    """Our loop on the standard model against Hugging Face's `Trainer`: same blocks, AdamW and steps."""
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging as transformers_logging

    from dynamic_transformers.configure import settings_from_dict
    from dynamic_transformers.data.prepare import prepare
    from dynamic_transformers.manifest import read_manifest
    from dynamic_transformers.training.trainer import train

    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_from_dict(
            {
                "run": {"name": "speed", "output_dir": folder},
                "model": {"type": "standard", "size": size},
                "data": {
                    "dataset_configs": [{"name": "math", "type": "embedded"}],
                    "block_size": length,
                    "batch_size": rows,
                    "max_tokens": rows * length * (steps + 1),
                    "max_eval_tokens": 2 * length,
                },
                "training": {"max_steps": steps, "log_every": steps, "optimizer": {"warmup_fraction": 0}},
                "tracking": {"mlflow": False},
            }
        )
        data_dir = prepare(settings, Path(folder) / "data")
        optimizer = settings.training.optimizer
        vocab = read_manifest(data_dir)["vocab_size"]
        blocks = Dataset.load_from_disk(str(data_dir / "train")).select_columns(["input_ids"])
        blocks = blocks.add_column("labels", blocks["input_ids"])
        arguments = TrainingArguments(
            output_dir=f"{folder}/hf",
            max_steps=steps,
            per_device_train_batch_size=rows,
            learning_rate=optimizer.lr,
            lr_scheduler_type="cosine",
            adam_beta2=optimizer.betas[1],
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            optim="adamw_torch",
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )

        class Clock(TrainerCallback):
            """Seconds between the beginning and the end of each step."""

            seconds = 0.0

            def on_step_begin(self, *args, **kwargs):
                self.start = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                self.seconds += time.perf_counter() - self.start

        def huggingface(turn: int) -> float:
            torch.manual_seed(turn)
            model = MODEL_CLASSES["standard"][1](model_config(settings.model, vocab))
            clock = Clock()
            with contextlib.redirect_stdout(io.StringIO()):
                Trainer(model, arguments, train_dataset=blocks, callbacks=[clock]).train()
            return clock.seconds

        def ours(turn: int) -> float:
            run_dir = train(settings, data_dir, Path(folder) / f"run-{turn}")
            return read_manifest(run_dir)["training_seconds"]

        pairs = [(huggingface(turn), ours(turn)) for turn in range(turns + 1)][1:]
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    work = f"training {rows}×{length}, whole loop"
    return [
        Row(size, work, "standard, HF Trainer", None, 1.0, 1.0),
        Row(size, work, "standard, our loop", None, 1.0, ratio),
    ]


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The table; time ÷ FLOP is what the goals are about."""
    columns = (
        "size",
        "work",
        "model",
        "computed",
        "FLOP ratio",
        "time ratio",
        "time ÷ FLOP",
        "memory",
        "KV ÷ used",
    )
    table = Table(*columns, caption=title, box=box.MARKDOWN)
    for row in rows:
        optional = [
            "" if value is None else f"{value:.3f}"
            for value in (row.fraction, row.memory_ratio, row.kv_overhead)
        ]
        table.add_row(
            row.size,
            row.work,
            row.variant,
            optional[0],
            f"{row.flop_ratio:.3f}",
            f"{row.time_ratio:.3f}",
            f"{row.time_ratio / row.flop_ratio:.2f}",
            *optional[1:],
        )
    return table


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", default="base", help="of the settings' sizes, by commas (default: base, d 512)"
    )
    parser.add_argument("--lengths", default="512,2048,8192", help="of prompts")
    parser.add_argument("--training_lengths", default="512,2048,8192")
    parser.add_argument("--repeats", type=int, default=3, help="turns; the longest length takes one")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.md"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    console = Console(width=160)
    for size in args.sizes.split(","):
        models = {variant: build(variant, size, device) for variant in VARIANTS}
        for length in map(int, args.training_lengths.split(",")):
            repeats = 1 if length > 4096 else args.repeats
            rows += training_rows(models, size, max(1, 2048 // length), length, repeats, device)
            console.print(table_of(rows[-len(models) :], ""))
        for length in map(int, args.lengths.split(",")):
            rows += prefill_rows(models, size, length, args.repeats, device)
            console.print(table_of(rows[-len(models) :], ""))
        for batch in (1, 16):
            rows += decode_rows(models, size, batch, 512, 32, args.repeats, device)
            console.print(table_of(rows[-len(models) :], ""))
        del models
    if device == "cpu":
        rows += trainer_rows("small", 4, 256, 8, args.repeats)
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, fp32"
    )
    table = table_of(rows, f"{where}; torch {torch.__version__}")
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w") as file:
        Console(file=file, width=200).print(table)


if __name__ == "__main__":
    main()
