"""All shards of all sources, read and tokenized by several processes; what is finished is not done again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dynamic_transformers.data.blocks import token_dtype
from dynamic_transformers.data.datatrove import check_tokenizer
from dynamic_transformers.data.decontamination import Contamination
from dynamic_transformers.data.documents import rank
from dynamic_transformers.data.encoding import DocumentEncoder, Encoder
from dynamic_transformers.data.fingerprints import shard_identity
from dynamic_transformers.data.merging import ShardFolder
from dynamic_transformers.data.mixing import shares
from dynamic_transformers.data.progress import ReadingProgress
from dynamic_transformers.data.rows import UnreadableError
from dynamic_transformers.data.shards import TOKENS, Account, documents_of, write_shards
from dynamic_transformers.data.sources import Shard, shards_of
from dynamic_transformers.data.tokenization import Sample, marker_ids
from dynamic_transformers.data.workers import cores, done_by
from dynamic_transformers.manifest import digest, file_digest, fresh_folder
from dynamic_transformers.settings import DataSettings, SourceSettings, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES_OF_A_PROCESS = 16 << 20  # for fewer, the start of one more does not pay
BYTES_TOGETHER = 4 << 20  # of small files in one folder, which costs as much time as 100 kB of text

# What a shard depends on, beside its source and the tokenizer.
SHARD_SETTINGS = (
    *("validation_split_percentage", "test_split_percentage", "min_characters", "arithmetic_examples"),
    *("max_document_characters", "long_documents"),
)

logger = logging.getLogger("dynamic_transformers")

FileState = tuple[int, int]  # bytes, and time of the last change in ns


@dataclass(frozen=True)
class Job:
    """Shards of one source and split that are read together: one, or several small ones."""

    shards: tuple[Shard, ...]
    source: SourceSettings
    data: DataSettings

    @property
    def size(self) -> int:
        """Bytes, about."""
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class EncodeJob(Job):
    """Shards to be tokenized into a folder.

    tokenizer: folder of the tokenizer.
    made_with: digest of it and of all else that is the same for every shard.
    markers: ids of what begins and what ends a document.
    states: of the shards' files when their content was identified.
    """

    folder: Path
    tokenizer: Path
    made_with: str
    markers: tuple[int, int]
    states: list[FileState | None]


@dataclass(frozen=True)
class SampleJob(Job):
    """Shards of which texts of about so many characters are taken, to train a tokenizer on."""

    characters: float


def encode_all(
    data: DataSettings, tokenizer: PreTrainedTokenizerFast, tokenizer_folder: Path, work: Path
) -> tuple[list[Account], list[ShardFolder]]:
    """Tokenize what is not tokenized yet; an account for each source, and all finished folders.

    Args:
        tokenizer_folder: where the tokenizer lies.
        work: holds the finished folders.

    Raises:
        UserError: a source cannot be read.
    """
    jobs = encode_jobs(data, all_shards(data), tokenizer, tokenizer_folder, work)
    for unfinished in work.glob(".*.new-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    encode(data, jobs, work, len(tokenizer))
    return finished_shards(data, [(job.folder, job.shards[0]) for job in jobs])


def all_shards(data: DataSettings) -> list[tuple[Shard, ...]]:
    """The shards of all sources, in the order of these, those together that share a folder.

    Raises:
        UserError: a source cannot be read.
    """
    return [shards for source in data.dataset_configs for shards in together(shards_of(source))]


def encode_jobs(
    data: DataSettings,
    shards: Iterable[tuple[Shard, ...]],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_folder: Path,
    work: Path,
) -> list[EncodeJob]:
    """A job for each folder in `work`, which is named after all that its content depends on.

    The account there names source and files: shards that are equal in all else have a folder each.

    Raises:
        UserError: a file's tokens are those of another tokenizer.
    """
    markers = marker_ids(tokenizer)
    settings = {name: getattr(data, name) for name in SHARD_SETTINGS}
    if data.decontaminate:
        found = Contamination.read(Path(data.decontaminate))
        logger.info("data: what quotes one of %d benchmark texts is left out", found.texts - found.short)
        settings["decontaminate"] = file_digest(Path(data.decontaminate))
        for name in (source.name for source in data.dataset_configs if source.path == "datatrove"):
            logger.warning("source %s: its tokens are not compared with the benchmark texts", name)
    rules = [file_digest(tokenizer_folder / "tokenizer.json"), tokenizer.chat_template, markers, settings]
    made_with = digest([*rules, _program()])
    sources = {source.name: source for source in data.dataset_configs}

    def job(shards: tuple[Shard, ...]) -> EncodeJob:
        source = sources[shards[0].source]
        # The states first: what changes while its content is identified is then noticed, too.
        states = [_state(shard) for shard in shards]
        contents = [[shard.file, shard_identity(source, shard)] for shard in shards]
        name = digest([made_with, source.name, contents])[:16]
        return EncodeJob(shards, source, data, work / name, tokenizer_folder, made_with, markers, states)

    jobs = [job(each) for each in shards]
    _check_tokens(jobs, tokenizer.backend_tokenizer)
    return jobs


def encode(data: DataSettings, jobs: Sequence[EncodeJob], work: Path, vocab_size: int) -> None:
    """Do the jobs whose folders in `work` are not there yet, and show how far it is.

    Raises:
        UserError: a source cannot be read.
    """
    left = [job for job in jobs if not job.folder.is_dir()]
    if len(left) < len(jobs):
        logger.info("data: %d of %d shards are there from before", len(jobs) - len(left), len(jobs))
    width = token_dtype(vocab_size).itemsize

    def begun() -> int:
        return sum(map(_size, work.glob(f".*.new-*/{TOKENS}"))) // width

    with (
        ReadingProgress("tokenizing", len(left), sum(job.size for job in left), begun) as progress,
        closing(done_by(_processes(data, left), _encode, left)) as done,
    ):
        for job, tokens in done:
            progress.finish(job.size, tokens)


def finished_shards(
    data: DataSettings, folders: Sequence[tuple[Path, Shard]]
) -> tuple[list[Account], list[ShardFolder]]:
    """An account for each source, and all finished folders, each of which comes with its first shard."""
    numbers = {source.name: number for number, source in enumerate(data.dataset_configs)}
    accounts = [Account() for _ in numbers]
    found = []
    for folder, shard in folders:
        number = numbers[shard.source]
        accounts[number].add(Account.read(folder))
        masked = data.dataset_configs[number].type == "finetune"
        found.append(ShardFolder(folder, number, shard.split == "validation", masked))
    for source, account in zip(data.dataset_configs, accounts, strict=True):
        records = account.records
        told = ", ".join(f"{count} {outcome}" for outcome, count in records.items())
        logger.info("source %s: %d records read: %s", source.name, records.total(), told)
    return accounts, found


def sample_all(data: DataSettings, characters: int) -> list[str]:
    """About so many characters of the training split, each source by its weight, the same for every seed.

    Raises:
        UserError: a source cannot be read.
    """
    parts = shares({source.name: source.weight for source in data.dataset_configs})
    samples = {name: Sample(part * characters) for name, part in parts.items()}
    sources = {source.name: source for source in data.dataset_configs}
    jobs = [
        SampleJob(shards, sources[name], data, samples[name].characters)
        for shards in all_shards(data)
        for name in [shards[0].source]
    ]
    with (
        ReadingProgress("texts for the tokenizer", len(jobs), sum(job.size for job in jobs)) as progress,
        closing(done_by(_processes(data, jobs), _sample, jobs)) as done,
    ):
        for job, texts in done:
            progress.finish(job.size)
            for place, text in texts:
                samples[job.source.name].add(place, text)
    chosen: dict[int, str] = {}
    for sample in samples.values():
        for place, text in sample.texts():
            chosen.setdefault(place, text)  # of texts that several sources have, the first source's
    return list(chosen.values())


def _check_tokens(jobs: Sequence[EncodeJob], tokenizer: Tokenizer) -> None:
    for job in jobs:
        for shard in job.shards:
            if shard.builder != "datatrove":
                continue
            try:
                check_tokenizer(str(shard.file), tokenizer)
            except UnreadableError as error:
                raise UserError(f"data.dataset_configs.{shard.source}: {error}") from error


def together(shards: Sequence[Shard]) -> Iterator[tuple[Shard, ...]]:
    """Shards in their order, small files that follow each other in a split together."""
    group: list[Shard] = []
    for shard in shards:
        size = sum(each.size for each in group) + shard.size
        if group and (size > BYTES_TOGETHER or not shard.size or shard.split != group[0].split):
            yield tuple(group)
            group = []
        group.append(shard)
    if group:
        yield tuple(group)


def _encode(job: EncodeJob) -> int:
    """Do a job; the number of its tokens."""
    with fresh_folder(job.folder) as folder:
        encoder = _encoder(job.tokenizer, job.made_with, job.markers, job.source.type == "finetune")
        tokens = write_shards(folder, job.shards, job.source, job.data, encoder)
        for shard, state in zip(job.shards, job.states, strict=True):
            if _state(shard) != state:
                raise UserError(
                    f"data.dataset_configs.{job.source.name}: {shard.file} was changed while it was read; "
                    "run the same command again when nobody writes there"
                )
    return tokens


def _state(shard: Shard) -> FileState | None:
    """Of a file of this machine; None of anything else, and of a file that has gone."""
    if shard.file is None:
        return None
    try:
        status = Path(shard.file).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@cache
def _program() -> list[str]:
    """What tells one version of this code, and of what it tokenizes with, from another."""
    code = [file_digest(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    return [*code, *map(version, ("tokenizers", "transformers"))]


@cache
def _encoder(tokenizer: Path, made_with: str, markers: tuple[int, int], chat: bool) -> DocumentEncoder:
    texts = Encoder(Tokenizer.from_file(str(tokenizer / "tokenizer.json")), *markers)
    if not chat:
        return DocumentEncoder(texts, None)
    # Not above: texts need neither transformers nor the seconds and the memory that it takes.
    from transformers import PreTrainedTokenizerFast

    from dynamic_transformers.data.conversations import ConversationEncoder

    return DocumentEncoder(texts, ConversationEncoder(PreTrainedTokenizerFast.from_pretrained(tokenizer)))


def _sample(job: SampleJob) -> list[tuple[int, str]]:
    sample = Sample(job.characters)
    for _, document in documents_of(job.shards, job.source, job.data, Account()):
        if document.split == "train" and document.text:
            sample.add(rank(document.digest, 0, "sample"), document.text)
    return sample.texts()


def _processes(data: DataSettings, jobs: Sequence[Job]) -> int:
    """As many as were asked for, else as there are cores, but none that has hardly anything to do."""
    size = sum(job.size for job in jobs)
    most = data.processes or min(cores(), 1 + size // BYTES_OF_A_PROCESS)
    return min(most, len(jobs))


def _size(file: Path) -> int:
    """Bytes of a file; 0 where it is gone."""
    try:
        return file.stat().st_size
    except OSError:
        return 0
