"""Lineage: every step writes a folder whose `manifest.json`, written last, says what made it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynamic_transformers import __version__
from dynamic_transformers.folders import check_target, new_sibling, put_in_place, sole_writer, write_whole
from dynamic_transformers.settings import PROJECT_ROOT, UserError

logger = logging.getLogger("dynamic_transformers")

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "lm-eval", "mlflow", "kfp")


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (64 hex digits) of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically: a reader sees the old file or the new one, never half."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_manifest(
    folder: Path, step: str, config: Any, inputs: dict[str, Path], **facts: Any
) -> dict[str, Any]:
    """Mark `folder` as finished.

    Args:
        folder: the step's output folder.
        step: name of the step (`prepare_data`, `train`, `export`, `evaluate`, `compare`).
        config: the settings that made it, JSON-able.
        inputs: the folders that it read, by role; each must have a manifest of its own.
        facts: anything else worth keeping (seed, counts, ...).

    Returns:
        The manifest.
    """
    content = {"step": step, "config": config, **facts}
    used = {role: read_manifest(path)["digest"] for role, path in inputs.items()}
    manifest = {
        "schema_version": 1,
        **content,
        "config_digest": digest(config),
        "inputs": {
            role: {
                "path": str(path.resolve()),
                "relative": os.path.relpath(path.resolve(), folder.resolve()),  # for when both were moved
                "digest": used[role],
            }
            for role, path in inputs.items()
        },
        # What it was made with, which does not count when it is asked what was made.
        "package_version": __version__,
        "git_revision": revision(),
        "packages": _package_versions(),
        "digest": digest(content | {"inputs": used}),
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path, step: str | None = None) -> dict[str, Any]:
    """Manifest of a finished folder.

    Args:
        step: what the folder must be the output of; None: any step.

    Raises:
        UserError: the folder is missing, unfinished, another step's output, or its manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = "no such folder" if not Path(folder).is_dir() else f"unfinished: it has no {MANIFEST}"
        raise UserError(f"{folder}: {what}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        made_by = manifest["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged; of a run remove this file, of anything else rename the folder, and run the "
            "command again"
        ) from error
    if step not in (None, made_by):
        raise UserError(f"{folder}: is the output of {made_by}, not of {step}")
    return manifest


def input_folder(folder: Path, role: str) -> Path:
    """Where an input of a finished folder lies now: at its place relative to `folder`, or where it was.

    Raises:
        UserError: it is at neither place, or what is there is something else.
    """
    entry = read_manifest(folder)["inputs"][role]
    places = [Path(folder).resolve() / entry.get("relative", "."), Path(entry["path"])]
    for place in (Path(os.path.normpath(place)) for place in places):
        if (place / MANIFEST).is_file() and read_manifest(place)["digest"] == entry["digest"]:
            return place
    what = "is not what it was" if any(place.exists() for place in places) else "is not there any more"
    raise UserError(f"{folder}: its {role}, {entry['path']}, {what}; put it back, or name it yourself")


def finished(folder: Path, step: str, config: Any) -> bool:
    """Whether `folder` is the finished output of `step` for exactly this `config`."""
    if not (Path(folder) / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    return manifest["step"] == step and manifest["config_digest"] == digest(config)


@contextmanager
def fresh_folder(folder: Path, step: str | None = None) -> Iterator[Path]:
    """Fill a temporary sibling of `folder`, which takes its place only when the body succeeds.

    A link is followed. Processes that do so at once each put a whole folder there; the last one stays.

    Args:
        step: what a folder that stands there must be the output of; None: whatever stands there is ours.

    Raises:
        UserError: something else stands there, or what cannot be replaced.
    """
    folder = folder.resolve()
    check_target(folder)
    if step and folder.is_dir():
        ours = (folder / MANIFEST).is_file() and read_manifest(folder)["step"] == step
        if not ours and any(folder.iterdir()):
            raise UserError(
                f"{folder}: holds something else than an output of {step}; name an empty or new folder"
            )
    temporary = new_sibling(folder)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():  # safetensors lets only the owner read: modes are those that the umask says
                path.chmod(temporary.stat().st_mode & 0o666)
        put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def step_output(folder: Path, step: str, config: Any, force: bool = False) -> Iterator[Path | None]:
    """A fresh folder for a step's output, or None where `folder` is finished for exactly this `config`.

    Processes that ask for the same folder take turns: the later ones find what the first has made.

    Raises:
        UserError: as `fresh_folder`.
    """
    with sole_writer(folder, wait=True):
        if not force and finished(folder, step, config):
            logger.info("%s: %s is finished, nothing to do", step, folder)
            yield None
            return
        with fresh_folder(folder, step) as temporary:
            yield temporary


def git(*arguments: str) -> str:
    """What git prints for the project; empty without git, or outside of a repository."""
    try:
        answer = subprocess.run(
            ["git", *arguments], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def revision() -> str:
    """The program's revision: DYNAMIC_TRANSFORMERS_REVISION, as images set it, else that of the sources."""
    return os.environ.get("DYNAMIC_TRANSFORMERS_REVISION") or source_revision()


def source_revision() -> str:
    """Commit of the sources; what an image holds and is not committed adds a digest of its contents."""
    commit = git("rev-parse", "HEAD")
    ignore_file = PROJECT_ROOT / ".dockerignore"
    if not commit or not ignore_file.is_file():  # an installed package may lie in somebody else's repository
        return "unversioned"
    kept = [line[1:] for line in ignore_file.read_text().splitlines() if line.startswith("!")]
    sources = ["images", *kept]
    changed = git("diff", "--name-only", "--relative", "-z", "HEAD", "--", *sources)
    unknown = git("ls-files", "--others", "--exclude-standard", "-z", "--", *sources)
    names = sorted({*changed.split("\0"), *unknown.split("\0")} - {""})
    if not names:
        return commit
    paths = {name: PROJECT_ROOT / name for name in names}
    contents = {name: path.read_bytes().hex() if path.is_file() else None for name, path in paths.items()}
    return f"{commit}-dirty-{digest(contents)[:8]}"


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
