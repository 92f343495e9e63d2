"""Time of each architecture against standard, beside its FLOPs: `make speed`.

All models of a row run in turn (A B C D, B C D A, …) in one process, so that drift of the machine hits all
alike; figures are medians of the ratio within a turn. Weights and tokens are random, and thresholds are
calibrated on the tokens measured: this is about time at a given fraction, not about which tokens deserve it.
FLOP ratios use the fractions that the measured forwards realised. Training rows are packed documents, as
ours are; decoding gives an attention mask, as `generate` does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, Qwen2Config

from benchmarks.trainer_loop import loop_ratios
from dynamic_transformers.data.blocks import IGNORED
from dynamic_transformers.evaluation.efficiency import timed
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.settings import ModelSettings, OptimizerSettings
from dynamic_transformers.training.build import model_config
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.flops import forward_flops, training_flops
from dynamic_transformers.training.optimizer import build_optimizer

VOCAB = 8192
LONG = 4096  # tokens of a row from which memory is not measured
# Each architecture; where some layers are routed, at its own capacity and at 0.5.
VARIANTS = {name: ModelSettings(name) for name, record in ARCHITECTURES.items() if not record.routed} | {
    f"{name} {capacity:g}": ModelSettings(name, capacity=capacity)
    for name, record in ARCHITECTURES.items()
    if record.routed
    for capacity in sorted({record.config_class().capacity, 0.5})  # type: ignore[attr-defined]  # of a routed one
}


@dataclass
class Row:
    """One line of the table; ratios are to standard.

    Attributes:
        fraction: of the tokens that the routed layers selected, mean.
        time_spread: half of the range of the middle half of the turns.
    """

    size: str
    work: str
    variant: str
    fraction: float | None
    flop_ratio: float
    time_ratio: float
    time_spread: float | None
    memory_ratio: float | None = None
    kv_overhead: float | None = None


def build(variant: str, size: str, device: str) -> PreTrainedModel:
    """A model with random weights."""
    torch.manual_seed(0)
    settings = VARIANTS[variant]
    settings.size = size
    config = model_config(settings, VOCAB)
    config._attn_implementation = "sdpa"
    model = ARCHITECTURES[settings.type].model_class(config).to(device)  # type: ignore[arg-type]  # their decorator loses self
    if isinstance(model, RoutedForCausalLM):
        model.set_progress(1, 2)
    return model


def calibrate_all(models: dict[str, PreTrainedModel], ids: torch.Tensor) -> None:
    """Let every routed layer's threshold select the fraction γ of these tokens."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    for model in models.values():
        if isinstance(model, RoutedForCausalLM):
            calibrate(model, [{"input_ids": ids, "position_ids": positions}])


def tokens(rows: int, length: int, device: str, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)


def packed(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    """A training batch of documents of 32 to 512 random tokens, packed as `data.packing` does."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 513, (rows, length // 32), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row])[:length] for row in lengths.tolist()])
    ids = tokens(rows, length, device)
    positions = positions.to(device)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, IGNORED)}


def side_by_side(names: list[str], work: Callable[[str], float], seconds: float) -> dict[str, list[float]]:
    """Each model's time ÷ standard's within a turn, for as many turns as begin in `seconds`.

    After a warm-up turn, at least three; a single turn without a warm-up where that takes longer than all.
    """
    turns: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(turns) < 4 or time.perf_counter() - start < seconds:
        first = len(turns) % len(names)
        turns.append({name: work(name) for name in names[first:] + names[:first]})
        if len(turns) == 1 and time.perf_counter() - start > seconds:
            break
    turns = turns[1:] or turns
    return {name: [turn[name] / turn["standard"] for turn in turns] for name in names}


def saved_bytes(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that a training forward keeps for its backward; on a GPU its peak, gradients included."""
    if batch["input_ids"].is_cuda:
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model.train()(**batch, use_cache=False).loss.backward()
        peak = torch.cuda.max_memory_allocated() - before
        model.zero_grad()
        return peak
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(**batch, use_cache=False)
    total = sum(kept.values())
    del output
    return total


def fractions_of(output) -> dict[int, float]:
    """Layer → fraction of tokens selected.

    Raises:
        RuntimeError: a layer selects all or none, so that its row would say nothing about gathering.
    """
    routing = getattr(output, "routing", None) or {}
    fractions = {layer: result.selected.float().mean().item() for layer, result in routing.items()}
    return checked(fractions)


def checked(fractions: dict[int, float]) -> dict[int, float]:
    """The fractions, none of which may be 0 or 1."""
    if degenerate := {layer: value for layer, value in fractions.items() if value in (0, 1)}:
        raise RuntimeError(f"layers that select all or no tokens: {degenerate}")
    return fractions


def rows_of(
    size: str,
    work: str,
    shares: dict[str, dict[int, float]],
    flops: dict[str, float],
    ratios: dict[str, list[float]],
) -> list[Row]:
    """A row for each model, from what it selected (layer → fraction), its FLOPs and its time ratios."""
    return [
        Row(
            size,
            work,
            name,
            statistics.fmean(shares[name].values()) if shares[name] else None,
            flops[name] / flops["standard"],
            *median_and_spread(of_turns),
        )
        for name, of_turns in ratios.items()
    ]


def median_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Median, and half of the range of the middle half; None for fewer than four values."""
    if len(values) < 4:
        return statistics.median(values), None
    low, middle, high = statistics.quantiles(values)
    return middle, (high - low) / 2


def training_rows(models: dict, size: str, rows: int, length: int, seconds: float, device: str) -> list[Row]:
    """Forward, backward and AdamW step."""
    batch = packed(rows, length, device)
    optimizers = {name: build_optimizer(model, OptimizerSettings()) for name, model in models.items()}
    shares: dict[str, dict[int, float]] = {}

    def step(name: str) -> float:
        outputs = []

        def run() -> None:
            outputs.append(models[name].train()(**batch, use_cache=False))
            outputs[0].loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        elapsed = timed(models[name], run)
        shares[name] = fractions_of(outputs[0])
        return elapsed

    times = side_by_side(list(models), step, seconds)
    flops = {
        name: training_flops(model.config, length, shares[name]).total() for name, model in models.items()
    }
    table = rows_of(size, f"training {rows}×{length}", shares, flops, times)
    if length > LONG:
        return table
    memory = {name: saved_bytes(model, batch) for name, model in models.items()}
    return [replace(row, memory_ratio=memory[row.variant] / memory["standard"]) for row in table]


@torch.inference_mode()
def prefill_rows(models: dict, size: str, length: int, seconds: float, device: str) -> list[Row]:
    """Forward over one prompt, filling a cache, with logits of the last token."""
    ids = tokens(1, length, device, seed=99)
    calibrate_all(models, ids)

    def forward(model: PreTrainedModel):
        return model.eval()(input_ids=ids, use_cache=True, logits_to_keep=1)

    times = side_by_side(
        list(models), lambda name: timed(models[name], lambda: forward(models[name])), seconds
    )
    flops, shares, overhead = {}, {}, {}
    for name, model in models.items():
        output = forward(model)
        shares[name] = fractions_of(output)
        account = forward_flops(model.config, length, shares[name])
        flops[name] = account.total() - account["lm_head"] * (1 - 1 / length)
        overhead[name] = kv_overhead(output.past_key_values, model.config, shares[name], length)
    table = rows_of(size, f"prefill 1×{length}", shares, flops, times)
    return [replace(row, kv_overhead=overhead[row.variant]) for row in table]


def kv_overhead(cache, config: Qwen2Config, fractions: dict[int, float], seen: int) -> float:
    """Bytes of the cache's keys and values ÷ those of the tokens selected, of `seen` tokens of all rows."""
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    head_dim = config.hidden_size // config.num_attention_heads
    assert config.num_key_value_heads is not None
    token = 2 * config.num_key_value_heads * head_dim * 4  # bytes in fp32, as all of this
    return held / sum(token * seen * fractions.get(layer, 1.0) for layer in range(len(cache.layers)))


@torch.inference_mode()
def decode_rows(
    models: dict, size: str, rows: int, prompt: int, steps: int, seconds: float, device: str
) -> list[Row]:
    """Cached steps of one token a row after a prompt of `prompt` tokens, without the prefill.

    The tokens are given: a random model that chose its own would repeat one of them.
    """
    ids = tokens(rows, prompt + steps, device, seed=1)
    mask = torch.ones_like(ids)
    calibrate_all(models, ids)
    shares: dict[str, dict[int, float]] = {}
    flops: dict[str, float] = {}
    overhead: dict[str, float] = {}

    def decode(name: str) -> float:
        model = models[name]
        assert isinstance(model.config, Qwen2Config)
        prefill = model.eval()(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
        cache = prefill.past_key_values
        seen: list[dict] = []

        def run() -> None:
            for place in range(prompt, prompt + steps):
                output = model(
                    input_ids=ids[:, place : place + 1],
                    attention_mask=mask[:, : place + 1],
                    past_key_values=cache,
                    use_cache=True,
                )
                seen.append(getattr(output, "routing", None) or {})

        elapsed = timed(model, run)
        held = {layer: prompt * value for layer, value in fractions_of(prefill).items()}
        sums, total = dict.fromkeys(held, 0.0), 0.0
        for length, routing in enumerate(seen, prompt + 1):
            now = {layer: result.selected.float().mean().item() for layer, result in routing.items()}
            held = {layer: held[layer] + value for layer, value in now.items()}
            sums = {layer: sums[layer] + value for layer, value in now.items()}
            total += forward_flops(model.config, length, now, held).total()
        shares[name] = checked({layer: value / steps for layer, value in sums.items()})
        flops[name] = total / steps
        whole = {layer: value / (prompt + steps) for layer, value in held.items()}
        overhead[name] = kv_overhead(cache, model.config, whole, rows * (prompt + steps))
        return elapsed

    times = side_by_side(list(models), decode, seconds)
    table = rows_of(size, f"decode {rows}×{steps} after {prompt}", shares, flops, times)
    return [replace(row, kv_overhead=overhead[row.variant]) for row in table]


@torch.inference_mode()
def linear_rows(size: str, batch: int, seconds: float, device: str) -> list[Row]:
    """The linear maps of all layers on 1, a half and all of `batch` rows: what decoding fewer rows can save.

    They read the same weights for any number of rows, so that time falls by less than FLOPs.
    """
    model = build("standard", size, device)
    maps = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    counts = {"1 row": 1, "half of the rows": batch // 2, "standard": batch}

    def run(name: str) -> float:
        inputs = {m.in_features: torch.ones(counts[name], m.in_features, device=device) for m in maps}
        return timed(model, lambda: [m(inputs[m.in_features]) for m in maps])

    times = side_by_side(list(counts), run, seconds)
    return [
        Row(
            size, f"linear maps, {batch} rows", name, None, counts[name] / batch, *median_and_spread(of_turns)
        )
        for name, of_turns in times.items()
    ]


def loop_rows(size: str, rows: int, length: int, steps: int, turns: int) -> list[Row]:
    """Our loop on the standard model against Hugging Face's `Trainer`."""
    ratios = loop_ratios(size, rows, length, steps, turns)
    work = f"training {rows}×{length}, whole loop"
    return [
        Row(size, work, "standard, HF Trainer", None, 1.0, 1.0, None),
        Row(size, work, "standard, our loop", None, 1.0, *median_and_spread(ratios)),
    ]


def table_of(rows: Sequence[Row], title: str) -> Table:
    """The table; time ÷ FLOP is what the goals are about."""
    columns = (
        "size",
        "work",
        "model",
        "selected",
        "FLOP ratio",
        "time ratio",
        "±",
        "time ÷ FLOP",
        "memory",
        "KV ÷ used",
    )
    table = Table(*columns, caption=title, box=box.MARKDOWN)
    for row in rows:
        optional = [
            "" if value is None else f"{value:.3f}"
            for value in (row.fraction, row.time_spread, row.memory_ratio, row.kv_overhead)
        ]
        table.add_row(
            row.size,
            row.work,
            row.variant,
            optional[0],
            f"{row.flop_ratio:.3f}",
            f"{row.time_ratio:.3f}",
            optional[1],
            f"{row.time_ratio / row.flop_ratio:.2f}",
            *optional[2:],
        )
    return table


def whole_numbers(text: str) -> list[int]:
    """The numbers in "1,16"; none in ""."""
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", default="base", help="of the settings' sizes, by commas (default: base, d 512)"
    )
    parser.add_argument("--lengths", default="512,2048,8192", help="of prompts")
    parser.add_argument("--training_lengths", default="512,2048,8192")
    parser.add_argument("--batches", default="1,16", help="rows of the decode blocks")
    parser.add_argument("--seconds", type=float, default=40.0, help="for each block of the table")
    parser.add_argument("--loop_turns", type=int, default=7, help="of the training loops; 0: leave them out")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed.md"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    console = Console(width=160)
    for size in args.sizes.split(","):
        models = {variant: build(variant, size, device) for variant in VARIANTS}
        for length in whole_numbers(args.lengths):
            rows += prefill_rows(models, size, length, args.seconds, device)
            console.print(table_of(rows[-len(models) :], ""))
        for batch in whole_numbers(args.batches):
            rows += decode_rows(models, size, batch, 512, 64, args.seconds, device)
            console.print(table_of(rows[-len(models) :], ""))
            if batch > 1:
                rows += linear_rows(size, batch, args.seconds / 8, device)
        # Last, since it changes the weights.
        for length in whole_numbers(args.training_lengths):
            rows += training_rows(models, size, max(1, 2048 // length), length, args.seconds, device)
            console.print(table_of(rows[-len(models) :], ""))
    if args.loop_turns:
        rows += loop_rows("small", 4, 256, 24, args.loop_turns)
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
