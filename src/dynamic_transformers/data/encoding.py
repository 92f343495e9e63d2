"""Texts as token ids, and how many bytes of text each token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

if TYPE_CHECKING:  # it imports transformers, which texts need not
    from dynamic_transformers.data.conversations import ConversationEncoder
    from dynamic_transformers.data.documents import Document

# Of the parts in which a text is tokenized: small ones stay in the processor's cache, which takes less time.
PART_CHARACTERS = 2_500
MOST_CHARACTERS = 200_000  # of a part without a place to cut: bounds the memory that it takes
PARTS_TOGETHER = 100
WORD_END = re.compile(r"(?<=[^\W_])(?=\s)")


class Encoded(NamedTuple):
    """Tokens of a document, n of them, markers included.

    input_ids: (n,) int32.
    num_bytes: (n,) uint32, UTF-8 bytes that each token stands for.
    targets: (n,) bool, which tokens have a loss; None: all that something in front predicts.
    """

    input_ids: np.ndarray
    num_bytes: np.ndarray
    targets: np.ndarray | None = None


class Encoder:
    """Texts as token ids and the UTF-8 bytes that each of them stands for, markers included.

    A text becomes `[bos or eos] + tokens + [eos]`; markers count 0 bytes.

    Args:
        backend: of a tokenizer that `exact_tokenizer` made.
        begin, end: the markers' ids.

    Attributes:
        byte_lengths: as the function gives them.
        vocab_size: every id is below it.
    """

    def __init__(self, backend: Tokenizer, begin: int, end: int):
        backend.encode_special_tokens = True
        self.backend, self.begin, self.end = backend, begin, end
        self.byte_lengths = byte_lengths(backend)
        self._keeps_words_apart = keeps_words_apart(backend)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def __call__(self, texts: Sequence[str]) -> list[Encoded]:
        """The texts, in their order."""
        if self.byte_lengths is None:
            return [self._by_offsets(text) for text in texts]
        pieces = [cut_long_text(text) if self._keeps_words_apart else [text] for text in texts]
        ids = self._ids([piece for parts in pieces for piece in parts])
        encoded = []
        for text, parts in zip(texts, pieces, strict=True):
            found = chain.from_iterable(islice(ids, len(parts)))
            encoded.append(self._by_table(text, np.fromiter(found, np.int32)))
        return encoded

    def _ids(self, parts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of each part; few encodings are held, since one takes a hundred bytes a token."""
        for start in range(0, len(parts), PARTS_TOGETHER):
            batch = parts[start : start + PARTS_TOGETHER]
            for encoding in self.backend.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids

    def _by_table(self, text: str, ids: np.ndarray) -> Encoded:
        assert self.byte_lengths is not None
        widths = self.byte_lengths[ids]
        if widths.sum() != len(text.encode()):
            return self._by_offsets(text)  # the tokenizer has changed the text: a normalizer, usually
        return self._marked(ids, widths)

    def _by_offsets(self, text: str) -> Encoded:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return self._marked(np.array(encoding.ids, dtype=np.int32), _bytes_by_offsets(text, encoding.offsets))

    def of_tokens(self, ids: np.ndarray) -> Encoded:
        """Tokens that another program made with this tokenizer, which must be a byte-level one."""
        assert self.byte_lengths is not None
        return self._marked(ids, self.byte_lengths[ids])

    def _marked(self, ids: np.ndarray, widths: np.ndarray) -> Encoded:
        input_ids = np.concatenate([[self.begin], ids, [self.end]], dtype=np.int32, casting="unsafe")
        return Encoded(input_ids, np.concatenate([[0], widths, [0]], dtype=np.uint32, casting="unsafe"))


def byte_lengths(backend: Tokenizer) -> np.ndarray | None:
    """UTF-8 bytes that each token of a byte-level tokenizer stands for, (V,) uint32; None for another one."""
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    # Each character of such a token is one byte; added tokens are written as they are.
    lengths = np.zeros(1 + max(backend.get_vocab(with_added_tokens=True).values()), dtype=np.uint32)
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        lengths[number] = len(token)
    for number, added in backend.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    return lengths


def keeps_words_apart(backend: Tokenizer) -> bool:
    """Whether no token goes over the end of a word into white space, as those of SuperBPE do."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.rstrip or WORD_END.search(token.content) for token in added):
        return False
    decoder = ByteLevel()
    tokens = backend.get_vocab(with_added_tokens=False)
    return not any(WORD_END.search(decoder.decode([token])) for token in tokens if len(token) > 1)


def cut_long_text(text: str) -> list[str]:
    """A text in parts of about PART_CHARACTERS, of which a tokenizer that keeps words apart makes the same.

    A part without an end of a word is cut at MOST_CHARACTERS, wherever that is.
    """
    parts, start = [], 0
    while len(text) - start > 2 * PART_CHARACTERS:
        found = WORD_END.search(text, start + PART_CHARACTERS, start + MOST_CHARACTERS)
        end = found.start() if found else start + MOST_CHARACTERS
        if end >= len(text):
            break
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _bytes_by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
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


class DocumentEncoder:
    """Encodes documents of each kind.

    Args:
        texts: encodes texts, and adds the markers to token ids.
        conversations: encodes messages; None where no source has any.
    """

    def __init__(self, texts: Encoder, conversations: ConversationEncoder | None):
        self.texts, self.conversations = texts, conversations

    def text_of(self, document: Document) -> str:
        """What a document says, of whatever kind it is."""
        if isinstance(document.value, np.ndarray):
            return self.texts.backend.decode(document.value.tolist())
        return document.text

    def other(self, value: list[dict[str, Any]] | np.ndarray) -> Encoded:
        """A conversation or token ids.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        if isinstance(value, np.ndarray):
            return self.texts.of_tokens(value)
        assert self.conversations is not None
        return self.conversations(value)
