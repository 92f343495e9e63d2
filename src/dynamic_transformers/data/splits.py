"""Splits of a mixture: what is taken of each source, how it is packed, and the account of it all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.blocks import BlockWriter, Piece
from dynamic_transformers.data.documents import CONTAMINATED, FILTERED, QUARANTINED, SPLITS, UNUSED
from dynamic_transformers.data.merging import Duplicates
from dynamic_transformers.data.mixing import quotas, shares
from dynamic_transformers.data.packing import Cuts, best_fit, concatenated
from dynamic_transformers.data.pools import Choice, Pool
from dynamic_transformers.data.shards import Account
from dynamic_transformers.data.tokenization import marker_ids
from dynamic_transformers.settings import DataSettings, UserError

# Part of its quota by which a source's last document may pass it. The splits that are evaluated on are
# small, and keep their last document whole in most cases.
TOLERANCE = {"train": 0.005, "validation": 0.05, "test": 0.05}

logger = logging.getLogger("dynamic_transformers")


def choose(data: DataSettings, split: str, pools: Sequence[Pool]) -> list[list[Choice]]:
    """What a split takes of each source, one choice for each time that its documents are read.

    Nothing is read twice to be evaluated on.
    """
    sources, training = data.dataset_configs, split == "train"
    limits = [source.max_tokens if training else None for source in sources]
    available = {
        source.name: min(pool.tokens, limit or pool.tokens)
        for source, pool, limit in zip(sources, pools, limits, strict=True)
    }
    asked = quotas(
        available,
        {source.name: source.weight for source in sources},
        data.max_tokens if training else data.max_eval_tokens,
        data.exhausted if training else "stop",
    )
    return [
        pool.times(asked[source.name], limit, TOLERANCE[split], source.type == "finetune")
        for source, pool, limit in zip(sources, pools, limits, strict=True)
    ]


def write_split(
    folder: Path, documents: Iterator[Piece], data: DataSettings, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Any], np.ndarray, Counter[int]]:
    """Pack documents into blocks.

    Returns:
        The split's facts; how often each token id is a target, (V,); by source, tokens that were left out.

    Raises:
        UserError: they fill no block.
    """
    writer = BlockWriter(folder, data.block_size, len(tokenizer), data.has_conversations)
    cuts = Cuts()
    counted = Counted(documents)
    if data.packs_by_best_fit:
        pieces = best_fit(counted, data.block_size, cuts, marker_ids(tokenizer)[1])
    else:
        pieces = concatenated(counted, data.block_size, cuts)
    for piece in pieces:
        writer.add(piece)
    facts = {
        "documents": counted.count,
        "cut_documents": cuts.documents,
        "cut_tokens": cuts.tokens,
        "tokens_without_loss": cuts.without_loss.total(),
        **writer.close(),
    }
    if not facts["blocks"]:
        raise UserError(
            f"the {folder.name} split has {writer.added} tokens, less than "
            f"data.block_size={data.block_size}: give it more documents or a smaller block"
        )
    given = writer.added + facts["tokens_without_loss"]
    wasted = facts["padding_tokens"] + facts["dropped_tokens"] + facts["tokens_without_loss"]
    logger.info(
        "%s: %d tokens of %d documents in %d blocks; %.1f %% behind a cut, %.2f %% wasted",
        folder.name,
        writer.added - writer.padding,
        counted.count,
        facts["blocks"],
        100 * cuts.tokens / given,
        100 * wasted / given,
    )
    return facts, writer.target_counts, cuts.without_loss


class Counted:
    """An iterator that knows how many it has given."""

    def __init__(self, documents: Iterator[Piece]):
        self.documents, self.count = documents, 0

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = next(self.documents)
        self.count += 1
        return piece


def check_broken(data: DataSettings, accounts: Sequence[Account]) -> None:
    """Refuse a source with too many broken records, or of which no record is a document.

    Raises:
        UserError: names the first broken one, or says what became of all.
    """
    for source, account in zip(data.dataset_configs, accounts, strict=True):
        broken, records = account.records[QUARANTINED], account.records.total()
        if broken > data.max_broken_fraction * records:
            first = account.quarantine[0]
            raise UserError(
                f"data.dataset_configs.{source.name}: {broken} of {records} records are broken, more than "
                f"data.max_broken_fraction={data.max_broken_fraction}; the first is "
                f"{first['file'] or 'the source'}, row {first['row']}, {first['reason']}: "
                f"{first['record'][:60]}"
            )
        if not account.records["documents"]:
            told = ", ".join(f"{count} {outcome}" for outcome, count in account.records.items())
            raise UserError(
                f"data.dataset_configs.{source.name}: none of its {records} records is a document"
                f"{': ' if told else ''}{told}; see data.min_characters={data.min_characters}, "
                "data.max_document_characters, and the source's filter"
            )


def check_splits(data: DataSettings, pools: Mapping[str, Sequence[Pool]]) -> None:
    """Refuse a source of which a split has no document.

    Raises:
        UserError: names source and split.
    """
    for number, source in enumerate(data.dataset_configs):
        usable = sum(pools[split][number].documents for split in SPLITS)
        if not usable:
            raise UserError(
                f"data.dataset_configs.{source.name}: all of its documents are duplicates of those of other "
                "sources; leave it out"
            )
        if empty := [split for split in SPLITS if not pools[split][number].documents]:
            settings = [f"data.{split}_split_percentage" for split in empty if split != "train"]
            remedy = f"raise {' and '.join(settings)}" if settings else "hold out less"
            raise UserError(
                f"data.dataset_configs.{source.name}: none of its {usable} usable documents falls into "
                f"{' or '.join(empty)}; give it more documents, or {remedy}"
            )


def source_facts(
    data: DataSettings,
    accounts: Sequence[Account],
    duplicates: Sequence[Duplicates],
    pools: Mapping[str, Sequence[Pool]],
    chosen: Sequence[Sequence[Choice]],
    without_loss: Mapping[int, int],
) -> list[dict[str, Any]]:
    """The account of each source.

    `documents_in` is the sum of documents_used (trained on), unused (of the training split, beyond the
    source's part of the mixture), held_out (of the validation and test splits, evaluated on or not),
    filtered, contaminated (they quote a benchmark), duplicates and quarantined (broken). `tokens_in` is the
    sum of tokens_used (in the training split's mixture, each once), tokens_unused, tokens_held_out and
    tokens_of_duplicates. `tokens` counts those of the mixture as often as they are read, without the
    `tokens_without_loss`: of parts of conversations that are left out. `epochs`: how often it is read.

    Raises:
        RuntimeError: a sum is wrong: a fault of this program.
    """
    weights = {source.name: source.weight for source in data.dataset_configs}
    total = sum(choice.tokens for choices in chosen for choice in choices) - sum(without_loss.values())
    facts = []
    for number, (name, asked) in enumerate(shares(weights).items()):
        account, pool, choices = accounts[number], pools["train"][number], chosen[number]
        held_out = {split: pools[split][number] for split in SPLITS if split != "train"}
        used = max((choice.documents for choice in choices), default=0)
        tokens_used = max((choice.tokens for choice in choices), default=0)
        read = sum(choice.tokens for choice in choices)
        tokens = read - without_loss.get(number, 0)
        limit = data.dataset_configs[number].max_tokens
        fact = {
            "name": name,
            "documents_in": account.records.total(),
            "documents_used": used,
            "unused": pool.documents - used + account.records[UNUSED],
            "held_out": sum(other.documents for other in held_out.values()),
            "held_out_by_split": {split: other.documents for split, other in held_out.items()},
            "filtered": account.records[FILTERED],
            "contaminated": account.records[CONTAMINATED],
            "duplicates": duplicates[number].documents,
            "quarantined": account.records[QUARANTINED],
            "shortened": account.cut,
            "tokens_in": account.tokens,
            "tokens_used": tokens_used,
            "tokens_unused": pool.tokens - tokens_used,
            "tokens_held_out": sum(other.tokens for other in held_out.values()),
            "tokens_of_duplicates": duplicates[number].tokens,
            "tokens": tokens,
            "tokens_without_loss": read - tokens,
            "epochs": read / min(pool.tokens, limit or pool.tokens),
            "proportion_asked": asked,
            "proportion_realised": tokens / total,
        }
        for whole, parts in SUMS.items():
            if fact[whole] != sum(fact[part] for part in parts):
                raise RuntimeError(f"source {name}: {whole} is not the sum of its parts: {fact}")
        facts.append(fact)
    return facts


SUMS = {
    "documents_in": (
        *("documents_used", "unused", "held_out"),
        *("filtered", "contaminated", "duplicates", "quarantined"),
    ),
    "tokens_in": ("tokens_used", "tokens_unused", "tokens_held_out", "tokens_of_duplicates"),
}


def tell(facts: Sequence[Mapping[str, Any]]) -> None:
    """Say what became of the documents of each source."""
    for fact in facts:
        logger.info(
            "source %s: %d documents trained on, %d unused, %d held out, %d duplicates; %.1f %% of tokens",
            *(fact[key] for key in ("name", "documents_used", "unused", "held_out", "duplicates")),
            100 * fact["proportion_realised"],
        )


def warn(
    data: DataSettings, facts: Sequence[Mapping[str, Any]], pools: Mapping[str, Sequence[Pool]]
) -> list[str]:
    """Say what a person may not have meant: other proportions, many epochs, much unused, little to test on.

    Args:
        facts: as `source_facts` gives them.
        pools: of each split and source.

    Returns:
        What was said.
    """
    lines = [line for split in ("validation", "test") if (line := _scarce(data, split, pools[split]))]
    for fact in facts:
        name, asked, realised = fact["name"], fact["proportion_asked"], fact["proportion_realised"]
        if abs(realised - asked) > TOLERANCE["train"] * asked:
            lines.append(
                f"source {name}: {100 * realised:.3g} % of the mixture's tokens, where {100 * asked:.3g} % "
                f"were asked (data.exhausted={data.exhausted})"
            )
        if (epochs := fact["epochs"]) > data.max_epochs:
            lines.append(f"source {name}: read {epochs:.1f} times, over data.max_epochs={data.max_epochs:g}")
    driest = max(facts, key=lambda fact: fact["epochs"])
    most = max(facts, key=lambda fact: fact["tokens_unused"] / max(1, fact["tokens_used"]))
    if data.exhausted == "stop" and driest["epochs"] >= 0.999 and most["tokens_unused"] > most["tokens_used"]:
        used, unused = most["documents_used"], most["unused"]
        lines.append(
            f"the mixture ends where source {driest['name']} runs dry: {used} of {used + unused} training "
            f"documents of source {most['name']} are used; other weights, or data.exhausted=repeat or "
            "redistribute, take more"
        )
    for line in lines:
        logger.warning("%s", line)
    return lines


def _scarce(data: DataSettings, split: str, pools: Sequence[Pool]) -> str | None:
    """What is said of a split to evaluate on that a source, which runs dry, keeps below half of its size."""
    available = {source.name: pool.tokens for source, pool in zip(data.dataset_configs, pools, strict=True)}
    parts = shares({source.name: source.weight for source in data.dataset_configs})
    driest = min(parts, key=lambda name: available[name] / parts[name])
    possible = min(data.max_eval_tokens, sum(available.values()))
    reached = available[driest] / parts[driest]
    if reached >= possible / 2:
        return None
    return (
        f"the {split} split has {reached:.0f} tokens instead of {possible}: source {driest} has only "
        f"{available[driest]} held out for its {100 * parts[driest]:.3g} %; give it more documents, or less "
        "weight"
    )
