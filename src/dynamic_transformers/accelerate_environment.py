"""What `accelerate launch` sets in the environment, held against the settings, which alone decide."""

from __future__ import annotations

import os

from dynamic_transformers.settings import Settings, UserError

PREFIX = "ACCELERATE_"
TRUE = ("1", "true", "yes", "y", "t", "on")
NAMES = {"USE_FSDP": "FSDP", "USE_DEEPSPEED": "DeepSpeed", "USE_MEGATRON_LM": "Megatron-LM"}
NAMES |= {"USE_PARALLELISM_CONFIG": "a parallelism configuration", "USE_SAGEMAKER": "SageMaker"}
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}  # system.precision → accelerate's word


def check_accelerate_environment(settings: Settings) -> None:
    """Refuse what the environment asks of accelerate and the settings do not.

    A value that `accelerate launch` sets where nothing was asked for (`no`, 1, False) says nothing.

    Raises:
        UserError: names the variable, and the setting to use in its place.
    """
    values = {key.removeprefix(PREFIX): value for key, value in os.environ.items() if key.startswith(PREFIX)}
    for key, name in NAMES.items():
        if values.get(key, "").lower() in TRUE:
            raise UserError(f"{PREFIX}{key}={values[key]}: training does not use {name}; leave it out")
    precision = values.get("MIXED_PRECISION", "no").lower()
    if precision not in ("no", MIXED_PRECISION[settings.system.precision]):
        ours = {word: name for name, word in MIXED_PRECISION.items()}.get(precision)
        _refuse("MIXED_PRECISION", precision, f"system.precision={ours}" if ours else "")
    steps = values.get("GRADIENT_ACCUMULATION_STEPS", "1")
    if _number("GRADIENT_ACCUMULATION_STEPS", steps) not in (
        1,
        settings.training.gradient_accumulation_steps,
    ):
        _refuse("GRADIENT_ACCUMULATION_STEPS", steps, f"training.gradient_accumulation_steps={steps}")
    clipping = values.get("GRADIENT_CLIPPING", "none").lower()
    norm = settings.training.optimizer.max_grad_norm
    if clipping != "none" and _number("GRADIENT_CLIPPING", clipping) != norm:
        _refuse("GRADIENT_CLIPPING", clipping, f"training.optimizer.max_grad_norm={clipping}")
    compiler = values.get("DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        _refuse("DYNAMO_BACKEND", compiler)
    if values.get("USE_CPU", "").lower() in TRUE and settings.system.device == "cuda":
        _refuse("USE_CPU", values["USE_CPU"], "system.device=cpu")
    device = values.get("TORCH_DEVICE", "")
    kinds = ("cpu", "cuda") if settings.system.device == "auto" else (settings.system.device,)
    if device and device.partition(":")[0] not in kinds:
        _refuse("TORCH_DEVICE", device, f"system.device={device}" if device in ("cpu", "cuda") else "")


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"{PREFIX}{key}={text}: give a number, or leave it out") from error


def _refuse(key: str, value: str, instead: str = "") -> None:
    reason = f"the settings decide; give {instead} instead" if instead else "not supported; leave it out"
    raise UserError(f"{PREFIX}{key}={value}: {reason}")
