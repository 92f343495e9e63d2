"""Reading a finished data folder: its splits, its tokenizer, and rows as a batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.manifest import file_digest, read_manifest
from dynamic_transformers.settings import UserError

IGNORED = -100  # label of a token without a loss, as in transformers
REPAIR = "prepare the data again with --force"

logger = logging.getLogger("dynamic_transformers")


def load_split(data_dir: Path, split: str) -> Dataset:
    """Blocks of `train`, `validation` or `test`: input_ids, position_ids, sources, (T,) each, and num_bytes.

    Data of an older version have no `sources`.

    Raises:
        UserError: the data folder is missing, unfinished or damaged.
    """
    files = _files(data_dir, split)
    try:
        # Not load_from_disk: to it, :: in a path chains addresses.
        shards = [Dataset.from_file(str(file)) for file in files]
        return concatenate_datasets(shards).with_format("numpy")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{Path(data_dir) / split}: damaged: {reason}; {REPAIR}") from error


def verify_split(data_dir: Path, split: str) -> None:
    """Compare a split's files with their SHA-256 in the manifest.

    Raises:
        UserError: the data folder is missing or unfinished, or a file of the split is missing or differs.
    """
    _verify(_files(data_dir, split))


def batches_of(split: Dataset, batch_size: int) -> DataLoader:
    """All blocks of a split in their order, `batch_size` at a time, as `collate` gives them."""
    # A Dataset has all that torch asks of one, but is not of its class.
    return DataLoader(split, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def source_names(data_dir: Path) -> list[str]:
    """Names of the sources, in the order in which `domains_of` numbers them.

    Raises:
        UserError: the data folder is missing or unfinished.
    """
    return [source["name"] for source in read_manifest(data_dir, "prepare_data")["sources"]]


def domains_of(split: Dataset) -> torch.Tensor | None:
    """Number of the source of each token of a split, (N, T) int64; None, and a warning, if it has none."""
    if "sources" not in split.column_names:
        logger.warning(
            "the data were prepared before they said of which source each token is (no column `sources`): "
            "nothing is reported by domain"
        )
        return None
    return torch.from_numpy(np.asarray(split["sources"], dtype=np.int64))


def load_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of the data folder, which must be the one that the data were made with.

    Raises:
        UserError: the data folder is missing or unfinished, or a file of the tokenizer is missing or differs.
    """
    folder = Path(data_dir) / "tokenizer"
    digests = read_manifest(data_dir).get("tokenizer_files", {})  # data of an older version name none
    _verify(_there(folder, digests))
    return PreTrainedTokenizerFast.from_pretrained(folder)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Batch of blocks: `input_ids`, `position_ids` and `labels`, each (B, T) int64.

    Labels are not shifted; tokens at position 0 have none (-100): what is in front of them is
    another document or another block.
    """
    input_ids, position_ids = (
        torch.from_numpy(np.stack([np.asarray(row[name], dtype=np.int64) for row in rows]))
        for name in ("input_ids", "position_ids")
    )
    labels = input_ids.masked_fill(position_ids == 0, IGNORED)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def _files(data_dir: Path, split: str) -> dict[Path, str]:
    """The files of a split, each with the SHA-256 that it had when it was written."""
    return _there(Path(data_dir) / split, read_manifest(data_dir)["splits"][split]["files"])


def _there(folder: Path, digests: Mapping[str, str]) -> dict[Path, str]:
    files = {folder / name: sha256 for name, sha256 in digests.items()}
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]}: damaged: no such file; {REPAIR}")
    return files


def _verify(digests: Mapping[Path, str]) -> None:
    for file, expected in digests.items():
        if file_digest(file) != expected:
            raise UserError(f"{file}: damaged: sha256 differs; {REPAIR}")
