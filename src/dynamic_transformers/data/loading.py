"""Reading a finished data folder: its splits and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.blocks import Blocks
from dynamic_transformers.manifest import file_digest, read_manifest
from dynamic_transformers.settings import UserError

REPAIR = "prepare the data again with --force"


def load_split(data_dir: Path, split: str) -> Blocks:
    """Blocks of `train`, `validation` or `test`.

    Raises:
        UserError: the data folder is missing, unfinished, of an older version, or damaged.
    """
    manifest = read_manifest(data_dir, "prepare_data")
    facts = manifest["splits"][split]
    if "token_dtype" not in facts:
        raise UserError(f"{data_dir}: was prepared by an older version; {REPAIR}")
    try:
        return Blocks(Path(data_dir) / split, facts, manifest["block_size"])
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{Path(data_dir) / split}: damaged: {reason}; {REPAIR}") from error


def verify_split(data_dir: Path, split: str) -> None:
    """Compare a split's files with their SHA-256 in the manifest.

    Raises:
        UserError: the data folder is missing or unfinished, or a file of the split is missing or differs.
    """
    _verify(_files(data_dir, split))


def batches_of(blocks: Blocks, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """All blocks in their order, `batch_size` at a time, as `Blocks.batch` gives them."""
    for start in range(0, len(blocks), batch_size):
        yield blocks.batch(range(start, min(start + batch_size, len(blocks))))


def source_names(data_dir: Path) -> list[str]:
    """Names of the sources, in the order in which `domains_of` numbers them.

    Raises:
        UserError: the data folder is missing or unfinished.
    """
    return [source["name"] for source in read_manifest(data_dir, "prepare_data")["sources"]]


def domains_of(blocks: Blocks) -> torch.Tensor:
    """Number of the source of each token, (N, T) int64."""
    return torch.from_numpy(np.stack([blocks.sources(place) for place in range(len(blocks))]))


def load_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Tokenizer of the data folder, which must be the one that the data were made with.

    Raises:
        UserError: the data folder is missing or unfinished, or a file of the tokenizer is missing or differs.
    """
    folder = Path(data_dir) / "tokenizer"
    digests = read_manifest(data_dir).get("tokenizer_files", {})  # data of an older version name none
    _verify(_there(folder, digests))
    return PreTrainedTokenizerFast.from_pretrained(folder)


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
