"""Which settings decide the numbers of a training, and which only say how it is done and looked at."""

from __future__ import annotations

from typing import Any

from dynamic_transformers.reading import flat
from dynamic_transformers.settings import Settings

# Settings of `training` that change no number of a run; the batch is in `global_batch`.
FREE = (
    "max_steps",
    "max_tokens",
    "max_flops",
    "gradient_accumulation_steps",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "max_skipped_steps",
    "resume",
    "reschedule",
    "gradient_checkpointing",
)

# How a size is asked for does not count, but what it comes to.
SIZE_AS_DIMENSIONS = {"size": None, "depth_factor": None, "width_factor": None}


def resolved_model(settings: Settings) -> dict[str, Any]:
    """The settings of the model, each size in one form only: as the dimensions that it comes to."""
    model = settings.to_record()["model"]
    if settings.model.architecture.settings is None:
        model["options"] = {}  # of a plugin, which this model is not of
    return {**model, **SIZE_AS_DIMENSIONS, "dimensions": vars(settings.model.backbone)}


def settings_identity(settings: Settings, processes: int = 1) -> dict[str, Any]:
    """The settings of model and training that decide a run's numbers, by key; but for its budget and data.

    Args:
        processes: that train it, over all nodes; how the batch is split over them does not count.
    """
    values = settings.to_dict()
    training = values["training"]
    accumulation = training["gradient_accumulation_steps"]
    model = settings.model
    split_counts = model.architecture.routed and (
        model.selection_rule == "random" or model.training_rule == "threshold"
    )
    return {
        **flat({"model": resolved_model(settings)}),
        **flat({"training": {key: value for key, value in training.items() if key not in FREE}}),
        "run.seed": settings.run.seed,
        "system.precision": settings.system.precision,
        "system.compile": settings.system.compile,
        "global_batch": settings.data.batch_size * accumulation * processes,
        # Each process draws its own noise for each forward, and has its own quantile for the thresholds.
        **({"batch_split": [processes, accumulation]} if split_counts else {}),
    }
