"""When a run ends, in steps, tokens or training FLOPs, and over how many steps its schedules stretch."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Qwen2Config

from dynamic_transformers.settings import TrainingSettings
from dynamic_transformers.training.flops import target_fraction, training_flops


@dataclass
class Progress:
    """Work done so far, over all ranks; a checkpoint holds it.

    Attributes:
        seconds: of training, without evaluation and checkpoints.
        skipped: steps without an update, since a loss or a gradient was not finite.
        skipped_in_a_row: those of them after the last update.
        selected_tokens: routed layer → tokens that it selected.
        unlogged: sums of the losses since the last log line, their number of steps under `steps`.
        evaluation: step and loss of the last evaluation.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    selected_tokens: dict[str, float] = field(default_factory=dict)
    unlogged: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)


@dataclass
class Budget:
    """A limit in one unit.

    Attributes:
        unit: `step`, `tokens` or `flops`, an attribute of `Progress`.
        limit: in that unit.
    """

    unit: str
    limit: float

    def __str__(self) -> str:
        return f"{self.limit:.15g} {'steps' if self.unit == 'step' else self.unit}"

    @classmethod
    def from_settings(cls, training: TrainingSettings) -> Budget:
        """The one budget that is set."""
        if training.max_steps is not None:
            return cls("step", training.max_steps)
        if training.max_tokens is not None:
            return cls("tokens", training.max_tokens)
        assert training.max_flops is not None
        return cls("flops", training.max_flops)

    def total_steps(
        self, done: Progress, step_tokens: float, step_flops: float, final_flops: float = 0.0
    ) -> int:
        """Steps of the whole run, if those to come cost as much as `step_tokens` and `step_flops` say.

        A run ends at the step nearest to its limit: runs of equal budget differ by half a step at most.

        Args:
            final_flops: of what is done after the last step; a budget of FLOPs leaves room for it.
        """
        cost = {"step": 1.0, "tokens": step_tokens, "flops": step_flops}[self.unit]
        reserved = final_flops if self.unit == "flops" else 0.0
        left = (self.limit - reserved - getattr(done, self.unit)) / cost
        return max(1, done.step + max(0, round(left)))


@dataclass
class Horizon:
    """How far a run goes. All its answers follow from the work done, so a resumed run gets the same ones.

    Attributes:
        budget: when the run ends.
        schedule: over what the schedules stretch; another budget only where a run is extended.
        model_config: of the model, for its FLOPs.
        step_tokens: of one optimizer step, over all ranks.
        block_size: tokens of one block.
        final_flops: of the calibration after the last step.
    """

    budget: Budget
    schedule: Budget
    model_config: Qwen2Config
    step_tokens: int
    block_size: int
    final_flops: float = 0.0

    def step_flops(self, computed: dict[int, float] | None = None) -> float:
        """Training FLOPs of one step; `computed`: layer → places its block ran on ÷ all tokens."""
        return self.step_tokens * training_flops(self.model_config, self.block_size, computed).total()

    def total_steps(self, done: Progress) -> int:
        """At which step the run ends, as far as can be told now."""
        return self._total(self.budget, done)

    def schedule_steps(self, done: Progress) -> int:
        """How many steps the schedules stretch over, as far as can be told now."""
        return self._total(self.schedule, done)

    def _total(self, budget: Budget, done: Progress) -> int:
        measured = target_fraction(self.model_config) is None and done.step > 0
        step_flops = done.flops / done.step if measured else self.step_flops()
        return budget.total_steps(done, self.step_tokens, step_flops, self.final_flops)
