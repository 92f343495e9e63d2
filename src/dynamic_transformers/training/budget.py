"""When a run ends: after so many steps, tokens or training FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, field

from dynamic_transformers.settings import TrainingSettings


@dataclass
class Progress:
    """Work done so far, over all ranks.

    Attributes:
        seconds: of training, without evaluation and checkpoints.
        selected_tokens: routed layer → tokens that its block computed.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    selected_tokens: dict[str, float] = field(default_factory=dict)


@dataclass
class Budget:
    """A limit in one unit.

    Attributes:
        unit: `step`, `tokens` or `flops`, an attribute of `Progress`.
        limit: in that unit.
    """

    unit: str
    limit: float

    @classmethod
    def from_settings(cls, training: TrainingSettings) -> Budget:
        """The one budget that is set."""
        if training.max_steps is not None:
            return cls("step", training.max_steps)
        if training.max_tokens is not None:
            return cls("tokens", training.max_tokens)
        assert training.max_flops is not None
        return cls("flops", training.max_flops)

    def total_steps(self, done: Progress, step_tokens: float, step_flops: float) -> int:
        """Steps of the whole run, if those to come cost as much as `step_tokens` and `step_flops` say.

        A run ends at the step nearest to its limit: runs of equal budget differ by half a step at most.
        """
        cost = {"step": 1.0, "tokens": step_tokens, "flops": step_flops}[self.unit]
        left = (self.limit - getattr(done, self.unit)) / cost
        return max(1, done.step + max(0, round(left)))
