"""lm-eval's Hugging Face model, which here counts what each task makes the model compute.

It pads with a mask, so that padding takes no capacity, and makes the logits of continuations alone, a part
at a time: lm-eval's own makes those of all tokens of a batch, and in a second copy their logarithms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from dynamic_transformers.training.losses import token_losses
from dynamic_transformers.training.realised import SelectionCounts, selections

logger = logging.getLogger("dynamic_transformers")

HFLM: Any = huggingface.HFLM  # its registration decorator hides the signature
Request = tuple[Any, list[int], list[int]]  # texts, context and continuation


class CountingLM(HFLM):
    """A causal model behind lm-eval's interface.

    Attributes:
        counts: task → what the model computed of its rows. Texts that agree in all but their last token are
            one row.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_length: int
    ):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=max_length,
        )
        self.counts: dict[str, SelectionCounts] = {}
        self._task = ""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As in lm-eval, task by task."""
        return self._task_by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As in lm-eval, task by task."""
        return self._task_by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """As in lm-eval, task by task."""
        return self._task_by_task(super().generate_until, requests, disable_tqdm)

    def _task_by_task(
        self, answers_to: Callable[..., list[Any]], requests: list[Instance], disable_tqdm: bool
    ) -> list[Any]:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name or "", []).append(place)
        answers: dict[int, Any] = {}
        for self._task, of_task in places.items():
            found = answers_to([requests[place] for place in of_task], disable_tqdm=disable_tqdm)
            answers |= zip(of_task, found, strict=True)
        return [answers[place] for place in range(len(requests))]

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        rows: dict[tuple[int, ...], list[int]] = {}
        cut = 0
        for place, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length
            text = context + continuation
            cut += len(text) > self.max_length + 1
            rows.setdefault(tuple(text[-(self.max_length + 1) : -1]), []).append(place)
        if cut:
            logger.warning(
                "%s: %d texts are longer than the model's %d tokens, and are cut on the left",
                self._task,
                cut,
                self.max_length,
            )
        answers: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(rows, key=len, reverse=True)
        size = override_bs or self.batch_size
        batches = [longest_first[start : start + size] for start in range(0, len(rows), size)]
        for batch in tqdm(batches, desc=self._task, leave=False, disable=disable_tqdm or None):
            states, targets, asked = [], [], []
            for row, of_row in zip(batch, self._read(batch), strict=True):
                for place in rows[row]:
                    continuation = requests[place][2]
                    states.append(of_row[len(row) - len(continuation) : len(row)])
                    targets += continuation
                    asked.append(place)
            losses, likeliest = token_losses(
                self.model, torch.cat(states), torch.tensor(targets, device=self.device)
            )
            lengths = [len(part) for part in states]
            for place, nats, greedy in zip(
                asked, losses.split(lengths), likeliest.split(lengths), strict=True
            ):
                answers[place] = -nats.double().sum().item(), bool(greedy.all())
        return [answers[place] for place in range(len(requests))]

    def _read(self, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The last hidden states of rows, the longest first, (B, T, D)."""
        lengths = torch.tensor([len(row) for row in batch])
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for place, row in enumerate(batch):
            ids[place, : len(row)] = torch.tensor(row)
        valid = torch.arange(len(batch[0])) < lengths.unsqueeze(1)
        mask = None if valid.all() else valid.long().to(self.device)
        outputs = self.model.base_model(input_ids=ids.to(self.device), attention_mask=mask, use_cache=False)
        self._count(selections(outputs), valid.to(self.device))
        return outputs.last_hidden_state

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """As lm-eval's own, but each row ends at its own stop, and is counted up to there."""
        stops = RowStops(self.tokenizer, stop, self.model.generation_config.eos_token_id, context.shape[1])
        steps: list[tuple[dict[int, torch.Tensor], torch.Tensor]] = []

        def note(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            valid = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
            valid = valid.bool() & ~stops.ended_among(len(ids)).to(valid.device).unsqueeze(1)
            if output.past_key_values is None:  # which reads all rows again in each step
                self._count(selections(output), valid)
            else:
                steps.append((selections(output), valid))

        if not options["do_sample"]:
            options.pop("temperature", None)  # lm-eval's 0, of which transformers would warn
        hook = self.model.register_forward_hook(note, with_kwargs=True)
        try:
            return self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([stops]),
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
        finally:
            hook.remove()
            if steps:
                layers = steps[0][0]
                selected = {layer: torch.cat([chosen[layer] for chosen, _ in steps], 1) for layer in layers}
                self._count(selected, torch.cat([valid for _, valid in steps], 1))

    def _count(self, selected: dict[int, torch.Tensor], valid: torch.Tensor) -> None:
        self.counts.setdefault(self._task, SelectionCounts()).add(selected, valid)


class RowStops(StoppingCriteria):
    """Ends each row at a stop string or EOS token of its own.

    lm-eval's ends a batch where one and the same stop string has been in all of its rows.

    Args:
        eos: token or tokens.
        start: tokens of the prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: list[str], eos: int | list[int] | None, start: int
    ):
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        self.eos = torch.tensor([] if eos is None else eos, dtype=torch.long).flatten()
        # As many tokens as in lm-eval: a model may spell a stop string in more tokens than the tokenizer.
        self.window = 2 + max(
            (len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops), default=0
        )
        self.ended: torch.Tensor | None = None  # (B,)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        """Rows of (B, T) that end with their last token, (B,) bool."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :][:, -self.window :])
        found = torch.tensor([any(stop in text for stop in self.stops) for text in texts])
        found |= torch.isin(input_ids[:, -1].cpu(), self.eos)
        self.ended = found | self.ended_among(len(found))
        return found.to(input_ids.device)

    def ended_among(self, rows: int) -> torch.Tensor:
        """Rows that have ended, (B,) bool; none of a beam search, which tries more rows than it keeps."""
        if self.ended is None or len(self.ended) != rows:
            return torch.zeros(rows, dtype=torch.bool)
        return self.ended
