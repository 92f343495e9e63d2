"""Conversations as token ids, by the tokenizer's own chat template; the assistant's turns have a loss."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from datetime import date
from typing import Any

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dynamic_transformers.data.encoding import Encoded
from dynamic_transformers.settings import UserError

# Every turn ends with the end of text, which also begins the conversation, as it does documents.
PLAIN_TEMPLATE = (
    "{{ eos_token }}"
    "{% for message in messages %}"
    "{{ message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)

BREAK = "\ufdd0"  # stands in the spelling of a special token while the template is rendered; no character
# For templates that write the date; Llama 3.1's writes this one if it knows no other.
TODAY = date(2024, 7, 26)
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
THOUGHT = re.compile(r"<think(ing)?>\s*(</think(ing)?>\s*)?\Z")
NEVER = "(?!)"  # a pattern that matches nothing
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)

logger = logging.getLogger("dynamic_transformers")


class ConversationEncoder:
    """Encodes conversations by a tokenizer's chat template.

    The ids are those of `tokenizer.apply_chat_template` (with special tokens recognised), but for two things.
    The spelling of a special token within a message stays text, as it does in documents (one that the
    template puts together from several strings does not; tokens that are added but not special, such as
    Qwen3's `<think>`, are tokens wherever they stand). And a template that writes today's date writes 26 July
    2024, so that the same data give the same tokens on any day.

    The turns of the assistant are what the template's `{% generation %}` blocks hold. Where it has none, a
    turn is what its message adds to the conversation before it with `add_generation_prompt`: without the
    role's header, with the end marker, without white space after that. (The header of a template that knows
    no `add_generation_prompt` is part of the turn.) Some templates without such blocks rewrite a turn once
    others follow, as Qwen3's does, which takes earlier thoughts out. Then only those turns have a loss that
    the whole conversation holds as the model would have written them: for Qwen3, the last one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Take over the template and a copy of the rules of a tokenizer that `exact_tokenizer` made.

        Raises:
            UserError: the tokenizer has no chat template, or a broken one.
        """
        try:
            template = tokenizer.get_chat_template()
            self._template = NOW.sub(lambda match: repr(TODAY.strftime(match[2])), template)
            render_jinja_template([], chat_template=self._template)  # compiles it
        except TemplateSyntaxError as error:
            raise UserError(
                f"data.tokenizer_name: line {error.lineno} of the chat template: {error.message}"
            ) from error
        except ValueError as error:
            raise UserError(
                "data.tokenizer_name: the tokenizer has no chat template, which conversations need: "
                "choose a tokenizer with one"
            ) from error
        self._has_generation = GENERATION.search(template) is not None
        self._template_values = tokenizer.special_tokens_map

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = False  # its name means: as text
        # Special tokens are found before the text is normalized, when a broken spelling is none.
        steps = [normalizers.Replace(BREAK, ""), self._backend.normalizer]
        self._backend.normalizer = normalizers.Sequence([step for step in steps if step])

        added = self._backend.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        self._special_ids = np.array(list(special.values()))
        self._beginning = re.compile(_beginnings(special))
        self._closing = re.compile(rf"({'|'.join(map(re.escape, special)) or NEVER})\s*\Z")
        self._has_warned = False

    def __call__(self, messages: Sequence[dict[str, Any]]) -> Encoded:
        """Encode one conversation: messages with `role`, `content` and what else the template reads.

        A token that holds the end of a role's header and the beginning of a turn counts the turn's bytes.

        Raises:
            ValueError: the template refuses it, no turn of the assistant has a loss, it is no valid UTF-8, or
                it spells a special token that this tokenizer or template cannot take as text. The message is
                one line.
        """
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        broken = self._break(messages)
        text, spans = self._render(broken)
        spelt = broken != messages
        if spelt and text.replace(BREAK, "") != self._render(messages)[0]:
            raise ValueError("the chat template acts on the spelling of a special token in a message")
        if not self._has_generation:
            spans = self._turns(broken, text)

        widths = _utf8_widths(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        special = np.isin(ids, self._special_ids)
        found = zip(starts[special], ends[special], strict=True)
        if spelt and any(BREAK in text[start:end] for start, end in found):
            raise ValueError("a message spells a special token, which this tokenizer cannot take as text")

        in_turn = np.zeros(len(text), dtype=bool)
        for start, end in spans:
            in_turn[start:end] = True
        turn_characters = _before(in_turn)
        targets = turn_characters[ends] > turn_characters[starts]
        targets[:1] = False
        if not targets.any():
            raise ValueError("there is no turn of the assistant")

        num_bytes = np.where(targets, _of_tokens(widths * in_turn, ends), _of_tokens(widths, ends))
        num_bytes[special] = 0
        return Encoded(ids, num_bytes.astype(np.uint32), targets)

    def _break(self, value: Any) -> Any:
        """Put BREAK behind the first character of every spelling of a special token."""
        if isinstance(value, str):
            if BREAK in value:
                raise ValueError("holds U+FDD0, which is no character")
            return self._beginning.sub(rf"\g<0>{BREAK}", value)
        if isinstance(value, dict):
            return {self._break(key): self._break(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._break(item) for item in value]
        return value

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where its `{% generation %}` blocks begin and end in it."""
        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._has_generation,
                **self._template_values,
                **options,
            )
        except REFUSALS as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template refuses it: {reason}") from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _turns(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Where the assistant's turns begin and end in the text of all messages."""
        turns = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        spans = [span for index in turns if (span := self._turn(messages, index, text))]
        if turns and not spans:
            raise ValueError(
                "the chat template writes each turn of the assistant in another way once others follow"
            )
        if len(spans) < len(turns) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "some turns of the assistant have no loss: the chat template has no {% generation %} blocks, "
                "and does not allow such a turn first or writes it in another way once others follow"
            )
        return spans

    def _turn(self, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int] | None:
        try:
            before, _ = self._render(messages[:index], add_generation_prompt=True)
            through = text if index == len(messages) - 1 else self._render(messages[: index + 1])[0]
        except ValueError:  # the template needs another message first
            return None
        # What a model is given to begin its thoughts with does not stand in front of an answer without any.
        prompts = [before, THOUGHT.sub("", before)]
        starts = [len(p) for p in prompts if text.startswith(p) and through.startswith(p)]
        if not starts:
            return None
        start = starts[0]
        turn = through[start:]
        # A template may close the conversation behind its last turn, as Phi-3's does.
        while not text.startswith(turn, start):
            if not (closing := self._closing.search(turn)):
                return None
            turn = turn[: closing.start()]
        return start, start + len(self._closing.sub(r"\1", turn))


def _beginnings(spellings: Iterable[str]) -> str:
    """Pattern of a first character that the rest of a spelling follows; quick where there are a thousand."""
    rests: dict[str, list[str]] = {}
    for spelling in spellings:
        rests.setdefault(re.escape(spelling[0]), []).append(re.escape(spelling[1:]))
    return "|".join(f"{first}(?={'|'.join(rest)})" for first, rest in rests.items()) or NEVER


def _utf8_widths(text: str) -> np.ndarray:
    """UTF-8 bytes of each character; a BREAK has none."""
    try:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError as error:
        raise ValueError("no valid UTF-8") from error
    widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return widths * (codes != ord(BREAK))


def _of_tokens(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sum of the characters' values for each token; a character that tokens share counts for the first."""
    return np.diff(_before(values)[np.maximum.accumulate(ends)], prepend=0)


def _before(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, … n values."""
    return np.concatenate([[0], np.cumsum(values)])
