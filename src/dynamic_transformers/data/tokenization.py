"""The tokenizer (trained here, or taken from the hub)."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dynamic_transformers.data.encoding import Encoder
from dynamic_transformers.data.hub import how_to_load
from dynamic_transformers.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
LONG_WORD = re.compile(r"(\S{1000}|\s{1000})")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|endoftext|>` begins and ends documents and pads.

    Args:
        vocab_size: at least 257: every byte, and the end of text.
    """
    # Not above: the processes that read shards need nothing of it.
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(models.BPE())
    # Qwen2's own rule, which splits digits. Its NFC step is left out, so that decoding gives back exactly
    # what was encoded.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Training takes time by the square of a word's length: without a gap, a megabyte would take minutes.
    pieces = (piece for text in texts for piece in LONG_WORD.split(text) if piece)
    backend.train_from_iterator(pieces, trainer)
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return exact_tokenizer(backend, chat_template=chat_template, **tokens)


def exact_tokenizer(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that reads a text in one way only, wherever it is loaded.

    It has no rules beyond tokenizer.json, adds no markers by itself, and splits the spelling of a special
    token: a text that mentions `<|endoftext|>` does not end there. With a chat template it does not split it,
    since transformers tokenizes what the template writes as a text.

    Args:
        options: special tokens, chat template.
    """
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(backend.to_str())
    backend.post_processor = None  # type: ignore[assignment]  # which would add markers
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        split_special_tokens=options.get("chat_template") is None,
        **options,
    )


def load_pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Tokenizer of a folder or hub name.

    Raises:
        UserError: there is none, it is not a fast one (no offsets), or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **how_to_load(name))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.tokenizer_name={name}: no tokenizer in that folder or on the hub: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer_name={name}: needs a fast tokenizer (one with a tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"data.tokenizer_name={name}: has no eos_token, which documents must end with")
    return exact_tokenizer(
        tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template, **tokenizer.special_tokens_map
    )


def marker_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Ids of what begins and what ends a document."""
    end = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    begin = tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token)) if tokenizer.bos_token else end
    assert isinstance(begin, int) and isinstance(end, int)
    return begin, end


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """What encodes texts as documents are."""
    return Encoder(tokenizer.backend_tokenizer, *marker_ids(tokenizer))


class Sample:
    """Documents of the lowest ranks, as few as have a number of characters: what a tokenizer is trained on.

    Args:
        characters: of all texts together; the last one may pass it.
    """

    def __init__(self, characters: float):
        self.characters, self.held = characters, 0
        self._texts: dict[int, str] = {}  # by rank
        self._highest: list[int] = []  # a heap of negative ranks

    def add(self, rank: int, text: str) -> None:
        """Take a text, unless others come before it, or it is there."""
        if rank in self._texts or (self.held >= self.characters and rank > -self._highest[0]):
            return
        self._texts[rank] = text
        heapq.heappush(self._highest, -rank)
        self.held += len(text)
        while self.held - len(self._texts[-self._highest[0]]) >= self.characters:
            self.held -= len(self._texts.pop(-heapq.heappop(self._highest)))

    def texts(self) -> list[tuple[int, str]]:
        """Ranks and texts, in the order of the ranks."""
        return sorted(self._texts.items())
