"""Labels of runs that were not given any, or the same one though they differ: by what differs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from dynamic_transformers.manifest import digest

LISTED = 3  # settings in a label
DATA = "data"


def label_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Give each run a `variant`, such that runs of one variant and point differ in nothing but the seed.

    A run of a study keeps its label. One that has none gets the name of its architecture. Where runs with
    one label and one point were trained with other settings, or on other data with the same seed, the
    settings in which they differ join the label: `mod capacity=0.25`.
    """
    for run in runs:
        run["variant"] = run["variant"] or run["architecture"]
    members: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        members[run["variant"], json.dumps(run["point"], sort_keys=True)].append(run)
    for same in members.values():
        contents = [content_of(run, same) for run in same]
        keys = {key for content in contents for key in content}
        differing = [
            key for key in sorted(keys) if len({digest(content.get(key)) for content in contents}) > 1
        ]
        for run, content in zip(same, contents, strict=True):
            if differing:
                run["variant"] = f"{run['variant']} {difference(content, differing)}"


def content_of(run: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a run, and its data where another run of the same seed had other data."""
    data = {other["reference"]["data_digest"] for other in others if other["seed"] == run["seed"]}
    return run["settings"] | ({DATA: run["reference"]["data_digest"][:8]} if len(data) > 1 else {})


def difference(content: dict[str, Any], keys: Sequence[str]) -> str:
    """`capacity=0.25, max_steps=100`; with a digest of all where they are too many to list."""
    listed = [f"{key.rpartition('.')[2]}={_short(content.get(key))}" for key in keys[:LISTED]]
    if len(keys) > LISTED:
        listed.append(f"… {digest([content.get(key) for key in keys])[:6]}")
    return ", ".join(listed)


def _short(value: Any) -> str:
    """A setting's value; null is whatever the architecture does by itself."""
    if isinstance(value, dict):
        return " ".join(map(_short, value.values()))
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
