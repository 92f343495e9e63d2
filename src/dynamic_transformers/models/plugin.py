"""An architecture from outside: two files that are what an architecture of ours is, a record and a model.

They are loaded as if they lay in models/architectures/ and models/, so the record may say `from .base import
Architecture`, and the model's file `from .carried import CarriedCode`.
"""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dynamic_transformers import models
from dynamic_transformers.models import architectures
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.architectures.base import Architecture

LARGEST = 90_000  # bytes of both files as JSON within JSON: on a cluster they are part of one argument
NEEDED = ("name", "title", "description", "model_type", "classes", "module")  # that a record must say

_staged: dict[str, str] = {}  # name → text of each file that this process has loaded


def read_plugin(path: Path) -> dict[str, str]:
    """Make an architecture known, and give name → text of its files: the record's, then the model's.

    Args:
        path: of the record's file; the model's lies beside it.

    Raises:
        ValueError: says which file is missing, or what is wrong with it.
    """
    files = {path.name: _text(path)}
    model = path.with_name(f"{_record_of(path.name, files[path.name]).module}.py")
    if model.name == path.name:
        raise ValueError(f"{path.name}: the model needs a file of its own; name it as the record's module")
    files[model.name] = _text(model)
    add_plugin(files)
    return files


def add_plugin(files: Mapping[str, str]) -> None:
    """Make an architecture known for the life of this process.

    Args:
        files: as `read_plugin` gives them.

    Raises:
        ValueError: they are too large, or another architecture has their names.
    """
    if len(files) != 2 or not all(isinstance(text, str) for text in files.values()):
        raise ValueError(f"{', '.join(files)}: give the files of a record and of its model, by name")
    if (size := len(json.dumps(json.dumps(files)))) > LARGEST:
        raise ValueError(f"{', '.join(files)}: {size:,} bytes in the settings; at most {LARGEST:,} fit")
    (name, text), (model, model_text) = files.items()
    record = _record_of(name, text)
    _stage(_model_folder(), model, model_text)
    for known in ARCHITECTURES.values():
        if known is not record and {known.name, known.model_type} & {record.name, record.model_type}:
            raise ValueError(f"{name}: there is an architecture {known.name} ({known.model_type}) already")
    ARCHITECTURES[record.name] = record


def staged_text(name: str) -> str | None:
    """What this process has loaded as a plugin's file of this name."""
    return _staged.get(name)


def _record_of(name: str, text: str) -> Architecture:
    """The record in a file of this name and text."""
    _stage(_record_folder(), name, text)
    try:
        module = importlib.import_module(f"{architectures.__name__}.{Path(name).stem}")
        record = module.ARCHITECTURE
    except (Exception, SystemExit) as error:  # whatever the file does
        del _staged[name]
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    missing = [attribute for attribute in NEEDED if not getattr(record, attribute, "")]
    if missing or not isinstance(record, Architecture):
        raise ValueError(f"{name}: ARCHITECTURE must be an Architecture with {', '.join(missing or NEEDED)}")
    return record


def _stage(folder: Path, name: str, text: str) -> None:
    """Write a file where it is imported from; the same one again changes nothing."""
    if _staged.get(name) == text:
        return
    if not name.endswith(".py") or not name.removesuffix(".py").isidentifier():
        raise ValueError(f"{name}: must be the name of a Python file")
    if any((Path(package.__path__[0]) / name).exists() for package in (models, architectures)):
        raise ValueError(f"{name}: is the name of a file of ours; choose another")
    if "${" in text:
        raise ValueError(f"{name}: holds ${{, which configuration files read as an interpolation")
    if name in _staged:
        raise ValueError(
            f"{name}: another text under this name has been loaded; to compare two, give the second other "
            "names (files, record, model_type)"
        )
    _staged[name] = text
    (folder / name).write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="dynamic-transformers-plugin-")


@functools.cache
def _record_folder() -> Path:
    """Where records are imported from, too."""
    folder = Path(_temporary().name, "architectures")
    folder.mkdir()
    architectures.__path__.append(str(folder))
    return folder


@functools.cache
def _model_folder() -> Path:
    """Where models are imported from, too; with all of ours, since an export copies what they import."""
    folder = Path(_temporary().name, "models")
    folder.mkdir()
    for file in Path(models.__file__).parent.glob("*.py"):
        (folder / file.name).symlink_to(file)
    models.__path__.append(str(folder))
    return folder


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
