"""Our training loop's time against that of Hugging Face's `Trainer`, for `benchmarks.speed`."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.loading import load_split
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.training import trainer
from dynamic_transformers.training.build import model_config
from dynamic_transformers.training.step import OptimizerStep


class Clock(TrainerCallback):
    """Seconds from the start of the loop to the end of its last step."""

    seconds = 0.0

    def on_train_begin(self, *args, **kwargs):
        """Start."""
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        """Note the time so far."""
        self.seconds = time.perf_counter() - self.start


class TimedStep(OptimizerStep):
    """A step of ours; notes when the first began and the last ended."""

    began: float | None = None
    ended = 0.0

    def __call__(self, *args):
        """As usual, then note the time."""
        TimedStep.began = TimedStep.began or time.perf_counter()
        result = super().__call__(*args)
        TimedStep.ended = time.perf_counter()
        return result


def loop_ratios(size: str, rows: int, length: int, steps: int, turns: int) -> list[float]:
    """Our loop's time ÷ the Trainer's on the standard model: same blocks, collation, AdamW and steps."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_from_dict(
            {
                "run": {"name": "speed", "output_dir": folder},
                "model": {"type": "standard", "size": size},
                "data": {
                    "dataset_configs": [{"name": "math", "path": "embedded"}],
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
        split = load_split(data_dir, "train")
        arguments = TrainingArguments(
            output_dir=f"{folder}/hf",
            max_steps=steps,
            per_device_train_batch_size=rows,
            learning_rate=optimizer.lr,
            lr_scheduler_type="cosine",
            adam_beta2=optimizer.betas[1],
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            logging_steps=steps,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )

        def huggingface(turn: int) -> float:
            torch.manual_seed(turn)
            model = ARCHITECTURES["standard"].model_class(model_config(settings.model, vocab))
            clock, places = Clock(), cast(Any, range(len(split)))
            theirs = Trainer(
                model,
                arguments,
                data_collator=split.batch,
                train_dataset=places,
                callbacks=[clock],
            )
            with contextlib.redirect_stdout(io.StringIO()):
                theirs.train()
            return clock.seconds

        def ours(turn: int) -> float:
            TimedStep.began = None
            with patch.object(trainer, "OptimizerStep", TimedStep):
                trainer.train(settings, data_dir, Path(folder) / f"run-{turn}")
            assert TimedStep.began is not None
            return TimedStep.ended - TimedStep.began

        ratios = []
        for turn in range(turns + 1):
            if turn % 2:
                mine, theirs = ours(turn), huggingface(turn)
            else:
                theirs, mine = huggingface(turn), ours(turn)
            ratios.append(mine / theirs)
    return ratios[1:]
