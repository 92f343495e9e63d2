"""What a setting may be, stated beside its field, and one check that walks over all of them.

    lr: Annotated[float, In("(0, 10]")] = 3e-3
    gate: Annotated[str, OneOf("sigmoid", "raw")] = "sigmoid"

A constraint on a list or tuple holds for each of its entries. None, where a field allows it, always passes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

LONGEST_NAME = 200  # bytes; file systems take 255, and temporary folders add to a name


@dataclass(frozen=True)
class In:
    """Finite numbers of an interval as mathematics writes it: `[0, 1)`, `[1, inf)`."""

    interval: str

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper end; whether they belong to it, the brackets say."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def allows(self, value: float) -> bool:
        """Whether the number lies in the interval; NaN lies in none."""
        low, high = self.bounds
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return above and below

    def refusal(self, value: float) -> str:
        """What the number must be."""
        low, high = self.bounds
        least = f"at least {low:.15g}" if self.interval[0] == "[" else f"above {low:.15g}"
        words = least if high == math.inf else f"in {self.interval}"
        return f"must be {words}" if math.isfinite(value) else f"must be finite and {words}"


# The ranges that many settings share.
SEED = In(f"[0, {2**32 - 1}]")  # what numpy's generators take
Count = Annotated[int, In("[1, inf)")]
Steps = Annotated[int, In("[0, inf)")]
Positive = Annotated[float, In("(0, inf)")]
Weight = Annotated[float, In("[0, inf)")]
Fraction = Annotated[float, In("[0, 1]")]
Scale = Annotated[float, In("(0, 64]")]
Multiplier = Annotated[float, In("[0, 1e6]")]  # 0: these parameters stay as they are


@dataclass(frozen=True, init=False)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def __init__(self, *words: str):
        object.__setattr__(self, "words", words)

    def allows(self, value: str) -> bool:
        """Whether it is one of the words."""
        return value in self.words

    def refusal(self, value: str) -> str:
        """Which words there are."""
        return f"must be one of {', '.join(self.words)}"


@dataclass(frozen=True)
class KeyOf:
    """A key of a table, which may grow."""

    table: Mapping[str, Any]

    def allows(self, value: str) -> bool:
        """Whether the table has it."""
        return value in self.table

    def refusal(self, value: str) -> str:
        """Which keys there are."""
        return f"must be one of {', '.join(self.table)}"


@dataclass(frozen=True)
class FolderName:
    """The name of one folder, whose path stays within the folder above it."""

    taken: tuple[str, ...] = ()  # names that something else beside it has

    def allows(self, value: str) -> bool:
        """Whether a folder of this name can be made, seen, and told from others."""
        plain = value.isprintable() and "/" not in value and not value.startswith(".")
        return (
            plain and bool(value.strip()) and len(value.encode()) <= LONGEST_NAME and value not in self.taken
        )

    def refusal(self, value: str) -> str:
        """What a name may be."""
        if value in self.taken:
            return "is the name of something else in run.output_dir"
        return f"must be the name of one folder: no /, no . in front, at most {LONGEST_NAME} bytes"


@dataclass(frozen=True)
class Place:
    """A file or folder, or a name of the hub: `~` in front means the user's home."""

    def allows(self, value: str) -> bool:
        """Whether a path can be made of it."""
        return isinstance(value, str) and "\0" not in value

    def refusal(self, value: str) -> str:
        """What a path may be."""
        return "must be text without a zero byte"


@dataclass(frozen=True)
class Template:
    """The name of a column, or text with names of columns in braces."""

    def allows(self, value: str) -> bool:
        """Whether each brace holds a name and nothing else."""
        try:
            return all(text is not None for _, text in template_parts(value))
        except ValueError:
            return False

    def refusal(self, value: str) -> str:
        """What a template may be."""
        return "must be the name of a column, or a text with such names in braces, as in '{title}: {body}'"


def template_parts(template: str) -> list[tuple[str, str | None]]:
    """Pairs of text and the column behind it; of the end of the text, ''; None: braces without a mere name.

    Raises:
        ValueError: a brace stands alone.
    """
    parts = []
    for text, name, form, conversion in string.Formatter().parse(template):
        plain = name is None or (name.strip() and not form and not conversion)
        parts.append((text, (name or "") if plain else None))
    return parts


@dataclass(frozen=True)
class Alias:
    """Another name that a setting is taken by, beside its own."""

    name: str


def constraints_of(hint: Any) -> list[Any]:
    """The constraints that a field's annotation holds, inside of an optional or a list too."""
    own = [entry for entry in getattr(hint, "__metadata__", ()) if hasattr(entry, "allows")]
    return own + [entry for part in typing.get_args(hint) for entry in constraints_of(part)]


@functools.cache
def hints_of(settings: type) -> dict[str, Any]:
    """Name → annotation of each field of a dataclass, with its constraints."""
    return typing.get_type_hints(settings, include_extras=True)


@functools.cache
def aliases_of(settings: type) -> dict[str, str]:
    """Other name → name of each field of a dataclass that has one."""
    return {
        entry.name: name
        for name, hint in hints_of(settings).items()
        for entry in getattr(hint, "__metadata__", ())
        if isinstance(entry, Alias)
    }


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, list[Any]]]:
    """Key, value and constraints of everything in `settings` that is no group: entries of lists too."""
    for name, hint in hints_of(type(settings)).items():
        yield from _leaves_of(f"{prefix}{name}", getattr(settings, name), constraints_of(hint))


def _leaves_of(key: str, value: Any, constraints: list[Any]) -> Iterator[tuple[str, Any, list[Any]]]:
    if dataclasses.is_dataclass(value):
        yield from leaves(value, f"{key}.")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _leaves_of(f"{key}[{index}]", entry, constraints)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves_of(f"{key}.{name}", entry, constraints)
    else:
        yield key, value, constraints


def first_violation(settings: Any) -> str | None:
    """`key=value: must be …` of the first setting that its constraints do not allow."""
    return next(filter(None, (violation(*leaf) for leaf in leaves(settings))), None)


def violation(key: str, value: Any, constraints: list[Any]) -> str | None:
    """The same of one value."""
    if value == "":
        return f"{key} is empty"
    for constraint in constraints:
        if value is not None and not constraint.allows(value):
            return f"{key}={value}: {constraint.refusal(value)}"
    return None
