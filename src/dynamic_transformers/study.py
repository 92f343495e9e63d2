"""A study: labelled variants of one configuration, each run at each point of a grid.

study:
  baseline: standard                # what ratios and differences refer to
  variants:                         # label → overrides over the configuration
    standard: [model.type=standard]
    shallow: [model.type=standard, model.depth_factor=0.5]
  grid:                             # setting → values
    run.seed: [0, 1, 2]
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamic_transformers.configure import settings_from_dict, split_override
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.reading import flat
from dynamic_transformers.settings import (
    SEED_KEY,
    ModelSettings,
    Settings,
    StudySettings,
    UserError,
)
from dynamic_transformers.training.identity import resolved_model

# What runs that are compared have in common, whatever else they differ in.
COMMON = ("run", "data", "evaluation", "tracking", "study")
OWN = (SEED_KEY, "data.batch_size")  # of these groups, what a run may have of its own
LONGEST_LABEL = 60  # characters
MATCH = (
    "model.match"  # in a variant: the label of another, whose forward cost the dense model comes nearest to
)


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        name: how folders, steps and logs call it: `mod-seed0`, `mod-size-small-seed1`.
        settings: those that all runs have, the variant's over them, the point's over both; `study` says which
            run it is, and nothing of the others. `run.name` is that of the study and the run's.
    """

    name: str
    settings: Settings

    @property
    def variant(self) -> str:
        """Its label."""
        assert self.settings.study.variant is not None
        return self.settings.study.variant

    @property
    def point(self) -> dict[str, Any]:
        """Setting → value, of the grid."""
        return self.settings.study.point

    def to_json(self) -> str:
        """What it differs in, as one JSON string: how a pipeline's step is told which run it is."""
        study = self.settings.study
        return json.dumps([study.variant, study.overrides, study.point])


def file_name(text: str) -> str:
    """The text as a part of a file's name: what is no letter, digit, `_`, `.` or `+` is a `-`."""
    return re.sub(r"[^\w.+]+", "-", text, flags=re.ASCII).strip("-.") or "-"


def study_runs(settings: Settings) -> list[StudyRun]:
    """All runs of a study, seed by seed, checked: each is one that can be trained, and no other's equal.

    Without variants, one for each architecture.

    Raises:
        UserError: names the variant or the setting of the grid that cannot be meant.
    """
    study = settings.study
    variants, grid = variants_of(study), grid_of(study)
    for label, overrides in variants.items():
        check_label(label)
        for override in overrides:
            check_override(f"study.variants.{label}", split_override(override)[0], grid)
    labels = study.variants or variants  # a baseline that is left out is one all the same
    if study.baseline is not None and study.baseline not in labels:
        raise UserError(f"study.baseline={study.baseline}: must be one of {', '.join(labels)}, or null")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    runs = [
        make_run(settings, label, resolved(settings, label, point), point)
        for point in points
        for label in variants
    ]
    runs.sort(key=lambda run: run.settings.run.seed)  # a study that is cut short has whole seeds
    refuse_equals(runs)
    return runs


def value_at(settings: Settings, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def grid_of(study: StudySettings) -> dict[str, list[Any]]:
    """Setting → values; `run: {seed: [0, 1]}` means the same as `run.seed: [0, 1]`.

    Raises:
        UserError: no list, an empty one, or a setting that runs have in common.
    """
    grid = flat(study.grid)
    for key, values in grid.items():
        check_override("study.grid", key)
        if not isinstance(values, list) or not values:
            raise UserError(f"study.grid.{key}={values}: must be a list of at least one value")
    return grid


def variants_of(study: StudySettings) -> dict[str, list[str]]:
    """Label → overrides, of those that are not left out."""
    if not study.variants:
        return {name: [f"model.type={name}"] for name in ARCHITECTURES}
    variants = {label: given for label, given in study.variants.items() if given is not None}
    if not variants:
        raise UserError("study.variants: all are null; leave at least one")
    return variants


def check_label(label: str) -> None:
    """Refuse a label that cannot stand in a file, a table, a plot or a page.

    Raises:
        UserError: says what a label may be.
    """
    printable = label.isprintable() and label == label.strip() and not any(mark in label for mark in "/\\$<>")
    if not (0 < len(label) <= LONGEST_LABEL and printable and re.search(r"\w", label, re.ASCII)):
        raise UserError(
            f"study.variants: {label[: 2 * LONGEST_LABEL]!r} cannot be a label: up to {LONGEST_LABEL} "
            "printable characters with a letter or digit among them, no / \\ $ < >, no blank at an end"
        )


def check_override(where: str, key: str, grid: Sequence[str] | dict[str, Any] = ()) -> None:
    """Refuse a setting that all runs of a study share, or that the grid sets too.

    Raises:
        UserError: names the key.
    """
    if key.split(".")[0] in COMMON and key not in OWN:
        raise UserError(
            f"{where}: {key} is the same for all runs; of these groups only {', '.join(OWN)} may differ"
        )
    if key in grid:
        raise UserError(f"{where}: {key} is in study.grid, too; leave it to one of them")


def make_run(settings: Settings, label: str, overrides: Sequence[str], point: dict[str, Any]) -> StudyRun:
    """One run of a study.

    Args:
        settings: what all runs have.
        overrides: `key=value` each.
        point: setting → value, or what spells it.

    Raises:
        UserError: names the variant, and what is wrong with it.
    """
    study = {"baseline": settings.study.baseline, "variant": label, "overrides": list(overrides)}
    given = [*overrides, *(f"{key}={spelled(value)}" for key, value in point.items())]
    try:
        result = settings_from_dict(settings.to_dict() | {"study": study}, overrides=given)
    except UserError as error:
        raise UserError(f"study.variants.{label}: {error}") from error
    if result.model.plugin != settings.model.plugin:  # some steps know only what all runs have
        raise UserError(f"study.variants.{label}: model.plugin is the same for all runs of a study")
    values = {key: value_at(result, key) for key in point}
    place = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items() if key != SEED_KEY]
    name = "-".join(map(file_name, [label, *place, f"seed{result.run.seed}"]))
    result.study.point, result.run.name = values, f"{settings.run.name}-{name}"
    return StudyRun(name, result)


def run_from_json(settings: Settings, text: str) -> StudyRun:
    """Inverse of `StudyRun.to_json`.

    Args:
        settings: what all runs have.
    """
    return make_run(settings, *json.loads(text))


def common(settings: Settings) -> Settings:
    """What all runs have: no run's settings change when a study gets another variant."""
    return dataclasses.replace(settings, study=StudySettings(baseline=settings.study.baseline))


def single_run(settings: Settings) -> Settings:
    """The settings of the run that `study.variant` and `study.point` name; as they are where they name none.

    Raises:
        UserError: no such variant, or as `make_run`.
    """
    label, point = settings.study.variant, settings.study.point
    if label is None:
        return settings
    variants = variants_of(settings.study)
    if label not in variants:
        raise UserError(f"study.variant={label}: must be one of {', '.join(variants)}")
    overrides = resolved(settings, label, point)
    run = make_run(settings, label, overrides, point).settings
    for key, values in grid_of(settings.study).items():
        typed = [
            value_at(make_run(settings, label, overrides, {key: value}).settings, key) for value in values
        ]
        if (found := value_at(run, key)) not in typed:
            raise UserError(f"study.variant={label}: {key}={found} is not in study.grid; give one of {typed}")
    return run


def resolved(settings: Settings, label: str, point: dict[str, Any]) -> list[str]:
    """A variant's overrides, with a number of layers in the place of `model.match`.

    Raises:
        UserError: as `matched_layers`.
    """
    overrides = variants_of(settings.study)[label]
    others = [override for override in overrides if split_override(override)[0] != MATCH]
    if len(others) == len(overrides):
        return overrides
    (match,) = (split_override(override)[1] for override in overrides if override not in others)
    try:
        dense = make_run(settings, label, others, point).settings
        layers = matched_layers(settings, dense, match, point)
    except UserError as error:
        raise UserError(f"study.variants.{label}: {error}") from error
    return [*others, f"model.dimensions.num_hidden_layers={layers}"]


def matched_layers(settings: Settings, dense: Settings, match: str, point: dict[str, Any]) -> int:
    """Layers with which a dense model's forward FLOPs per token come nearest to those of another variant.

    Of that variant at its capacity, on rows of `data.block_size` tokens; of two numbers the lower one. What
    the vocabulary costs is the same in both.

    Args:
        settings: of the study.
        dense: of the run.
        match: the other variant.

    Raises:
        UserError: no such variant, one that is matched itself, or a model that is
            not standard, or was trained before.
    """
    variants = variants_of(settings.study)
    if match not in variants:
        raise UserError(f"{MATCH}={match}: no such variant; there are {', '.join(variants)}")
    if dense.model.type != "standard" or dense.model.pretrained:
        raise UserError(f"{MATCH}={match} needs model.type=standard and training.mode=scratch")
    if any(split_override(override)[0] == MATCH for override in variants[match]):
        raise UserError(f"{MATCH}={match}: that variant is matched itself")
    other = make_run(settings, match, variants[match], point).settings.model
    # Not above: torch takes a second, and what is refused is refused at once.
    from dynamic_transformers.training.build import model_config
    from dynamic_transformers.training.flops import forward_flops

    def flops(asked: ModelSettings) -> float:
        return forward_flops(model_config(asked, vocab_size=1), settings.data.block_size).total()

    def with_layers(layers: int) -> ModelSettings:
        dimensions = dataclasses.replace(dense.model.dimensions, num_hidden_layers=layers)
        return dataclasses.replace(dense.model, dimensions=dimensions)

    one = flops(with_layers(1))
    further = (flops(other) - one) / (flops(with_layers(2)) - one)
    return max(1, math.ceil(further + 0.5))


def spelled(value: Any) -> str:
    """A value as an override spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def refuse_equals(runs: Sequence[StudyRun]) -> None:
    """Refuse two runs that would be the same, or have the same name.

    Raises:
        UserError: names both.
    """
    names: dict[str, StudyRun] = {}
    contents: dict[str, StudyRun] = {}
    for run in runs:
        values = run.settings.to_dict() | {"model": resolved_model(run.settings)}
        del values["study"], values["run"]["name"]
        content = json.dumps(values, sort_keys=True)
        for known, key, what in ((contents, content, "settings"), (names, run.name, "name")):
            first = known.setdefault(key, run)
            if first is not run:
                raise UserError(
                    f"study: {first.variant} {first.point} and {run.variant} {run.point} have the same "
                    f"{what}; leave one out, or let them differ"
                )
