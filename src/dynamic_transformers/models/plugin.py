"""An architecture from outside: two files that are what an architecture of ours is, a record and a model.

They are loaded as if they lay in models/architectures/ and models/, so the record may say `from .base import
Architecture`, and the model's file `from .carried import CarriedCode`.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dynamic_transformers import models
from dynamic_transformers.models import architectures
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.architectures.base import Architecture

LARGEST = 100_000  # characters of both files: a cluster gets them in one parameter
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
    if sum(map(len, files.values())) > LARGEST:
        raise ValueError(f"{', '.join(files)}: hold more than {LARGEST:,} characters")
    (name, text), (model, model_text) = files.items()
    record = _record_of(name, text)
    _stage(_model_folder(), Path(models.__file__).parent, model, model_text)
    if ARCHITECTURES.setdefault(record.name, record) is not record:
        raise ValueError(f"{name}: there is an architecture {record.name} already")


def _record_of(name: str, text: str) -> Architecture:
    """The record in a file of this name and text."""
    _stage(_record_folder(), Path(architectures.__file__).parent, name, text)
    try:
        module = importlib.import_module(f"{architectures.__name__}.{Path(name).stem}")
        record = module.ARCHITECTURE
    except Exception as error:  # whatever a stranger's file does
        del _staged[name]
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    missing = [attribute for attribute in NEEDED if not getattr(record, attribute, "")]
    if missing or not isinstance(record, Architecture):
        raise ValueError(f"{name}: ARCHITECTURE must be an Architecture with {', '.join(missing or NEEDED)}")
    return record


def _stage(folder: Path, ours: Path, name: str, text: str) -> None:
    """Write a file where it is imported from; the same one again changes nothing."""
    if not name.endswith(".py") or not Path(name).stem.isidentifier():
        raise ValueError(f"{name}: must be the name of a Python file")
    if (ours / name).exists():
        raise ValueError(f"{name}: is the name of a file of ours; choose another")
    if _staged.setdefault(name, text) != text:
        raise ValueError(f"{name}: another text under this name has been loaded; begin a new process")
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
