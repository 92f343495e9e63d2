"""All shards of all sources, read and tokenized by several processes; what is finished is not done again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.blocks import token_dtype
from dynamic_transformers.data.decontamination import Contamination
from dynamic_transformers.data.documents import rank
from dynamic_transformers.data.encoding import DocumentEncoder, Encoder
from dynamic_transformers.data.fingerprints import shard_identity
from dynamic_transformers.data.merging import ShardFolder
from dynamic_transformers.data.mixing import shares
from dynamic_transformers.data.progress import ReadingProgress
from dynamic_transformers.data.shards import TOKENS, Account, documents_of, write_shard
from dynamic_transformers.data.sources import Shard, shards_of
from dynamic_transformers.data.tokenization import Sample, marker_ids
from dynamic_transformers.data.workers import cores, done_by
from dynamic_transformers.manifest import digest, file_digest, fresh_folder
from dynamic_transformers.settings import DataSettings, SourceSettings

BYTES_OF_A_PROCESS = 16 << 20  # for fewer, the start of one more does not pay

# What a shard depends on, beside its source and the tokenizer.
SHARD_SETTINGS = (
    *("validation_split_percentage", "test_split_percentage", "min_characters", "arithmetic_examples"),
    *("max_document_characters", "long_documents"),
)

logger = logging.getLogger("dynamic_transformers")


@dataclass(frozen=True)
class EncodeJob:
    """A shard to be tokenized into a folder.

    tokenizer: folder of the tokenizer.
    markers: ids of what begins and what ends a document.
    """

    folder: Path
    shard: Shard
    source: SourceSettings
    data: DataSettings
    tokenizer: Path
    markers: tuple[int, int]


@dataclass(frozen=True)
class SampleJob:
    """A shard of which texts of about so many characters are taken, to train a tokenizer on."""

    shard: Shard
    source: SourceSettings
    data: DataSettings
    characters: float


def encode_all(
    data: DataSettings, tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, work: Path
) -> tuple[list[Account], list[ShardFolder]]:
    """Tokenize what is not tokenized yet; an account for each source, and all shards.

    Args:
        tokenizer_folder: where the tokenizer lies.
        work: holds a folder for each finished shard.

    Raises:
        UserError: a source cannot be read.
    """
    markers = marker_ids(tokenizer)
    settings = {name: getattr(data, name) for name in SHARD_SETTINGS}
    if data.decontaminate:
        found = Contamination.read(Path(data.decontaminate))
        logger.info("data: what quotes one of %d benchmark texts is left out", found.texts - found.short)
        settings["decontaminate"] = file_digest(Path(data.decontaminate))
    rules = [file_digest(tokenizer_folder / "tokenizer.json"), tokenizer.chat_template, markers, settings]
    made_with = digest(rules)
    jobs = [
        EncodeJob(
            work / digest([made_with, shard_identity(source, shard)])[:16],
            shard,
            source,
            data,
            tokenizer_folder,
            markers,
        )
        for source in data.dataset_configs
        for shard in shards_of(source)
    ]
    for unfinished in work.glob(".*.new-*"):
        shutil.rmtree(unfinished)
    left = [job for job in jobs if not job.folder.is_dir()]
    if len(left) < len(jobs):
        logger.info("data: %d of %d shards are there from before", len(jobs) - len(left), len(jobs))
    width = token_dtype(len(tokenizer)).itemsize

    def begun() -> int:
        return sum(map(_size, work.glob(f".*.new-*/{TOKENS}"))) // width

    with ReadingProgress("tokenizing", len(left), _bytes_of(left), begun) as progress:
        for job, tokens in done_by(_processes(data, left), _encode, left):
            progress.finish(job.shard.size, tokens)
    numbers = {source.name: number for number, source in enumerate(data.dataset_configs)}
    accounts = [Account() for _ in numbers]
    folders = []
    for job in jobs:
        number = numbers[job.source.name]
        accounts[number].add(Account.read(job.folder))
        folders.append(
            ShardFolder(job.folder, number, job.shard.split == "validation", job.source.type == "finetune")
        )
    for source, account in zip(data.dataset_configs, accounts, strict=True):
        records = account.records
        told = ", ".join(f"{count} {outcome}" for outcome, count in records.items())
        logger.info("source %s: %d records read: %s", source.name, records.total(), told)
    return accounts, folders


def sample_all(data: DataSettings, characters: int) -> list[str]:
    """About so many characters of the training split, each source by its weight, the same for every seed.

    Raises:
        UserError: a source cannot be read.
    """
    parts = shares({source.name: source.weight for source in data.dataset_configs})
    samples = {name: Sample(part * characters) for name, part in parts.items()}
    jobs = [
        SampleJob(shard, source, data, samples[source.name].characters)
        for source in data.dataset_configs
        for shard in shards_of(source)
    ]
    with ReadingProgress("texts for the tokenizer", len(jobs), _bytes_of(jobs)) as progress:
        for job, texts in done_by(_processes(data, jobs), _sample, jobs):
            progress.finish(job.shard.size)
            for place, text in texts:
                samples[job.source.name].add(place, text)
    # Of texts that several sources have, the first source's.
    chosen = {place: text for sample in reversed(samples.values()) for place, text in sample.texts()}
    found = []
    for sample in samples.values():
        found += [chosen.pop(place) for place, _ in sample.texts() if place in chosen]
    return found


def _encode(job: EncodeJob) -> int:
    """Do a job; the number of its tokens."""
    with fresh_folder(job.folder) as folder:
        encoder = _encoder(job.tokenizer, job.markers, job.source.type == "finetune")
        write_shard(folder, job.shard, job.source, job.data, encoder)
    return Account.read(job.folder).tokens


@cache
def _encoder(tokenizer: Path, markers: tuple[int, int], chat: bool) -> DocumentEncoder:
    texts = Encoder(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), *markers)
    if not chat:
        return DocumentEncoder(texts, None)
    # Not above: texts need neither transformers nor the seconds and the memory that it takes.
    from transformers import PreTrainedTokenizerFast

    from dynamic_transformers.data.conversations import ConversationEncoder

    return DocumentEncoder(texts, ConversationEncoder(PreTrainedTokenizerFast.from_pretrained(tokenizer)))


def _sample(job: SampleJob) -> list[tuple[int, str]]:
    sample = Sample(job.characters)
    for _, document in documents_of(job.shard, job.source, job.data, Account()):
        if document.split == "train" and document.text:
            sample.add(rank(document.digest, 0, "sample"), document.text)
    return sample.texts()


def _processes(data: DataSettings, jobs: Sequence[EncodeJob | SampleJob]) -> int:
    """As many as were asked for, else as there are cores, but none that has hardly anything to do."""
    most = data.processes or min(cores(), 1 + _bytes_of(jobs) // BYTES_OF_A_PROCESS)
    return min(most, len(jobs))


def _bytes_of(jobs: Sequence[EncodeJob | SampleJob]) -> int:
    return sum(job.shard.size for job in jobs)


def _size(file: Path) -> int:
    """Bytes of a file; 0 where it is gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
