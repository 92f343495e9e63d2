"""The step `prepare_data` in parts, for several machines: a plan, groups of shards, and what mixes them.

Together they write, byte for byte, what `prepare` writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dynamic_transformers.data.fingerprints import fingerprints
from dynamic_transformers.data.first_pass import all_shards, encode, encode_jobs, finished_shards
from dynamic_transformers.data.prepare import STEP, check_unchanged, data_config, mix, tokenizer_of
from dynamic_transformers.data.preview import write_page
from dynamic_transformers.data.sources import Shard
from dynamic_transformers.manifest import read_manifest, step_output, write_json, write_manifest
from dynamic_transformers.settings import Settings, UserError

PLAN = "plan_data"


def plan_shards(settings: Settings, output_dir: Path) -> None:
    """Write the tokenizer, and in the manifest the shards of all sources; or find them written.

    Raises:
        UserError: a source or tokenizer cannot be had, or changes while it is looked at.
    """
    data, seed = settings.data, settings.run.seed
    config = {**data_config(settings), "fingerprints": fingerprints(data)}
    with step_output(output_dir, PLAN, config) as folder:
        if folder is None:
            return
        tokenizer_of(data).save_pretrained(folder / "tokenizer")
        jobs = encode_jobs(data, all_shards(data), *_tokenizer(folder), Path())
        shards = [
            {"folder": job.folder.name, "size": job.size, "shards": [asdict(shard) for shard in job.shards]}
            for job in jobs
        ]
        check_unchanged(config["fingerprints"], data)
        write_manifest(folder, PLAN, config, {}, seed=seed, shards=shards)


def tokenize_group(settings: Settings, plan_dir: Path, group: int, groups: int, output_dir: Path) -> None:
    """Write the folders of a group's shards, and `shards.json`, their names.

    Args:
        settings: as the plan was made with.
        group: from 1 to `groups`.
        output_dir: shards that are finished there are not done again; what else is there is removed.

    Raises:
        UserError: a source cannot be read, or is not what it was when the plan was made.
    """
    entries = dealt(read_manifest(plan_dir, PLAN)["shards"], groups)[group - 1]
    shards = [tuple(Shard(**shard) for shard in entry["shards"]) for entry in entries]
    tokenizer, tokenizer_folder = _tokenizer(plan_dir)
    jobs = encode_jobs(settings.data, shards, tokenizer, tokenizer_folder, output_dir)
    for job, entry in zip(jobs, entries, strict=True):
        if job.folder.name != entry["folder"]:
            what = ", ".join(str(shard.file or job.source.path) for shard in job.shards)
            raise UserError(
                f"data.dataset_configs.{job.source.name}: {what} has changed since {PLAN}: run that again"
            )
    names = sorted({job.folder.name for job in jobs})
    output_dir.mkdir(parents=True, exist_ok=True)
    for other in output_dir.iterdir():
        if other.is_dir() and other.name not in names:
            shutil.rmtree(other)
    encode(settings.data, jobs, output_dir, len(tokenizer))
    write_json(output_dir / "shards.json", names)


def merge_groups(settings: Settings, plan_dir: Path, groups: Sequence[Path], output_dir: Path) -> None:
    """Write the data folder, or find it finished; no source is read.

    Args:
        settings: as the plan was made with.
        groups: what `tokenize_group` wrote, in any order.

    Raises:
        UserError: too many records are broken, or a split is empty.
    """
    plan, data = read_manifest(plan_dir, PLAN), settings.data
    with step_output(output_dir, STEP, plan["config"]) as folder:
        if folder is None:
            return
        shutil.copytree(plan_dir / "tokenizer", folder / "tokenizer")
        there = {path.name: path for group in groups for path in group.iterdir()}
        if missing := sum(entry["folder"] not in there for entry in plan["shards"]):
            raise UserError(
                f"{missing} of {len(plan['shards'])} folders of shards are missing: give what every group of "
                "tokenize_shards wrote"
            )
        shards = [(there[entry["folder"]], Shard(**entry["shards"][0])) for entry in plan["shards"]]
        accounts, finished = finished_shards(data, shards)
        facts = mix(folder, _tokenizer(plan_dir)[0], accounts, finished, data, plan["seed"])
        write_page(folder, facts)
        write_manifest(folder, STEP, plan["config"], {}, seed=plan["seed"], **facts)


def dealt(entries: Sequence[dict[str, Any]], groups: int) -> list[list[dict[str, Any]]]:
    """A plan's shards in groups of about the same size: the largest first, each to the one that has least."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(groups)]
    sizes = [0] * groups
    for entry in sorted(entries, key=lambda entry: -entry["size"]):
        least = min(range(groups), key=lambda group: (sizes[group], len(found[group])))
        found[least].append(entry)
        sizes[least] += entry["size"]
    return found


def _tokenizer(folder: Path) -> tuple[PreTrainedTokenizerFast, Path]:
    """A plan's tokenizer, and where it lies."""
    place = folder / "tokenizer"
    return PreTrainedTokenizerFast.from_pretrained(place), place
