"""The step `prepare_data`: from the data settings to a data folder with its manifest."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.blocks import unigram_loss
from dynamic_transformers.data.conversations import PLAIN_TEMPLATE
from dynamic_transformers.data.documents import SPLITS
from dynamic_transformers.data.files import digest_of
from dynamic_transformers.data.fingerprints import Fingerprint, fingerprints, first_change
from dynamic_transformers.data.first_pass import encode_all, sample_all
from dynamic_transformers.data.merging import ShardFolder, Shards, each_once, lowest, mixture
from dynamic_transformers.data.preview import write_page
from dynamic_transformers.data.probes import write_tasks
from dynamic_transformers.data.shards import Account
from dynamic_transformers.data.splits import (
    check_broken,
    check_splits,
    choose,
    source_facts,
    tell,
    warn,
    write_split,
)
from dynamic_transformers.data.tokenization import load_pretrained_tokenizer, train_tokenizer
from dynamic_transformers.folders import discard, sole_writer
from dynamic_transformers.interruption import Interrupted, Interruption, leave
from dynamic_transformers.manifest import MANIFEST, digest, fresh_folder, read_manifest, write_manifest
from dynamic_transformers.settings import DataSettings, Settings, UserError

STEP = "prepare_data"
TOKENIZER_CHARACTERS = 8_000_000

logger = logging.getLogger("dynamic_transformers")


def data_config(settings: Settings) -> dict[str, Any]:
    """The settings that the data depend on: the seed, and the data settings but batch, place, processes."""
    config = dataclasses.asdict(settings.data)
    del config["batch_size"], config["output_dir"], config["processes"]
    return {**config, "seed": settings.run.seed}


def default_data_dir(settings: Settings) -> Path:
    """`data.output_dir`, else the folder under `run.output_dir` of these data settings and source files.

    Every source file is read for it (SHA-256): a changed file gets a folder of its own, and runs on the old
    data keep theirs.
    """
    if settings.data.output_dir:
        return Path(settings.data.output_dir)
    now = fingerprints(settings.data)
    changes = []
    for made in _made_with(settings):
        change = first_change(read_manifest(made)["config"]["fingerprints"], now)
        if change is None:
            return made
        changes.append(change)
    if changes:
        logger.info("data: %s: prepared anew", changes[0])
    return _parent(settings) / digest({**data_config(settings), "fingerprints": now})[:12]


def find_content(settings: Settings, content_digest: str) -> Path | None:
    """Finished data of these settings with this content, whatever has become of their sources since."""
    for folder in _made_with(settings):
        manifest = read_manifest(folder)
        if manifest["content_digest"] == content_digest:
            change = first_change(manifest["config"]["fingerprints"], fingerprints(settings.data))
            if change:
                logger.warning("data: %s: the run goes on with its own data, %s", change, folder)
            else:
                logger.info("data: %s is finished", folder)
            return folder
    return None


def check_prepared(settings: Settings, folder: Path) -> None:
    """Refuse to take a folder in the place of data that would be prepared.

    Raises:
        UserError: it is no finished data folder, or holds data of other settings.
    """
    made = read_manifest(folder, STEP)["config"]
    _refuse_others(folder, data_config(settings), made, "give the settings that they were prepared with")


def prepare(settings: Settings, output_dir: Path, force: bool = False) -> Path:
    """Write the data folder, or find it finished for the same settings and source files.

    Args:
        settings: their `data` part and `run.seed`.
        output_dir: where it goes. Data made of other source files are replaced, nothing else is.
        force: make it anew though it is finished, or holds data of other settings.

    Returns:
        `output_dir`.

    Raises:
        UserError: a source or tokenizer cannot be had, or changes while it is read, too many records are
            broken, a split is empty, or `output_dir` holds data of other settings.
        Interrupted: SIGTERM or SIGINT came.
    """
    output_dir = Path(output_dir)
    config = {**data_config(settings), "fingerprints": fingerprints(settings.data)}
    work = work_folder(output_dir)
    try:
        with Interruption(then=leave), sole_writer(output_dir, wait=True):
            if not force and _serves(output_dir, config):
                logger.info("data: %s is finished", output_dir)
            else:
                with fresh_folder(output_dir, STEP) as folder:
                    facts = _fill(folder, work, settings.data, settings.run.seed)
                    check_unchanged(config["fingerprints"], settings.data)
                    write_page(folder, facts)
                    write_manifest(folder, STEP, config, {}, seed=settings.run.seed, **facts)
                logger.info("data: written to %s", output_dir)
            discard(work, output_dir.resolve())  # also where a kill came between
    except Interrupted:
        logger.warning("data: interrupted; finished shards stay, and the same command goes on from there")
        raise
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say where it is
            error.filename = str(output_dir)
        raise
    return output_dir


def check_unchanged(before: Mapping[str, Fingerprint | None], data: DataSettings) -> None:
    """Refuse what was read of files that somebody has changed meanwhile.

    Raises:
        UserError: names the source and the file.
    """
    change = first_change(before, fingerprints(data))
    if change:
        raise UserError(f"{change} while it was read; run the same command again when nobody writes there")


def _serves(folder: Path, config: dict[str, Any]) -> bool:
    """Whether `folder` is finished and holds what `config` asks for."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    if manifest["step"] != STEP:
        return False  # fresh_folder refuses it
    made = manifest["config"]
    _refuse_others(folder, config, made, "name another data.output_dir, or replace them with --force")
    change = first_change(made["fingerprints"], config["fingerprints"])
    if change:
        logger.info("data: %s since %s was made: prepared anew", change, folder)
    return change is None


def _refuse_others(folder: Path, asked: dict[str, Any], made: dict[str, Any], remedy: str) -> None:
    """Refuse data of other settings; what has become of their sources does not count."""
    shared = {source["name"] for source in asked["dataset_configs"]}
    shared &= {source["name"] for source in made["dataset_configs"]}
    now, then = _by_name(asked, shared), _by_name(made, shared)
    differing = [
        f"{key}={now.get(key)} (there {then.get(key)})" for key in now | then if now.get(key) != then.get(key)
    ]
    if differing:
        raise UserError(f"{folder}: holds data of other settings: {', '.join(differing)}; {remedy}")


def _by_name(config: dict[str, Any], sources: Container[str]) -> dict[str, Any]:
    """Settings of `data_config` by their full names, those of these sources one by one."""
    settings = {f"data.{key}": value for key, value in config.items() if key not in ("fingerprints", "seed")}
    settings["data.dataset_configs"] = [source["name"] for source in config["dataset_configs"]]
    for source in config["dataset_configs"]:
        if (name := source["name"]) in sources:
            settings |= {f"data.dataset_configs.{name}.{key}": value for key, value in source.items()}
    return {**settings, "run.seed": config["seed"]}


def work_folder(output_dir: Path) -> Path:
    """Where finished shards are kept while a data folder is made; a link is followed."""
    output_dir = output_dir.resolve()
    return output_dir.parent / f".{output_dir.name}.shards"


def _parent(settings: Settings) -> Path:
    return Path(settings.run.output_dir) / "data"


def _made_with(settings: Settings) -> Iterator[Path]:
    """Finished data folders of the same settings, where they are looked for, the newest first."""
    asked = {**data_config(settings), "fingerprints": None}
    named = settings.data.output_dir
    folders = (
        [Path(named)] if named else [path for path in _parent(settings).glob("*") if path.name[0] != "."]
    )
    manifests = [path for folder in folders if (path := folder / MANIFEST).is_file()]
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            manifest = read_manifest(path.parent, STEP)
        except UserError:
            continue  # another step's, or damaged
        if {**manifest["config"], "fingerprints": None} == asked:
            yield path.parent


def _fill(folder: Path, work: Path, data: DataSettings, seed: int) -> dict[str, Any]:
    """Write everything but the manifest; returns its facts.

    Args:
        work: where finished shards are kept until the whole is finished.
    """
    tokenizer = tokenizer_of(data)
    tokenizer.save_pretrained(folder / "tokenizer")
    accounts, finished = encode_all(data, tokenizer, folder / "tokenizer", work)
    return mix(folder, tokenizer, accounts, finished, data, seed)


def mix(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    accounts: list[Account],
    finished: list[ShardFolder],
    data: DataSettings,
    seed: int,
) -> dict[str, Any]:
    """Write what finished shards give, beside the tokenizer; returns the manifest's facts.

    Args:
        folder: holds the tokenizer in `tokenizer/`.
        accounts: of each source.

    Raises:
        UserError: too many records are broken, or a split is empty.
    """
    tokenizer_files = _digests((folder / "tokenizer").iterdir())
    check_broken(data, accounts)
    lines = [json.dumps(record) + "\n" for account in accounts for record in account.quarantine]
    (folder / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")

    pools_folder = folder / "pools"
    with closing(Shards(finished, len(tokenizer))) as shards:
        pools, duplicates = each_once(shards, len(data.dataset_configs), seed, pools_folder)
        check_splits(data, pools)
        chosen = {split: choose(data, split, pools[split]) for split in SPLITS}
        splits, counts, without_loss = {}, {}, {}
        for split in SPLITS:
            pieces = mixture(shards, pools[split], chosen[split])
            written = write_split(folder / split, pieces, data, tokenizer)
            splits[split], counts[split], without_loss[split] = written
        sources = source_facts(data, accounts, duplicates, pools, chosen["train"], without_loss["train"])
        tell(sources)
        warnings = warn(data, sources, pools)
        names = [source.name for source in data.dataset_configs]

        def test_texts(source: str, purpose: str, count: int, shortest: int) -> list[str]:
            return lowest(shards, pools["test"][names.index(source)], purpose, count, shortest)

        questions = set().union(*(account.questions for account in accounts))
        write_tasks(folder / "tasks", test_texts, questions, data)
    shutil.rmtree(pools_folder)
    return {
        "sources": sources,
        "warnings": warnings,
        "splits": splits,
        # What a training reads. Neither where the data came from nor what made them is part of it.
        "content_digest": digest(
            {
                "splits": {split: facts["sha256"] for split, facts in splits.items()},
                "tokenizer": tokenizer_files["tokenizer.json"],
                "vocab_size": len(tokenizer),
                "block_size": data.block_size,
            }
        ),
        "unigram_loss": {
            split: unigram_loss(counts["train"], counts[split]) for split in ("validation", "test")
        },
        "vocab_size": len(tokenizer),
        "block_size": data.block_size,
        "tokenizer_name": data.tokenizer_name,
        "tokenizer_files": tokenizer_files,
    }


def tokenizer_of(data: DataSettings) -> PreTrainedTokenizerFast:
    """The tokenizer that is named, or one that is trained on the sources.

    Raises:
        UserError: there is none, or a source cannot be read.
    """
    if data.tokenizer_name is not None:
        return load_pretrained_tokenizer(data.tokenizer_name)
    texts = sample_all(data, TOKENIZER_CHARACTERS)
    template = PLAIN_TEMPLATE if data.has_conversations else None
    tokenizer = train_tokenizer(texts, data.vocab_size, template)
    logger.info("tokenizer: %d entries, trained on %d documents", len(tokenizer), len(texts))
    return tokenizer


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    return {file.name: digest_of(file) for file in sorted(files)}
