"""Which texts quote a benchmark: they have 13 words in a row with a text of one of its tasks.

So did the authors of GPT-3 (Brown et al. 2020, appendix C: 13-grams of lower-cased words without
punctuation), and lm-eval's `clean_training_data` after them. Both remove a window around the quotation; here
the whole document is found, and the caller decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dynamic_transformers.settings import UserError

NGRAM = 13  # words
PIECE = 1 << 16  # characters of a long text that are looked at together, which bounds the memory
BITS = 16  # of the bitmap, at least, for each n-gram: of other n-grams no more than one in 16 passes it
SEED = 13  # of the constants

NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Contamination:
    """The n-grams of tasks' texts.

    Attributes:
        tasks: names, in the order of the file.
        texts: how many there are.
        short: how many of them have fewer than 13 words; these are never found.
        hashes: of the n-grams, uint64, sorted, each once.
        origins: for each hash the number of the first task that has it, int32.
        bitmap: whether a hash begins with these bits, a bit for each beginning, uint8.
        shift: a hash without its last `shift` bits is the number of its bit in the bitmap, uint64.
    """

    tasks: tuple[str, ...]
    texts: int
    short: int
    hashes: np.ndarray
    origins: np.ndarray
    bitmap: np.ndarray
    shift: np.uint64

    @classmethod
    def read(cls, file: Path) -> Contamination:
        """Read what `dynamic-transformers task-texts` writes: lines `{"task": name, "text": text}`.

        Raises:
            UserError: the file cannot be read, a line is broken, or no text has 13 words.
        """
        tasks: dict[str, int] = {}
        found, origins, texts, short = [NONE], [np.empty(0, np.int32)], 0, 0
        for task, text in _records(file):
            ngrams = np.concatenate([NONE, *_ngrams(text)])
            found.append(ngrams)
            origins.append(np.full(len(ngrams), tasks.setdefault(task, len(tasks)), np.int32))
            texts += 1
            short += not len(ngrams)
        if texts == short:
            raise UserError(
                f"{file}: none of its {texts} texts has {NGRAM} words; name other tasks to "
                "dynamic-transformers task-texts, which writes it"
            )
        hashes, first = np.unique(np.concatenate(found), return_index=True)
        width = (BITS * len(hashes)).bit_length()
        shift = np.uint64(64 - width)
        bits = np.zeros(1 << width, bool)
        bits[hashes >> shift] = True
        bitmap = np.packbits(bits, bitorder="little")
        return cls(tuple(tasks), texts, short, hashes, np.concatenate(origins)[first], bitmap, shift)

    def overlaps(self, text: str) -> str | None:
        """Name of the first task of which the text has an n-gram of 13 words; None: it has none."""
        for ngrams in _ngrams(text):
            places = ngrams >> self.shift
            likely = ngrams[(self.bitmap[places >> 3] >> (places & 7).astype(np.uint8) & 1).view(bool)]
            at = np.minimum(np.searchsorted(self.hashes, likely), len(self.hashes) - 1)
            hits = at[self.hashes[at] == likely]
            if len(hits):
                return self.tasks[self.origins[hits[0]]]
        return None


def _records(file: Path) -> Iterator[tuple[str, str]]:
    """Task and text of each line."""
    number = 0
    try:
        with file.open("rb") as lines:
            for line in lines:
                number += 1
                record = json.loads(line)
                if not isinstance(record["task"], str) or not isinstance(record["text"], str):
                    raise TypeError
                yield record["task"], record["text"]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; dynamic-transformers task-texts writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}, line {number}: must be {{"task": name, "text": text}}, as dynamic-transformers '
            "task-texts writes it"
        ) from error


def _ngrams(text: str) -> Iterator[np.ndarray]:
    """Hashes of the n-grams of a text, in its order, uint64."""
    words = NONE
    for piece in _pieces(text):
        words = np.concatenate([words[1 - NGRAM :], _words(piece)])
        if len(words) >= NGRAM:
            yield np.convolve(words, _constants().places, "valid")


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces, cut between two words; a word of more than 65,536 letters is cut too."""
    start = 0
    while start < len(text):
        end = min(start + PIECE, len(text))
        while end < min(start + 2 * PIECE, len(text)) and text[end].isalnum():
            end += 1
        yield text[start:end]
        start = end


def _words(text: str) -> np.ndarray:
    """Hashes of the words of a piece, uint64: of lower-cased runs of letters and digits."""
    constants = _constants()
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    letters = constants.letters[codes]
    inside = letters != 0
    starts = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    if not len(starts):
        return NONE
    sums = np.add.reduceat(letters * constants.powers[: len(letters)], starts)
    return sums * constants.inverses[starts]


class Constants(NamedTuple):
    """What hashes are made of: a word's is Σ letter·pᶥ over its letters, an n-gram's Σ word·place; mod 2⁶⁴.

    letters: by code point; 0 of what is neither letter nor digit.
    powers, inverses: pᶥ and p⁻ᶥ of an odd p, by place in a piece.
    places: by place in an n-gram.
    """

    letters: np.ndarray
    powers: np.ndarray
    inverses: np.ndarray
    places: np.ndarray


@cache
def _constants() -> Constants:
    """The same in every process."""
    random = np.random.default_rng(SEED)
    p, *places = (int(number) | 1 for number in random.integers(1 << 63, size=1 + NGRAM, dtype=np.uint64))
    letters = random.integers(1, 1 << 64, size=0x110000, dtype=np.uint64)
    letters[[not chr(code).isalnum() for code in range(len(letters))]] = 0
    length = 4 * PIECE  # some letters become two when they are lower-cased
    return Constants(
        letters, _powers(p, length), _powers(pow(p, -1, 1 << 64), length), np.array(places, np.uint64)
    )


def _powers(base: int, count: int) -> np.ndarray:
    return np.multiply.accumulate(np.array([1, *[base] * (count - 1)], np.uint64))
