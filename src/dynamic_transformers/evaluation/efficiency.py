"""What inference costs: time measured side by side, KV bytes read off the cache, FLOPs counted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dynamic_transformers.evaluation.exported import load_model

REPEATS = 7
DECODED_TOKENS = 32


@dataclass
class Throughput:
    """Speed of one model on this machine.

    Attributes:
        prefill_tokens_per_second: forward over a prompt, batch 1, eval mode.
        decode_tokens_per_second: cached greedy decoding, batch 1.
        kv_bytes_per_token: bytes of the cache's tensors per token of the sequence.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    kv_bytes_per_token: float


@torch.inference_mode()
def measure_side_by_side(model_dirs: Sequence[Path], prompts: Sequence[list[int]]) -> list[Throughput]:
    """Median speed of several models, measured in turn (A B C, A B C, …) so that drift hits all alike.

    Args:
        model_dirs: exported models.
        prompts: token ids of one prompt for each model.
    """
    models = [load_model(folder) for folder in model_dirs]
    inputs = [torch.tensor([ids], device=models[0].device) for ids in prompts]
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    for repeat in range(REPEATS + 1):
        for index, (model, prompt) in enumerate(zip(models, inputs, strict=True)):
            seconds = prefill_seconds(model, prompt)
            decoded = decode_seconds(model, prompt)
            if repeat == 0:  # warm-up
                continue
            prefill[index].append(seconds)
            decode[index].append(decoded)
    return [
        Throughput(
            prompt.shape[1] / statistics.median(prefill[index]),
            DECODED_TOKENS / statistics.median(decode[index]),
            kv_bytes_per_token(model, prompt),
        )
        for index, (model, prompt) in enumerate(zip(models, inputs, strict=True))
    ]


def prefill_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Seconds of one forward over a prompt that fills a cache."""
    return timed(model, lambda: model(input_ids=prompt, use_cache=True))


def decode_seconds(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Seconds of `DECODED_TOKENS` cached greedy steps after a prompt, without the prefill."""
    output = model(input_ids=prompt, use_cache=True)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)

    def steps() -> None:
        nonlocal token
        for _ in range(DECODED_TOKENS):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return timed(model, steps)


def kv_bytes_per_token(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Bytes of keys and values that the cache holds after a prompt, per token of the prompt."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    # A routed layer that has selected no token yet has no tensors.
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / prompt.shape[1]


def timed(model: PreTrainedModel, function) -> float:
    """Seconds that `function` takes, the device's queue included."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
