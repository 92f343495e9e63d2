"""One optimizer step, and what it reports."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.models.selection import RoutingResult
from dynamic_transformers.settings import OptimizerSettings
from dynamic_transformers.training.optimizer import learning_rate_factor, set_learning_rate


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        losses: by metric name, means over the step's targets.
        routing: routed layer → what `routing_measures` names.
        learning_rate: of the base group.
        updated: false where a loss or the gradient's norm is not finite: nothing has changed then.
        wishes: for each of the step's `wishes`, whether any rank had it.
    """

    losses: dict[str, float]
    routing: dict[int, dict[str, float]]
    learning_rate: float
    updated: bool
    wishes: list[bool]


class OptimizerStep:
    """One update from `accumulation` micro-batches on every rank.

    The loss is the sum over all targets of the step divided by their number, so it does not depend on how the
    step is cut into micro-batches and ranks.

    Args:
        model, optimizer: as `accelerator.prepare` gives them.
        micro_batches: endless, of this rank.
        seed: of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        micro_batches: Iterator[dict[str, torch.Tensor]],
        settings: OptimizerSettings,
        accumulation: int,
        seed: int,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.micro_batches, self.settings = micro_batches, settings
        self.accumulation, self.seed = accumulation, seed

    def __call__(self, step: int, schedule_steps: int, wishes: Callable[[], list[bool]]) -> StepResult:
        """Do step number `step`, counted from 0, of schedules that stretch over `schedule_steps`.

        Args:
            wishes: those of this rank, which all ranks get to know; asked for as late as can be.
        """
        accelerator = self.accelerator
        plain = accelerator.unwrap_model(self.model)
        routed = isinstance(plain, RoutedForCausalLM)
        seed_step(self.seed, step, accelerator.process_index)
        if routed:
            plain.set_progress(step, schedule_steps)
        batches = [next(self.micro_batches) for _ in range(self.accumulation)]
        counts = torch.tensor([sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)])
        targets = accelerator.reduce(counts.to(accelerator.device), "sum")[0]
        factor = learning_rate_factor(self.settings, step, schedule_steps)
        set_learning_rate(self.optimizer, factor)
        share = 1 / (self.accumulation * accelerator.num_processes)
        losses: dict[str, torch.Tensor] = {}
        routing: dict[tuple[int, str], torch.Tensor] = {}
        for index, batch in enumerate(batches):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            syncs = index == self.accumulation - 1
            with contextlib.nullcontext() if syncs else accelerator.no_sync(self.model):
                # Blocks in which the assistant says nothing make a step without targets, and its loss 0.
                divisor = targets.clamp(min=1)
                outputs = self.model(**batch, num_items_in_batch=divisor, use_cache=False)
                # DDP averages over ranks; the loss is already a share of the whole step.
                accelerator.backward(outputs.loss * accelerator.num_processes)
            add(losses, "train/total_loss", outputs.loss.detach())
            if not routed:
                add(losses, "train/loss", outputs.loss.detach())
                continue
            add(losses, "train/loss", outputs.language_model_loss.detach())
            for name, value in outputs.auxiliary_losses.items():
                add(losses, f"train/{name}_loss", value.detach())
            for layer, result in outputs.routing.items():
                for name, value in routing_measures(result).items():
                    add(routing, (layer, name), value * share)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        asked = torch.tensor(wishes(), dtype=torch.float32, device=accelerator.device)
        figures = torch.cat([torch.stack([*losses.values(), *routing.values()]).float(), asked])
        reduced = accelerator.reduce(figures, "sum")
        assert isinstance(reduced, torch.Tensor) and norm is not None
        values = iter(reduced.tolist())
        means = {name: next(values) for name in losses} | {"train/grad_norm": float(norm)}
        measured: dict[int, dict[str, float]] = {}
        for layer, name in routing:
            measured.setdefault(layer, {})[name] = next(values)
        updated = all(map(math.isfinite, means.values()))
        if updated:
            self.optimizer.step()
        if routed:
            plain.advance(keep=updated)
        self.optimizer.zero_grad()
        return StepResult(
            means, measured, self.settings.lr * factor, updated, [value > 0 for value in values]
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make all random numbers of a step, those of random routing, a function of seed, step and rank."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]) >> 1)


def routing_measures(result: RoutingResult) -> dict[str, torch.Tensor]:
    """Means over a batch of what one routed layer did.

    `fraction` of the tokens selected; `computed`: places that the block ran on, more where rows differ in
    what they select; of STT's teacher the mean of g, and of g².
    """
    fraction = result.selected.float().mean()
    measures = {"fraction": fraction, "computed": torch.full_like(fraction, result.computed)}
    if result.surprise_gate is not None:
        gate = result.surprise_gate.float()
        measures |= {"teacher_gate": gate.mean(), "teacher_gate_squared": gate.square().mean()}
    return measures


def add(sums: dict, key, value: torch.Tensor) -> None:
    """sums[key] += value."""
    sums[key] = sums[key] + value if key in sums else value
