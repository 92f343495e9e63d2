"""What a run is at a step: all that a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.settings import Settings
from dynamic_transformers.training.budget import Budget, Progress
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dynamic_transformers.training.optimizer import build_optimizer


@dataclass
class TrainingState:
    """State of a run.

    Attributes:
        model: as accelerate wraps it.
        plain: the model itself.
        schedule: what the schedules stretch over.
        identity: the settings that decide the numbers.
    """

    model: PreTrainedModel
    plain: PreTrainedModel
    optimizer: torch.optim.Optimizer
    schedule: Budget
    identity: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    @property
    def config(self) -> Qwen2Config:
        """Of the model."""
        assert isinstance(self.plain.config, Qwen2Config)
        return self.plain.config

    def load(self, checkpoint: Checkpoint, reschedule: bool) -> None:
        """Go on from a checkpoint, with its schedule unless a new one is asked for."""
        load_checkpoint(checkpoint, self.plain, self.optimizer)
        self.progress = checkpoint.progress
        if not reschedule:
            self.schedule = checkpoint.schedule

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        save_checkpoint(folder, self.plain, self.optimizer, self.progress, self.identity, self.schedule)


def fresh_state(
    settings: Settings, data_dir: Path, identity: dict[str, Any], accelerator: Accelerator
) -> TrainingState:
    """State at step 0: initial or pretrained weights.

    Raises:
        UserError: the tokenizer or the pretrained weights cannot be read, or do not fit.
    """
    training = settings.training
    tokenizer = load_tokenizer(data_dir)
    set_seed(settings.run.seed)
    plain = build_model(settings, len(tokenizer), *special_tokens(tokenizer))
    if training.gradient_checkpointing:
        plain.activation_checkpointing_enable({"use_reentrant": False})
    model, optimizer = accelerator.prepare(plain, build_optimizer(plain, training.optimizer))
    plain = accelerator.unwrap_model(model)
    if settings.system.compile:
        plain.compile(fullgraph=True)
    return TrainingState(model.train(), plain, optimizer, Budget.from_settings(training), identity)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids that begin, end and pad a text; the end of text where the tokenizer has no other."""
    end: Any = tokenizer.eos_token_id
    known: list[Any] = [tokenizer.bos_token_id, end, tokenizer.pad_token_id]
    return [end if token is None else token for token in known]
