"""Data as inputs of a run in MLflow: the prepared mixture, and each source that it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import EMBEDDED

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

# MLflow's limits. A data set is told from others by name and digest.
DIGEST_LENGTH, NAME_LENGTH = 36, 500
NAMED_FILES = 100  # of a source, each with its SHA-256; of more their number is told
CONTEXT = "mlflow.data.context"  # tag that MLflow's pages show beside an input
TRAINING, SOURCE = "training", "source"
# Settings of a source that say what is read, whatever part of it the mixture takes.
WHAT_IS_READ = (
    *("path", "config", "revision", "data_files", "split", "validation_split"),
    *("text_column", "columns", "sample_by", "filter"),
)
USED = ("documents_used", "tokens", "epochs", "proportion_asked", "proportion_realised")


def inputs_of(data_dir: Path, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Attachments of kind "data": the mixture first, by what its content is, then its sources.

    Args:
        manifest: of the data folder `data_dir`.
    """
    sources = manifest["sources"]
    splits = {
        split: {key: value for key, value in facts.items() if key != "files"}
        for split, facts in manifest["splits"].items()
    }
    yield {
        "name": " + ".join(source["name"] for source in sources)[:NAME_LENGTH],
        "digest": manifest["content_digest"][:DIGEST_LENGTH],
        "source_type": "local",
        "source": json.dumps({"uri": str(data_dir)}),
        "profile": json.dumps({"splits": splits, "sources": sources}),
        "tags": {CONTEXT: TRAINING},
    }
    made_of = manifest["config"]["fingerprints"]
    settings = manifest["config"]["dataset_configs"]
    for source, facts in zip(settings, sources, strict=True):
        yield _source_input(source, made_of[source["name"]], facts)


def is_source(entry: DatasetInput) -> bool:
    """Whether an input is a source of a mixture, and not what was trained on."""
    return any((tag.key, tag.value) == (CONTEXT, SOURCE) for tag in entry.tags)


def _source_input(
    source: Mapping[str, Any], made_of: Mapping[str, str | None] | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    read = {key: source[key] for key in WHAT_IS_READ if source[key]}
    commit = (made_of or {}).get("commit")
    if commit:
        kind = "hugging_face"
        place = {"path": source["path"], "config_name": source["config"], "split": source["split"]}
        place["revision"] = commit
    else:
        kind, place = "local", {"uri": _uri(source)}
    told = {"files": len(made_of)} if made_of and len(made_of) > NAMED_FILES else made_of
    return {
        "name": source["name"][:NAME_LENGTH],
        # With the files' SHA-256, a hub's commit, what a server tells of its files, or Python's version.
        "digest": digest([read, made_of])[:DIGEST_LENGTH],
        "source_type": kind,
        "source": json.dumps(place),
        "profile": json.dumps({"read": read, "made_of": told}),
        "tags": {CONTEXT: SOURCE, **{key: str(round(facts[key], 6)) for key in USED}},
    }


def _uri(source: Mapping[str, Any]) -> str:
    """Where a source that is not the hub's lies: the first of its files, or the folder."""
    if source["path"] == EMBEDDED:
        return EMBEDDED
    files = source["data_files"]
    while files and not isinstance(files, str):
        files = next(iter(files.values() if isinstance(files, Mapping) else files), None)
    return files or source["path"]
