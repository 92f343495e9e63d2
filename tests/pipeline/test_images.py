"""What an image is called and recorded as. No Docker: test_docker.py has the images themselves."""

import json
import os
import subprocess

import pytest

from dynamic_transformers import manifest
from pipelines import compile as compiling
from pipelines import images
from pipelines.images import source_revision


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A committed project of two files, one of which no image holds, and a folder that git ignores."""
    monkeypatch.setattr(images, "PROJECT_ROOT", tmp_path)
    monkeypatch.setattr(manifest, "PROJECT_ROOT", tmp_path)
    for variable in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(variable)
    write(tmp_path, ".dockerignore", b"# What an image holds.\n*\n!src\n!config\n**/__pycache__\n")
    write(tmp_path, ".gitignore", b"__pycache__/\n")
    write(tmp_path, "src/model.py", b"x = 1\n")
    write(tmp_path, "docs/notes.md", b"notes\n")
    run_git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def run_git(root, *arguments):
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    return subprocess.run(
        ["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root):
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "a state")


def test_a_committed_program_is_named_after_its_commit(repository):
    revision = run_git(repository, "rev-parse", "HEAD")
    assert source_revision() == revision
    # None of these is in an image.
    write(repository, "docs/notes.md", b"more notes\n")
    write(repository, "scratch.txt", b"anything\n")
    write(repository, "src/__pycache__/model.pyc", b"compiled")
    assert source_revision() == revision


def test_two_different_programs_have_two_revisions(repository):
    changes = [
        ("src/model.py", b"x = 2\n"),
        ("src/model.py", b"x = 3\n"),
        ("src/new.py", b"y = 1\n"),  # git has never heard of it
        ("src/new.py", b"y = 2\n"),
        ("src/table.bin", b"\x00\xff1"),
        ("src/table.bin", b"\x00\xff2"),
        ("config/latin.yaml", "größe: 1\n".encode("latin-1")),
    ]
    revisions = [source_revision()]
    for name, content in changes:
        write(repository, name, content)
        revisions.append(source_revision())
        assert revisions[-1].startswith(f"{revisions[0]}-dirty-")
    commit(repository)  # now git knows them
    revisions.append(source_revision())
    for name, content in [("src/table.bin", b"\x00\xff3"), ("config/latin.yaml", b"gr\xf6\xdfe: 2\n")]:
        write(repository, name, content)
        revisions.append(source_revision())
    (repository / "src" / "model.py").unlink()
    revisions.append(source_revision())
    assert len(set(revisions)) == len(revisions)
    run_git(repository, "add", "--all")
    assert source_revision() == revisions[-1]  # staged or not, it is the same program


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Writes build/images.json as if the images were built of some sources, which are not those at hand."""
    monkeypatch.setattr(images, "IMAGES", tmp_path / "images.json")
    monkeypatch.setattr(images, "source_revision", lambda: "here")

    def write_record(**fields):
        entries = {
            step: {"image": f"{step}:1", "digest": None, "bytes": 0, **fields} for step in images.STEPS
        }
        images.IMAGES.write_text(json.dumps(entries))

    return write_record


def test_compiling_tells_of_images_of_another_program(record, tmp_path, capsys):
    package = tmp_path / "pipeline.yaml"

    def warning():
        with pytest.raises(SystemExit) as end:
            compiling.main([str(package)])
        output, errors = capsys.readouterr()
        assert not end.value.code and output == f"{package}\n"
        return errors

    rebuild = "these sources are here; run `make build-images`\n"
    assert warning().endswith(
        "images.json: no such file; `make build-images` builds the images that the pipeline names\n"
    )
    record(revision="there")
    assert warning() == f"warning: prepare:1 is of there, {rebuild}"
    record()
    assert warning() == f"warning: prepare:1 is of an unknown revision, {rebuild}"
    record(revision="here")
    assert warning() == ""
