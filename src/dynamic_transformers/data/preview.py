"""A look at prepared data before anything is trained on them: tables, broken records, decoded blocks.

It is a function of a data folder alone. `prepare` writes it there as a page, the command line prints it, and
the report of a comparison holds it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dynamic_transformers.data.blocks import ENDS, PADDING, SOURCES, Blocks
from dynamic_transformers.data.preview_tables import Table, length_table, source_tables, split_table
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.templates import template

PAGE = "preview.html"
TEMPLATES = Path(__file__).parent
SHOWN_TOKENS = 512  # of a block
BEFORE = 64  # of them in front of the piece that is shown, at most
LEAST_EXCERPTS = 3
SHOWN_RECORDS = 20  # that are broken
SURVEYED = 1 << 20  # pieces in memory at once

# What would move a terminal's cursor or has no place in HTML is shown by its picture.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
CONTROLS |= dict.fromkeys(range(128, 160), 0xFFFD)


@dataclass(frozen=True)
class Part:
    """Text of tokens that follow each other, all of which have a loss or none."""

    text: str
    loss: bool


@dataclass(frozen=True)
class Piece:
    """What is shown of one document, or of the padding behind documents.

    source: its name; None: padding.
    begins, ends: whether its first and its last token are among those shown.
    """

    source: str | None
    begins: bool
    ends: bool
    parts: list[Part]


@dataclass(frozen=True)
class Excerpt:
    """Some tokens of a training block, decoded.

    block: its number, from 0.
    first, last: places of the first and the last token shown, from 0.
    """

    block: int
    first: int
    last: int
    pieces: list[Piece]


@dataclass(frozen=True)
class Preview:
    """What a person looks at.

    digest: `content_digest` of the data.
    warnings: what a person may not have meant.
    tables: of sources, splits and lengths.
    broken: number of broken records.
    quarantine: the first of them: source, file, row, reason, record.
    excerpts: of the training split.
    """

    digest: str
    warnings: list[str]
    tables: list[Table]
    broken: int
    quarantine: list[dict[str, Any]]
    excerpts: list[Excerpt]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preview:
        """As `to_dict` gives it.

        Raises:
            KeyError, TypeError: it is of another version.
        """
        given = {field.name: values[field.name] for field in fields(cls)}
        tables = [Table(**table) for table in given.pop("tables")]
        excerpts = [
            Excerpt(**excerpt | {"pieces": [_piece_from(piece) for piece in excerpt["pieces"]]})
            for excerpt in given.pop("excerpts")
        ]
        return cls(**given, tables=tables, excerpts=excerpts)


def _piece_from(values: dict[str, Any]) -> Piece:
    parts = [Part(**part) for part in values["parts"]]
    return Piece(values["source"], values["begins"], values["ends"], parts)


def read_preview(folder: Path) -> Preview:
    """The preview of a finished data folder.

    Raises:
        UserError: the folder is missing or unfinished, or another step's.
    """
    return preview_of(folder, read_manifest(folder, "prepare_data"))


def write_page(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `preview.html` into a data folder that holds all else.

    Args:
        manifest: its content, which need not be written yet.
    """
    page = template("preview.html.j2", TEMPLATES).render(preview=preview_of(folder, manifest))
    (folder / PAGE).write_text(page, encoding="utf-8")


def preview_of(folder: Path, manifest: Mapping[str, Any]) -> Preview:
    """The preview of a data folder with this manifest."""
    train, block_size = manifest["splits"]["train"], manifest["block_size"]
    names = [source["name"] for source in manifest["sources"]]
    blocks = Blocks(folder / "train", train, block_size)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    pieces = Pieces(folder / "train")
    lengths, firsts = pieces.survey(len(names))
    lines = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return Preview(
        digest=manifest["content_digest"],
        warnings=manifest["warnings"],
        tables=[
            *source_tables(manifest["sources"]),
            split_table(manifest["splits"]),
            length_table(dict(zip(names, lengths, strict=True))),
        ],
        broken=sum(source["quarantined"] for source in manifest["sources"]),
        quarantine=[_printable(json.loads(line)) for line in lines[:SHOWN_RECORDS]],
        excerpts=[
            _excerpt(blocks, pieces, place, names, tokenizer) for place in _places(blocks, firsts, block_size)
        ],
    )


class Pieces:
    """Where the pieces of a split end, and of which source they are; read when they are used."""

    def __init__(self, folder: Path):
        self.ends = np.memmap(folder / ENDS, dtype="<i8", mode="r")
        self.sources = np.memmap(folder / SOURCES, dtype="<u2", mode="r")

    def survey(self, sources: int) -> tuple[list[Counter[int]], list[int]]:
        """For each source, how often each length in tokens is there, and where its first piece begins.

        Returns:
            Counts by length, of each source; places of the first pieces, of each source that has any.
        """
        counts: list[Counter[int]] = [Counter() for _ in range(sources)]
        firsts: dict[int, int] = {}
        before = 0
        for start in range(0, len(self.ends), SURVEYED):
            ends, owners = self.ends[start : start + SURVEYED], self.sources[start : start + SURVEYED]
            lengths = np.diff(ends, prepend=before)
            for source in np.unique(owners[owners != PADDING]).tolist():
                own = owners == source
                found, times = np.unique(lengths[own], return_counts=True)
                counts[source].update(dict(zip(found.tolist(), times.tolist(), strict=True)))
                place = int(own.argmax())
                firsts.setdefault(source, int(ends[place] - lengths[place]))
            before = int(ends[-1])
        return counts, list(firsts.values())

    def between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end and source of each piece that has tokens from `start` to before `stop`."""
        number = int(np.searchsorted(self.ends, start, side="right"))
        begin = int(self.ends[number - 1]) if number else 0
        while begin < stop:
            end = int(self.ends[number])
            yield begin, end, int(self.sources[number])
            begin, number = end, number + 1


def _places(blocks: Blocks, firsts: Sequence[int], block_size: int) -> list[tuple[int, int, int]]:
    """Which tokens are shown: block, first place in it, place behind the last one."""
    shown = min(SHOWN_TOKENS, block_size)
    places: list[tuple[int, int, int]] = []
    spread = (len(blocks) * number // LEAST_EXCERPTS * block_size for number in range(LEAST_EXCERPTS))
    for token in (*firsts, *spread):
        if token not in firsts and len(places) >= LEAST_EXCERPTS:
            break
        block, place = divmod(token, block_size)
        if not any(other == block and low <= place < high for other, low, high in places):
            low = max(0, min(place - BEFORE, block_size - shown))
            places.append((block, low, low + shown))
    return sorted(places)


def _excerpt(
    blocks: Blocks, pieces: Pieces, place: tuple[int, int, int], names: Sequence[str], tokenizer: Tokenizer
) -> Excerpt:
    block, low, high = place
    ids, targets = blocks.input_ids(block), blocks.targets(block)
    offset = block * blocks.block_size
    found = []
    for begin, end, source in pieces.between(offset + low, offset + high):
        start, stop = max(begin - offset, low), min(end - offset, high)
        if source == PADDING:
            name, parts = None, [Part(f"{stop - start} tokens of padding", False)]
        else:
            name, parts = names[source], list(_parts(ids[start:stop], targets[start:stop], tokenizer))
        found.append(Piece(name, begin == offset + start, end == offset + stop, parts))
    return Excerpt(block, low, high - 1, found)


def _parts(ids: np.ndarray, targets: np.ndarray, tokenizer: Tokenizer) -> Iterator[Part]:
    borders = np.flatnonzero(np.diff(targets)) + 1
    for some, loss in zip(np.split(ids, borders), np.split(targets, borders), strict=True):
        text = tokenizer.decode(some.tolist(), skip_special_tokens=False)
        yield Part(text.translate(CONTROLS), bool(loss[0]))


def _printable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: v.translate(CONTROLS) if isinstance(v, str) else v for key, v in record.items()}
