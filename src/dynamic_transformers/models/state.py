"""What changes a routed model's forward and is no weight: thresholds and β.

All layers' numbers lie in one module, `model.routing_state`. A forward reads them and only notes what it saw;
they move between forwards, once for each optimizer step: `set_progress` before it, `advance` after it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration import RoutedConfig, SurpriseConfig

LONGEST_DECAY = 0.99  # ρ of the thresholds' moving average; shorter runs take less
WARMUP_LEVELS = 4  # values of the training capacity before it is γ
KINDS = {"threshold": 0, "calibrated_predictor": 1}  # selection rules that have a τ → its row of `thresholds`
PATIENCE = 10  # training forwards until somebody is told that nobody moves the schedules


class Fp32Module(nn.Module):
    """A module whose own parameters and buffers stay in fp32 when a model is cast: rounding decides."""

    def _apply(self, fn, recurse=True):
        before = {name: value.detach() for name, value in self._own()}
        super()._apply(fn, recurse)
        for name, value in self._own():
            if value.dtype != before[name].dtype:
                value.data = before[name].to(value.device)
        return self

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters(recurse=False)
        yield from self.named_buffers(recurse=False)


@dataclass
class LayerState:
    """What one routed layer reads in a forward.

    Attributes:
        threshold: τ of its scores, ().
        predictor_threshold: τ of its predictor's logits, ().
        beta: β of the surprise gate, (1,).
        training_capacity: γ of the top-k in training.
        training_rule: who selects in training: `topk`, or `threshold` once its warm-up is over.
    """

    threshold: Tensor
    predictor_threshold: Tensor
    beta: Tensor
    training_capacity: float
    training_rule: str


class RoutingState(Fp32Module):
    """τ of every routed layer, and β.

    τ is the bias-corrected moving average of the (1 − γ) quantile of training scores: a constant of the
    checkpoint, so that selection by it is exactly causal. After Expert Threshold routing (arXiv 2603.11535).
    Before any training step τ is 0. R is the number of routed layers.

    Attributes:
        thresholds: (2, R), those of the scores and those of the predictors' logits.
        weights: (2, R), total weight of the quantiles in each before the correction; towards 1.
        beta: (1,).
        decay: ρ.
        training_capacity: γ in training; more than the configured one while it warms up.
        training_rule: as configured, `topk` in its warm-up.
        unmoved: training forwards before the first `set_progress`; None after it.
    """

    thresholds: Tensor
    weights: Tensor
    beta: Tensor

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.config = config
        shape = (2, len(config.routed_layers))
        self.register_buffer("thresholds", torch.zeros(shape))
        self.register_buffer("weights", torch.zeros(shape))
        self.register_buffer("beta", torch.full((1,), beta_at(config, 0, 1)))
        self.decay = LONGEST_DECAY
        self.training_capacity = config.capacity
        self.training_rule = "topk"
        self.unmoved: int | None = 0
        # Sums and counts of the step's quantiles, (2, 2, R). No buffer: DDP would overwrite it with rank 0's.
        self._seen: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> list[LayerState]:
        """What each routed layer reads, on the device of the hidden states."""
        device = hidden_states.device
        (scores, logits), beta = self.thresholds.to(device), self.beta.to(device)
        return [
            LayerState(score, logit, beta, self.training_capacity, self.training_rule)
            for score, logit in zip(scores.unbind(), logits.unbind(), strict=True)
        ]

    def set_progress(self, step: int, total_steps: int) -> None:
        """Move the schedules to optimizer step `step` of `total_steps`.

        The training capacity falls from 1 to γ over the first `capacity_warmup_steps`, in `WARMUP_LEVELS`
        equal jumps: a compiled forward is compiled anew for each number of tokens. `topk` selects meanwhile,
        and over `training_rule_warmup` of the run, at least in its first step: τ is not known before. The
        thresholds look back over a twentieth of the run at most, but ten steps at least: in a run of a few
        hundred steps ρ = 0.99 would still hold what early weights scored.
        """
        warmup = self.config.capacity_warmup_steps
        done = min(1.0, step * WARMUP_LEVELS // warmup / WARMUP_LEVELS) if warmup else 1.0
        self.training_capacity = 1.0 + (self.config.capacity - 1.0) * done
        first = max(1, warmup, math.ceil(self.config.training_rule_warmup * total_steps))
        self.training_rule = self.config.training_rule if step >= first else "topk"
        self.beta.fill_(beta_at(self.config, step, total_steps))
        self.decay = min(LONGEST_DECAY, 1 - 1 / max(10.0, total_steps / 20))
        self.unmoved = None
        if self._seen is None:  # made here, so that a compiled forward finds it from the first step on
            self._seen = self.thresholds.new_zeros(2, *self.thresholds.shape)

    def note(self, quantiles: Tensor) -> None:
        """Remember a training forward's quantiles until the step ends; not where nothing learns from it.

        Args:
            quantiles: (2, R), NaN where there is none; those that are not finite do not count.
        """
        if not torch.is_grad_enabled():
            return
        known = quantiles.isfinite()
        seen = torch.stack([torch.where(known, quantiles, 0), known.float()])
        self._seen = seen if self._seen is None else self._seen + seen
        if self.unmoved is not None and not torch.compiler.is_compiling():
            self.unmoved += 1
            if self.unmoved == PATIENCE:
                warnings.warn(
                    "a routed model trains and nobody moves its schedules and thresholds: call "
                    "model.set_progress(step, total_steps) before each optimizer step and model.advance() "
                    "after it, or give Trainer a RoutingCallback",
                    stacklevel=2,
                )

    @torch.no_grad()
    def advance(self, keep: bool = True) -> None:
        """End an optimizer step: one step of the average, over its forwards and over ranks.

        With several ranks all of them call this; it is their only exchange.

        Args:
            keep: false forgets what the step's forwards saw, as after a step without an update.
        """
        seen, self._seen = self._seen, None
        if not keep:
            return
        total = torch.zeros(2, *self.thresholds.shape) if seen is None else seen
        total = total.to(self.thresholds.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        sums, counts = total
        step = (1 - self.decay) * (counts > 0)  # padding alone leaves the average as it is
        self.weights.lerp_(torch.ones_like(self.weights), step)
        distance = sums / counts.clamp(min=1) - self.thresholds
        self.thresholds += torch.where(counts > 0, step / self.weights * distance, 0)

    def set_threshold(self, rule: str, layer: int, value: Tensor) -> None:
        """Put a measured τ in place; training, if it goes on, averages anew.

        Args:
            rule: whose τ, of `KINDS`.
            layer: its place among the routed layers.
        """
        self.thresholds[KINDS[rule], layer] = value
        self.weights[KINDS[rule], layer] = 0

    @property
    def fresh(self) -> bool:
        """Whether no threshold was ever set; waits for the GPU."""
        return not bool(self.thresholds.any())


def beta_at(config: RoutedConfig, step: int, total_steps: int) -> float:
    """β at a step: `beta_start` in the warm-up, then to `beta_end` at the last step; 1 without a gate.

    The warm-up is at most half of the run, since β would otherwise never move in a short one.
    """
    if not isinstance(config, SurpriseConfig):
        return 1.0
    warmup = min(config.beta_warmup_steps, total_steps // 2)
    progress = min(1.0, max(0.0, (step - warmup) / max(1, total_steps - 1 - warmup)))
    if config.beta_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.beta_start + (config.beta_end - config.beta_start) * progress
