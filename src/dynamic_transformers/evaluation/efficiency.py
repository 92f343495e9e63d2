"""What inference costs: time measured side by side on given text, KV bytes read off the cache.

Models read and decode tokens of the test split, never what they would say themselves: a text that a model
makes up may repeat one token, of which routed layers compute none or all. The fraction that the timed
forwards computed is kept, so that a speed stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamic_transformers.data.blocks import Blocks
from dynamic_transformers.data.loading import batches_of
from dynamic_transformers.evaluation.exported import load_model
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.training.realised import selections

PROMPTS = 64  # at most
DECODED_TOKENS = 16  # of each prompt: many prompts of few tokens say more of a split than the reverse
TURNS, SECONDS = 2, 10.0  # over all prompts of a pair of models; after the first, none begins later than that
WARM_UP = 4  # prompts


@dataclass
class Prompt:
    """A block of the test split, read as one text.

    Attributes:
        ids: token ids.
        prefilled: how many of them are read at once; the others one at a time.
        text: what the ids say, for a model with another tokenizer.
    """

    ids: list[int]
    prefilled: int
    text: str


@dataclass
class Subject:
    """A model to be measured: an exported folder, the precision of its weights, what it reads."""

    folder: Path
    dtype: str
    prompts: Sequence[Prompt]


@dataclass
class Speed:
    """Speed of one model on this machine, batch 1.

    Attributes:
        prefill_tokens_per_second: forwards over the prompts' first parts, which fill a cache.
        decode_tokens_per_second: cached steps over the tokens that follow; None where the selection rule has
            no cache.
        timed_routed_fraction: `prefill` and `decode` → layer → fraction of the timed tokens that it computed.
        timed_prompts: `number` of prompts; `prefill` and `decode` → tokens of a prompt, mean over prompts.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    timed_routed_fraction: dict[str, dict[int, float]]
    timed_prompts: dict[str, float]


@dataclass
class Timing:
    """One kind of work of one model, prompt by prompt.

    Attributes:
        seconds: prompt → of each turn.
        tokens: of all prompts.
        read: of all prompts in all turns.
        selected: layer → how many of these it computed.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    tokens: int = 0
    read: int = 0
    selected: dict[int, int] = field(default_factory=dict)

    def note(self, prompt: int, seconds: float, outputs: Sequence) -> None:
        """Add a turn over a prompt: how long it took, and the forwards' outputs."""
        self.seconds.setdefault(prompt, []).append(seconds)
        for output in outputs:
            for layer, mask in selections(output).items():
                self.selected[layer] = self.selected.get(layer, 0) + int(mask.sum())
            length = output.logits.shape[1]
            self.read += length
            self.tokens += length * (len(self.seconds[prompt]) == 1)

    @property
    def total(self) -> float:
        """Seconds of all prompts, of each the faster turn: the rest is what else the machine did."""
        return sum(map(min, self.seconds.values()))

    @property
    def fractions(self) -> dict[int, float]:
        """Layer → fraction of the tokens that it computed."""
        return {layer: count / self.read for layer, count in self.selected.items()}


Timings = dict[str, Timing]  # `prefill`, and `decode` where there is a cache


def choose_prompts(split: Blocks, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Different blocks at even distances over the split, `PROMPTS` or all; whole, as FLOPs are counted."""
    count = min(PROMPTS, len(split))
    chosen = []
    for number in range(count):
        ids = split.input_ids(len(split) * number // count).tolist()
        decoded = min(DECODED_TOKENS, len(ids) // 2)
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        chosen.append(Prompt(ids, len(ids) - decoded, text))
    return chosen


def in_tokens_of(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same texts as another tokenizer cuts them; as many tokens of each are decoded."""
    encoded = [tokenizer(prompt.text)["input_ids"] for prompt in prompts]
    return [
        Prompt(ids, max(1, len(ids) - len(prompt.ids) + prompt.prefilled), prompt.text)
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]


def measure_side_by_side(reference: Subject, others: Sequence[Subject]) -> list[Speed]:
    """Speed of the reference and of the others, which are loaded one at a time beside it.

    The two of a pair read each prompt in turn, so that drift of the machine hits both alike. Pairs do not
    compare: a speed is given as the reference's usual one times the ratio of its own pair. The reference's
    usual time of a kind of work is the median over pairs (of an even number the upper of the middle two).

    Returns:
        The reference's speed, then the others'.
    """
    model = load_model(reference.folder, dtype=reference.dtype)
    if not others:
        (alone,) = time_in_turn([(model, reference.prompts)])
        return [speed_of(alone, alone, alone)]
    pairs: list[list[Timings]] = []
    for subject in others:
        other = load_model(subject.folder, dtype=subject.dtype)
        pairs.append(time_in_turn([(model, reference.prompts), (other, subject.prompts)]))
        del other
    usual = {
        work: sorted((own[work] for own, _ in pairs), key=lambda timing: timing.total)[len(pairs) // 2]
        for work in pairs[0][0]
    }
    return [speed_of(usual, usual, usual), *(speed_of(theirs, own, usual) for own, theirs in pairs)]


def speed_of(timings: Timings, beside: Timings, usual: Timings) -> Speed:
    """Speed of a model that was timed `beside` the reference, as if the reference took its `usual` time."""

    def rate(work: str) -> float:
        drift = beside[work].total / usual[work].total if work in beside else 1.0
        return timings[work].tokens / timings[work].total * drift

    return Speed(
        rate("prefill"),
        rate("decode") if "decode" in timings else None,
        {work: timing.fractions for work, timing in timings.items()},
        {"number": len(timings["prefill"].seconds)}
        | {work: timing.tokens / len(timing.seconds) for work, timing in timings.items()},
    )


@torch.inference_mode()
def time_in_turn(subjects: Sequence[tuple[PreTrainedModel, Sequence[Prompt]]]) -> list[Timings]:
    """Time one or two models on their prompts, prompt by prompt in turn, the other one first each time."""
    for model, prompts in subjects:
        for number, prompt in enumerate(prompts[:WARM_UP]):
            time_prompt(model, prompt, number, {})
    timings: list[Timings] = [{} for _ in subjects]
    start = time.monotonic()
    for turn in range(TURNS):
        if turn and time.monotonic() - start > SECONDS:
            break
        for number in range(len(subjects[0][1])):
            order = list(zip(subjects, timings, strict=True))
            for (model, prompts), noted in order[:: -1 if (turn + number) % 2 else 1]:
                time_prompt(model, prompts[number], number, noted)
    return timings


def time_prompt(model: PreTrainedModel, prompt: Prompt, number: int, timings: Timings) -> None:
    """Read a prompt's first part at once, then the rest one by one, and note how long each took."""
    ids = torch.tensor([prompt.ids], device=model.device)
    outputs = []
    seconds = timed(
        model, lambda: outputs.append(model(input_ids=ids[:, : prompt.prefilled], use_cache=True))
    )
    timings.setdefault("prefill", Timing()).note(number, seconds, outputs)
    cache = outputs.pop().past_key_values
    if cache is None:
        return

    def steps() -> None:
        for place in range(prompt.prefilled, len(prompt.ids)):
            outputs.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True))

    timings.setdefault("decode", Timing()).note(number, timed(model, steps), outputs)


@torch.inference_mode()
def kv_bytes_per_token(model: PreTrainedModel, split: Blocks, batch_size: int) -> float | None:
    """Bytes of keys and values that the cache holds per token of a split; None for a rule without a cache."""
    if isinstance(model, RoutedForCausalLM) and not model.model.cacheable:
        return None
    held = tokens = 0
    for batch in batches_of(split, batch_size):
        ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
        cache = model.base_model(input_ids=ids, position_ids=positions, use_cache=True).past_key_values
        # A routed layer that has selected no token yet has no tensors.
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        held += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        tokens += ids.numel()
    return held / tokens


def timed(model: PreTrainedModel, function: Callable[[], object]) -> float:
    """Seconds that `function` takes, the device's queue included."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
