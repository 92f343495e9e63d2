"""A compiled pipeline as `pipelines.submit` needs to know it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamic_transformers import __version__
from dynamic_transformers.manifest import digest
from dynamic_transformers.settings import UserError

INPUTS = ("settings", "variants", "grid")
RUNS, GROUPS = "runs", "groups"  # what a loop goes over: of shards the latter


@dataclass
class Package:
    """A compiled pipeline.

    Attributes:
        version: the name of the version that holds its content.
        steps: tasks that are no graph of others, and what the loop that they are in goes over (RUNS or
            GROUPS); None: they are in none.
        cached: whether any of them takes a result of the server's cache.
    """

    path: Path
    name: str
    version: str
    images: list[str]
    steps: dict[str, str | None]
    cached: bool


def read_package(path: Path) -> Package:
    """Read what `pipelines.compile` wrote.

    Raises:
        UserError: no such file, no pipeline, or one that does not take our parameters.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
        name = documents[0]["pipelineInfo"]["name"]
        inputs = documents[0]["root"].get("inputDefinitions", {}).get("parameters", {})
        executors = documents[0]["deploymentSpec"]["executors"].values()
        images = [executor["container"]["image"] for executor in executors if "container" in executor]
        version = f"{__version__}-{digest(documents)[:12]}"
        found = list(tasks_of(documents[0]))
        steps = {name: loop for name, loop, task in found if not is_graph(documents[0], task)}
        cached = any(task.get("cachingOptions", {}).get("enableCache") for _, _, task in found)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no compiled pipeline; `make pipeline` writes one") from error
    if missing := [name for name in INPUTS if name not in inputs]:
        raise UserError(f"{path}: pipeline {name} has no parameter {', '.join(missing)}")
    return Package(path, name, version, images, steps, cached)


def is_graph(spec: dict[str, Any], task: dict[str, Any]) -> bool:
    """Whether a task is made of others: a loop, the body of an exit handler."""
    return "dag" in spec["components"][task["componentRef"]["name"]]


def tasks_of(
    spec: dict[str, Any], part: dict[str, Any] | None = None, loop: str | None = None
) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Name, what the loop around it goes over, and specification of each task, those within others too."""
    for name, task in (part or spec["root"])["dag"]["tasks"].items():
        within = loop
        if items := task.get("parameterIterator", {}).get("items"):
            within = GROUPS if "raw" in items else RUNS  # groups are counted when a pipeline is compiled
        yield name, within, task
        if is_graph(spec, task):
            yield from tasks_of(spec, spec["components"][task["componentRef"]["name"]], within)


def without_cache(path: Path, copy: Path) -> Path:
    """Write the pipeline of `path` to `copy`, but no task of it takes a result of the cache; give `copy`."""
    documents = list(yaml.safe_load_all(path.read_text()))
    for _, _, task in tasks_of(documents[0]):
        if "cachingOptions" in task:
            task["cachingOptions"] = {}
    copy.write_text(yaml.safe_dump_all(documents, sort_keys=True))
    return copy


def check_pushed(package: Package) -> None:
    """Refuse images that no registry has given a digest: a cluster would try to pull them for ever.

    Raises:
        UserError: names the first.
    """
    for image in package.images:
        if "@sha256:" not in image:
            raise UserError(
                f"{image} was not pushed: run `make build-images push-images REGISTRY=...`,"
                " or give --local-images if the cluster has this machine's images"
            )
