"""Which settings decide the numbers of a training, and which only say how it is done and looked at."""

from __future__ import annotations

from typing import Any

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


def settings_identity(settings: Settings, processes: int = 1) -> dict[str, Any]:
    """The settings of model and training that decide a run's numbers, by key; but for its budget and data.

    Args:
        processes: that train it, over all nodes; how the batch is split over them does not count.
    """
    values = settings.to_dict()
    training = values["training"]
    accumulation = training["gradient_accumulation_steps"]
    model = settings.model
    split_counts = model.type != "standard" and (
        model.selection_rule == "random" or model.training_rule == "threshold"
    )
    return {
        **flat({"model": values["model"] | {"size": None, "dimensions": vars(settings.model.backbone)}}),
        **flat({"training": {key: value for key, value in training.items() if key not in FREE}}),
        "run.seed": settings.run.seed,
        "system.precision": settings.system.precision,
        "system.compile": settings.system.compile,
        "global_batch": settings.data.batch_size * accumulation * processes,
        # Each process draws its own noise for each forward, and has its own quantile for the thresholds.
        **({"batch_split": [processes, accumulation]} if split_counts else {}),
    }


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c`, JSON-able."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result
