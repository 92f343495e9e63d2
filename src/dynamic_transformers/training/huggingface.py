"""Routed models in Hugging Face's `Trainer`, and in what builds on it, such as TRL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from dynamic_transformers.settings import UserError
from dynamic_transformers.training.calibration import Batches, calibrate


class RoutingCallback(TrainerCallback):
    """Moves what our own loop moves: schedules before each step, thresholds after it, calibration at the end.

    Without it β and the training capacity stay at their start, and no threshold is ever set. A model with
    adapters, or loaded with `trust_remote_code`, is as good; one that routes nothing is left alone. Save the
    model after `train()`: the Trainer's checkpoints hold the averages of training, not the calibration.

        Trainer(model, arguments, train_dataset=rows, callbacks=[RoutingCallback(batches)])

    Args:
        batches: held-out text for the calibration, as `calibrate` takes it: some ten thousand tokens; None:
            the averages of training remain, which hold γ less well.
    """

    def __init__(self, batches: Batches | None = None):
        self.batches = None if batches is None else list(batches)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Refuse `nn.DataParallel`, whose copies of a model forget what they saw.

        Raises:
            UserError: the Trainer would use several GPUs from one process.
        """
        if args.n_gpu > 1:
            raise UserError(
                f"Trainer uses {args.n_gpu} GPUs from one process: start it with accelerate launch"
            )

    def on_step_begin(self, args, state, control, *, model, **kwargs) -> None:
        """Move the schedules to this step."""
        for routed in routed_models(model):
            routed.set_progress(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, *, model, **kwargs) -> None:
        """Move the thresholds by what this step's forwards saw."""
        for routed in routed_models(model):
            routed.advance()

    def on_train_end(self, args, state, control, *, model, **kwargs) -> None:
        """Calibrate by the batches, if there are any."""
        if self.batches is not None:
            for routed in routed_models(model):
                with whole(model):
                    calibrate(routed, self.batches)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Give each rank all weights of what FSDP2 has sharded: calibration runs layer by layer."""
    shards = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in shards:
        part.unshard()
    try:
        yield
    finally:
        for part in shards:
            part.reshard()


def routed_models(model: nn.Module) -> list[Any]:
    """The routed language model inside `model`, whatever wraps it; its class may be of an exported folder."""
    return [
        part for part in model.modules() if isinstance(getattr(type(part), "routing_state", None), property)
    ]
