"""Plain values, as YAML, JSON or a command line give them → typed settings.

Whatever is written for a text stays that text: what YAML would make of `no`, `2026_11_25` or `1e3` is decided
by the type of the field, not by how the value looks.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from dynamic_transformers.constraints import Place, aliases_of, constraints_of, hints_of
from dynamic_transformers.settings import UserError

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class MisfitError(UserError):
    """A value that does not fit its field; `path` holds the keys and indices that lead to it."""

    def __init__(self, path: tuple[str | int, ...], reason: str):
        super().__init__(f"{key_of(path)}{reason}")
        self.path = path


def key_of(path: tuple[str | int, ...]) -> str:
    """`data.dataset_configs[0].name` of its parts."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def read(hint: Any, value: Any, path: tuple[str | int, ...] = ()) -> Any:
    """`value` as the type of a field's annotation; a mapping becomes the dataclass that the annotation names.

    Args:
        value: of strings, numbers, lists and mappings; a string is taken for any type that it spells.
        path: where it stands, for the message.

    Raises:
        MisfitError: an unknown key, or a value of another type.
    """
    base, optional = plain_type(hint)
    if value is None:
        if optional or base is Any:
            return None
        raise MisfitError(path, f": must not be null{', a text is written in quotes' if base is str else ''}")
    if dataclasses.is_dataclass(base):
        assert isinstance(base, type)
        return _group(base, value, path)
    origin = typing.get_origin(base)
    if origin in (list, tuple):
        return _entries(base, origin, value, path)
    if origin is dict:
        entry = typing.get_args(base)[1]
        return {name: read(entry, item, (*path, name)) for name, item in _mapping(value, path).items()}
    read_scalar = _SCALARS.get(base)
    result = value if read_scalar is None else read_scalar(value, path)
    return at_home(result) if any(isinstance(entry, Place) for entry in constraints_of(hint)) else result


def with_own_names(hint: Any, value: Any, path: tuple[str | int, ...] = ()) -> Any:
    """Plain values that fit `hint`, with the fields' own names in place of their aliases.

    Raises:
        MisfitError: a field stands there by both.
    """
    base = plain_type(hint)[0]
    if isinstance(value, dict) and dataclasses.is_dataclass(base):
        assert isinstance(base, type)
        return {
            _own_name(base, name, value, path): with_own_names(_field(base, name, path), entry, (*path, name))
            for name, entry in value.items()
        }
    if isinstance(value, list) and typing.get_origin(base) is list:
        entries = typing.get_args(base)[0]
        return [with_own_names(entries, entry, (*path, index)) for index, entry in enumerate(value)]
    return value


def plain_type(hint: Any) -> tuple[Any, bool]:
    """Type of a field without its constraints, and whether the field may be None."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    (base,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return plain_type(base)[0], True


def hint_at(settings: type, path: tuple[str | int, ...]) -> Any:
    """The annotation of the field that a path leads to.

    Raises:
        MisfitError: there is no such field.
    """
    hint: Any = settings
    for depth, part in enumerate(path):
        base = plain_type(hint)[0]
        if dataclasses.is_dataclass(base):
            assert isinstance(base, type)
            hint = _field(base, str(part), path[:depth])
        elif typing.get_origin(base) is dict:
            hint = typing.get_args(base)[1]
        elif typing.get_origin(base) in (list, tuple):
            if not str(part).isdecimal():
                raise MisfitError(path[:depth], ": must be a list")
            hint = typing.get_args(base)[0]
        elif base is not Any:
            raise MisfitError(path, f": no such key; {key_of(path[:depth])} is a single value")
    return hint


def keys(settings: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass of settings."""
    found = []
    for name, hint in hints_of(settings).items():
        base = plain_type(hint)[0]
        group = isinstance(base, type) and dataclasses.is_dataclass(base)
        found += keys(base, f"{prefix}{name}.") if group else [f"{prefix}{name}"]
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b.c`, JSON-able."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result


def at_home(value: Any) -> Any:
    """Paths with `~` as the user's home, in lists and mappings too."""
    if isinstance(value, str) and value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError as error:
            raise UserError(f"{value}: {error}") from error
    if isinstance(value, list):
        return [at_home(entry) for entry in value]
    if isinstance(value, dict):
        return {name: at_home(entry) for name, entry in value.items()}
    return value


def _group(cls: type, value: Any, path: tuple[str | int, ...]) -> Any:
    values = _mapping(value, path)
    fields = {}
    for name, entry in values.items():
        own = _own_name(cls, name, values, path)
        fields[own] = read(_field(cls, name, path), entry, (*path, name))
    return cls(**fields)


def _own_name(cls: type, name: str, values: dict[str, Any], path: tuple[str | int, ...]) -> str:
    own = aliases_of(cls).get(name, name)
    if own != name and own in values:
        raise MisfitError((*path, name), f": is {key_of((*path, own))} by another name; give one of them")
    return own


def _field(cls: type, name: str, path: tuple[str | int, ...]) -> Any:
    hints = hints_of(cls)
    own = aliases_of(cls).get(name, name)
    if own in hints:
        return hints[own]
    near = difflib.get_close_matches(name, [*hints, *aliases_of(cls)], n=1) or [
        key for key in keys(cls) if key.endswith(f".{name}")
    ]
    if ":" in name:
        hint = "YAML wants a space behind a colon"
    elif near:
        hint = f"did you mean {' or '.join(key_of((*path, key)) for key in near)}?"
    else:
        hint = f"there are {', '.join(hints)}"
    raise MisfitError((*path, name), f": no such key; {hint}")


def _mapping(value: Any, path: tuple[str | int, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MisfitError(path, f"={value}: must be a mapping of keys to values")
    return {str(name): entry for name, entry in value.items()}


def _entries(base: Any, origin: type, value: Any, path: tuple[str | int, ...]) -> Any:
    hints = typing.get_args(base)
    if not isinstance(value, list | tuple):
        raise MisfitError(path, f"={value}: must be a list, [{value}]")
    if origin is list:
        return [read(hints[0], entry, (*path, index)) for index, entry in enumerate(value)]
    if len(value) != len(hints):
        raise MisfitError(path, f"=[{', '.join(map(str, value))}]: must be a list of {len(hints)}")
    pairs = zip(hints, value, strict=True)
    return tuple(read(hint, entry, (*path, index)) for index, (hint, entry) in enumerate(pairs))


def _text(value: Any, path: tuple[str | int, ...]) -> str:
    if isinstance(value, bool | list | dict):
        raise MisfitError(path, f"={value}: must be a text; write it in quotes")
    return str(value)


def _boolean(value: Any, path: tuple[str | int, ...]) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in (*TRUE, *FALSE):
        raise MisfitError(path, f"={value}: must be true or false")
    return word in TRUE


def _may_spell_a_number(value: Any) -> bool:
    """Whether it is a number, or text without what Python alone takes for one: `1_0`, or other digits."""
    if isinstance(value, str):
        return value.isascii() and "_" not in value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, path: tuple[str | int, ...]) -> float:
    try:
        if _may_spell_a_number(value):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise MisfitError(path, f"={value}: must be a number")


def _whole(value: Any, path: tuple[str | int, ...]) -> int:
    try:
        if _may_spell_a_number(value) and not isinstance(value, float):
            return int(value)
    except ValueError:
        pass
    try:
        number = _number(value, path)
    except MisfitError:
        number = 0.5
    if not number.is_integer():  # 1e4 is whole, 0.5, inf and abc are not
        raise MisfitError(path, f"={value}: must be a whole number")
    return int(number)


_SCALARS = {str: _text, bool: _boolean, float: _number, int: _whole}
