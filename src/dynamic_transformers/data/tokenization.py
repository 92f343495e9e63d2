"""The tokenizer (trained here, or taken from the hub), and documents as token ids with byte counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from dynamic_transformers.data.documents import Document
from dynamic_transformers.settings import UserError

END_OF_TEXT = "<|endoftext|>"
LONG_WORD = re.compile(r"(\S{1000}|\s{1000})")


class EncodedDocument(NamedTuple):
    """Token ids (int32) of one document, markers included, and the UTF-8 bytes each of them stands for."""

    document: Document
    input_ids: np.ndarray
    num_bytes: np.ndarray


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `<|endoftext|>` begins and ends documents and pads.

    Args:
        vocab_size: at least 257: every byte, and the end of text.
    """
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
    return exact_tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def exact_tokenizer(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that reads a text in one way only, wherever it is loaded.

    It has no rules beyond tokenizer.json, adds no markers by itself, and splits the spelling of a special
    token: a text that mentions `<|endoftext|>` does not end there.

    Args:
        options: special tokens, chat template.
    """
    backend = Tokenizer.from_str(backend.to_str())
    backend.post_processor = None  # type: ignore[assignment]  # which would add markers
    backend.no_padding()
    backend.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, split_special_tokens=True, **options
    )


def load_pretrained_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Tokenizer of a folder or hub name.

    Raises:
        UserError: there is none, it is not a fast one (no offsets), or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]) -> list[EncodedDocument]:
    """`[bos or eos] + tokens + [eos]` for each document; markers count 0 bytes."""
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    batch = tokenizer(
        [document.text for document in documents],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encoded = []
    for document, ids, offsets in zip(documents, batch["input_ids"], batch["offset_mapping"], strict=True):
        input_ids = np.array([begin, *ids, end], dtype=np.int32)
        num_bytes = np.zeros(len(input_ids), dtype=np.int32)
        num_bytes[1:-1] = _bytes_of_tokens(document.text, offsets)
        encoded.append(EncodedDocument(document, input_ids, num_bytes))
    return encoded


def _bytes_of_tokens(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    ends = np.array([end for _, end in offsets], dtype=np.int64)
    if not len(ends):
        return ends
    # Tokens that share a character share its offsets: the running maximum counts it for the first.
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)  # some tokenizers drop white space at the end of a text
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
        ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    return np.diff(ends, prepend=0)
