"""The step `prepare_data`: from the data settings to a data folder with its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.documents import SPLITS, Corpus, collect
from dynamic_transformers.data.mixing import count_tokens, mix, sample_text, shares
from dynamic_transformers.data.packing import PackedSplit, pack, unigram_loss
from dynamic_transformers.data.probes import write_tasks
from dynamic_transformers.data.tokenization import (
    EncodedDocument,
    encode,
    load_pretrained_tokenizer,
    train_tokenizer,
)
from dynamic_transformers.manifest import digest, finished, fresh_folder, write_manifest
from dynamic_transformers.settings import DataSettings, Settings, UserError

STEP = "prepare_data"
TOKENIZER_CHARACTERS = 8_000_000

logger = logging.getLogger("dynamic_transformers")


def data_config(settings: Settings) -> dict[str, Any]:
    """All that the data depend on: the data settings without batch size and place, and the seed."""
    config = dataclasses.asdict(settings.data)
    del config["batch_size"], config["output_dir"]
    return {**config, "seed": settings.run.seed}


def default_data_dir(settings: Settings) -> Path:
    """`data.output_dir`, else a folder under `run.output_dir` that the data settings name."""
    if settings.data.output_dir:
        return Path(settings.data.output_dir)
    return Path(settings.run.output_dir) / "data" / digest(data_config(settings))[:12]


def prepare(settings: Settings, output_dir: Path, force: bool = False) -> Path:
    """Write the data folder, or find it finished for the same settings.

    Args:
        settings: their `data` part and `run.seed`.
        output_dir: where it goes; a data folder that stands there is replaced, nothing else is.
        force: make it anew though it is finished.

    Returns:
        `output_dir`.

    Raises:
        UserError: a source or tokenizer cannot be had, too many records are broken, a split is empty.
    """
    output_dir = Path(output_dir)
    config = data_config(settings)
    if not force and finished(output_dir, STEP, config):
        logger.info("data: %s is finished", output_dir)
        return output_dir
    with fresh_folder(output_dir, STEP) as folder:
        facts = _fill(folder, settings.data, settings.run.seed)
        write_manifest(folder, STEP, config, {}, seed=settings.run.seed, **facts)
    logger.info("data: written to %s", output_dir)
    return output_dir


def _fill(folder: Path, data: DataSettings, seed: int) -> dict[str, Any]:
    """Write everything but the manifest; returns its facts."""
    corpus = collect(data)
    lines = [json.dumps(record) + "\n" for record in corpus.quarantine]
    (folder / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = _tokenizer(data, corpus)
    tokenizer.save_pretrained(folder / "tokenizer")

    weights = {source.name: source.weight for source in data.dataset_configs}
    mixed: dict[str, list[EncodedDocument]] = {}
    packed: dict[str, PackedSplit] = {}
    for split in SPLITS:
        training = split == "train"
        mixed[split] = mix(
            corpus.splits[split],
            weights,
            partial(encode, tokenizer),
            data.max_tokens if training else data.max_eval_tokens,
            seed if training else 0,  # runs that differ in their seed are judged on the same text
        )
        packed[split] = pack(mixed[split], data.block_size)
        _write_split(folder / split, packed[split], mixed[split], data.block_size)
    write_tasks(folder / "tasks", corpus, data)
    return {
        "sources": _source_facts(corpus, weights, mixed["train"]),
        "splits": {split: _split_facts(packed[split], mixed[split]) for split in SPLITS},
        "unigram_loss": {
            split: unigram_loss(packed["train"], packed[split], len(tokenizer))
            for split in ("validation", "test")
        },
        "vocab_size": len(tokenizer),
        "block_size": data.block_size,
        "tokenizer_name": data.tokenizer_name,
        # The standard library, hence the embedded documents, differ between Python versions.
        "python": platform.python_version(),
    }


def _tokenizer(data: DataSettings, corpus: Corpus) -> PreTrainedTokenizerFast:
    if data.tokenizer_name is not None:
        return load_pretrained_tokenizer(data.tokenizer_name)
    weights = {source.name: source.weight for source in data.dataset_configs}
    texts = sample_text(corpus.splits["train"], weights, TOKENIZER_CHARACTERS)
    tokenizer = train_tokenizer(texts, data.vocab_size)
    logger.info("tokenizer: %d entries, trained on %d documents", len(tokenizer), len(texts))
    return tokenizer


def _write_split(folder: Path, packed: PackedSplit, mixed: list[EncodedDocument], block_size: int) -> None:
    tokens = count_tokens(mixed)
    if not len(packed.input_ids):
        raise UserError(
            f"the {folder.name} split has {tokens} tokens, less than data.block_size={block_size}: "
            "give it more documents or a smaller block"
        )
    block = datasets.Sequence(datasets.Value("int32"), length=block_size)
    features = {"input_ids": block, "position_ids": block, "num_bytes": datasets.Value("int64")}
    dataset = datasets.Dataset.from_dict(packed._asdict(), features=datasets.Features(features))
    dataset.save_to_disk(str(folder))
    logger.info("%s: %d tokens of %d documents in %d blocks", folder.name, tokens, len(mixed), len(dataset))


def _source_facts(
    corpus: Corpus, weights: dict[str, float], mixed: list[EncodedDocument]
) -> list[dict[str, Any]]:
    facts = []
    for name, asked in shares(weights).items():
        used = [encoded for encoded in mixed if encoded.document.source == name]
        facts.append(
            {
                "name": name,
                **dataclasses.asdict(corpus.counts[name]),
                "documents_used": len(used),
                "tokens": count_tokens(used),
                "proportion_asked": asked,
                "proportion_realised": count_tokens(used) / count_tokens(mixed),
            }
        )
    return facts


def _split_facts(packed: PackedSplit, mixed: list[EncodedDocument]) -> dict[str, Any]:
    return {
        "documents": len(mixed),
        "blocks": len(packed.input_ids),
        "tokens": packed.input_ids.size,
        "target_tokens": int(np.count_nonzero(packed.position_ids)),
        "bytes": int(packed.num_bytes.sum()),
        "sha256": hashlib.sha256(packed.input_ids.tobytes()).hexdigest(),
    }
