"""The tables of a preview, as plain cells that the terminal and the pages both show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "–"
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "longest": 1.0}
DOCUMENTS = {
    "in": "documents_in",
    "used": "documents_used",
    "unused": "unused",
    "held out": "held_out",
    "filtered": "filtered",
    "contaminated": "contaminated",
    "duplicates": "duplicates",
    "quarantined": "quarantined",
}


@dataclass(frozen=True)
class Table:
    """Headers, and as many cells in each row, the first of which names it.

    caption: what the figures mean.
    """

    title: str
    headers: list[str]
    rows: list[list[str]]
    caption: str


def source_tables(sources: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Documents and tokens of each source, from the manifest's `sources`."""
    shortened = sum(source["shortened"] for source in sources)
    documents = [[source["name"], *(f"{source[key]:,}" for key in DOCUMENTS.values())] for source in sources]
    tokens = [
        [
            source["name"],
            f"{source['tokens_in']:,}",
            f"{source['tokens']:,}",
            _percent(source["proportion_asked"]),
            _percent(source["proportion_realised"]),
            f"{source['epochs']:.2f}",
        ]
        for source in sources
    ]
    if len(sources) > 1:
        documents.append(["all", *(_sum(sources, key) for key in DOCUMENTS.values())])
        tokens.append(["all", _sum(sources, "tokens_in"), _sum(sources, "tokens"), *[ABSENT] * 3])
    return [
        Table(
            "Documents",
            ["source", *DOCUMENTS],
            documents,
            "“In” is the sum of the others. Used: trained on; unused: of the training split, beyond the "
            "source's part; held out: of the validation and the test split; filtered: by the source's filter "
            "or its length; contaminated: quotes a benchmark; quarantined: broken."
            + (f" {shortened:,} were cut at data.max_document_characters." if shortened else ""),
        ),
        Table(
            "Tokens",
            ["source", "in", "in the mixture", "asked", "realised", "epochs"],
            tokens,
            "“In the mixture” counts tokens as often as they are read in training; asked and realised are "
            "shares of these. Epochs: how often what the source has for training is read.",
        ),
    ]


def split_table(splits: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each split has, from the manifest's `splits`."""
    rows = []
    for name, facts in splits.items():
        left_out = facts["dropped_tokens"] + facts["tokens_without_loss"]
        packed, wasted = facts["tokens"] + left_out, facts["padding_tokens"] + left_out
        row = [f"{facts[key]:,}" for key in ("documents", "blocks", "tokens", "target_tokens")]
        shares = [_percent(facts["cut_tokens"] / packed), _percent(wasted / packed)]
        targets = facts["target_tokens"]
        rows.append([name, *row, *shares, f"{facts['bytes'] / targets:.2f}" if targets else ABSENT])
    return Table(
        "Splits",
        ["split", "documents", "blocks", "tokens", "targets", "behind a cut", "wasted", "bytes a token"],
        rows,
        "Documents: as often as they are read. Tokens: places in the blocks, filled ones too. Targets: those "
        "with a loss. Behind a cut: tokens that do not see the beginning of their document, which the end of "
        "a block has cut. Wasted: padding, what did not fill the last block, and parts of conversations that "
        "the assistant says nothing in, which are left out. Bytes a token: UTF-8 bytes of text that a target "
        "stands for.",
    )


def length_table(lengths: Mapping[str, Counter[int]]) -> Table:
    """Quantiles of lengths.

    Args:
        lengths: source → how often each length in tokens is there.
    """
    rows = []
    for name, counts in lengths.items():
        found = [f"{_quantile(counts, part):,}" if counts else ABSENT for part in QUANTILES.values()]
        rows.append([name, f"{counts.total():,}", *found])
    return Table(
        "Lengths",
        ["source", "pieces", *QUANTILES],
        rows,
        "Tokens of the training split's documents as they are packed: best_fit cuts those that are longer "
        "than a block into pieces, concatenate does not. p5, p95: 5 % and 95 % of them are no longer.",
    )


def _quantile(counts: Counter[int], part: float) -> int:
    """The shortest length that so many of them do not exceed."""
    reached = 0
    for length in sorted(counts):
        reached += counts[length]
        if reached >= part * counts.total():
            return length
    raise ValueError("no lengths")


def _sum(sources: Sequence[Mapping[str, Any]], key: str) -> str:
    return f"{sum(source[key] for source in sources):,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
