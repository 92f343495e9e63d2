"""Caches of the Hugging Face libraries, where the home cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHES = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
OLD_NAMES = {"HF_HUB_CACHE": "HUGGINGFACE_HUB_CACHE"}


def use_writable_caches() -> None:
    """Name folders under the temporary one in the environment, for those that cannot be written.

    It must run before those libraries are imported. A hub cache that is there can be read, and is kept.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    # Unlike Path.expanduser, it does not mind a user without a home.
    home = Path(os.path.expanduser(os.environ.get("HF_HOME") or default))  # noqa: PTH111
    for variable, name in CACHES.items():
        given = os.environ.get(variable) or os.environ.get(OLD_NAMES.get(variable, ""))
        folder = Path(os.path.expandvars(os.path.expanduser(given or home / name)))  # noqa: PTH111
        if not _can_be_written(folder) and not (name == "hub" and folder.is_dir()):
            os.environ[variable] = str(_spare_folder() / name)


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _spare_folder() -> Path:
    """The same one for all processes of this user, unless it is somebody else's: code is loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"dynamic-transformers-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.lstat().st_uid == os.getuid() else Path(tempfile.mkdtemp())
