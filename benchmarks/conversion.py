"""How close routed models start to the Qwen2 that they are converted from: `python -m benchmarks.conversion`.

Loss in training mode, before any step, at full capacity (where a capacity warm-up begins) and at the default
capacity. MoD and STT start with gates near 1/2, SDT with 3/4: the rest of the distance is the gate.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data.loading import batches_of, load_split
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.training.build import build_model

BATCHES = 16


@torch.no_grad()
def training_loss(model, data_dir: Path) -> float:
    """Mean language-model loss over some validation batches, in training mode."""
    losses = []
    split = load_split(data_dir, "validation")
    for batch in itertools.islice(batches_of(split, 8), BATCHES):
        outputs = model.train()(**batch, use_cache=False)
        losses.append((getattr(outputs, "language_model_loss", None) or outputs.loss).item())
    return statistics.fmean(losses)


def main() -> None:
    """Convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="an exported standard model")
    parser.add_argument("--data_dir", type=Path, required=True)
    args = parser.parse_args()
    table = Table("model", "gate", "loss at capacity 1", "loss at γ", box=box.MARKDOWN)
    for architecture in ARCHITECTURES:
        cells = []
        for warmup in (1, 0):  # step 0 of a warm-up is full capacity
            overrides = [
                f"model.type={architecture}",
                f"model.pretrained={args.model_path}",
                "training.mode=pretrained",
                f"data.tokenizer_name={args.model_path}",
                f"model.capacity_warmup_steps={warmup}",
            ]
            model = build_model(compose_settings("default", overrides), vocab_size=1)
            if isinstance(model, RoutedForCausalLM):
                model.set_progress(0, 100)
            cells.append(f"{training_loss(model, args.data_dir):.3f}")
        gate = "–"
        if isinstance(model, RoutedForCausalLM):
            split = load_split(args.data_dir, "validation")
            batch = next(iter(batches_of(split, 8)))
            with torch.no_grad():
                routing = model.train()(**batch, use_cache=False).routing
            gate = f"{statistics.fmean(result.gate.mean().item() for result in routing.values()):.2f}"
        table.add_row(architecture, gate, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
