"""What an image is called and recorded as. No Docker: test_docker.py has the images themselves."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynamic_transformers import manifest
from dynamic_transformers.settings import PROJECT_ROOT
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


def test_a_package_in_somebody_elses_repository_has_no_revision(repository):
    (repository / ".dockerignore").unlink()
    assert source_revision() == "unversioned"


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


DOCKERFILE = re.sub(r"\\\n\s*", "", (PROJECT_ROOT / "images" / "Dockerfile").read_text())
INSTALLS = re.findall(r"^RUN (.*(?:install\.py|pip install).*)$", DOCKERFILE, re.MULTILINE)


def test_whatever_the_images_install_is_found_beside_wheels_of_ones_own():
    *parts, ours = INSTALLS
    assert parts
    for command in parts:
        assert "--mount=type=bind,source=images/wheels,target=/build/images/wheels " in command
        assert "pip install" not in command  # install.py names constraints and wheels
    # Nothing is left to fetch.
    assert "--no-deps --no-build-isolation --no-index " in ours


def test_root_leaves_nothing_in_the_home_of_the_images():
    # Where old Docker mounts a cache, it leaves folders of root's.
    before, _, after = DOCKERFILE.partition(INSTALLS[-1])
    assert "HOME=/tmp" not in before and "ENV HOME=/tmp" in after and "\nRUN" not in after
    targets = re.findall(r"type=cache,target=(\S+)", DOCKERFILE)
    assert set(targets) == {"/root/.cache/pip"}


@pytest.mark.parametrize(
    ("part", "package"),
    [
        ("build", "setuptools"),
        ("core", "mlflow"),
        ("torch", "torch"),
        ("kfp", "kfp"),
        ("evaluate", "lm-eval[hf]"),
    ],
)
def test_whatever_the_images_install_is_constrained(part, package, tmp_path):
    (tmp_path / "pip.py").write_text("import sys; print(*sys.argv[1:])")
    command = [sys.executable, "images/install.py", part, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True)
    options, _, requirements = result.stdout.partition(" --quiet ")
    assert options.startswith(f"install --constraint {PROJECT_ROOT}/constraints.txt ")
    assert f"--find-links {PROJECT_ROOT}/images/wheels" in options
    # What comes as source is built with the setuptools that `build` installed, not with the newest.
    assert ("--no-build-isolation" in options) == (part != "build")
    assert package in re.split(r"[ =<>]+", requirements)


def test_the_images_have_what_the_package_needs_each_in_one_part():
    requirements = runpy.run_path(str(PROJECT_ROOT / "images" / "install.py"))["requirements"]
    pyproject = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    parts = [line for part in ("core", "torch", "evaluate") for line in requirements(part, pyproject)]
    assert sorted(parts) == sorted(pyproject["project"]["dependencies"])
    assert len(requirements("torch", pyproject)) == 2 and len(requirements("evaluate", pyproject)) == 3


def test_every_requirement_has_one_version():
    pyproject = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    asked = [*pyproject["build-system"]["requires"], *project["dependencies"], *extras]
    lines = (PROJECT_ROOT / "constraints.txt").read_text().split()
    versions = dict(line.split("==") for line in lines)
    assert len(versions) == len(lines)
    names = {canonicalize_name(Requirement(line).name) for line in asked} - {project["name"]}
    assert names <= {canonicalize_name(name) for name in versions}
    # What torch's own requirements for CUDA leave open.
    assert {"cuda-pathfinder", "nvidia-nvjitlink", "triton"} <= versions.keys()


@pytest.fixture
def docker(monkeypatch, tmp_path):
    """A docker that does nothing; gives the command lines that it got."""
    commands = []

    def answer(*arguments, capture=False):
        commands.append(arguments)
        if "{{.Size}}" in arguments:
            return "1000000"
        repository = arguments[-1].rpartition(":")[0].removeprefix("docker.io/")
        return json.dumps(["other.example/train@sha256:0", f"{repository}@sha256:1"])

    monkeypatch.setattr(images, "docker", answer)
    monkeypatch.setattr(images, "IMAGES", tmp_path / "images.json")
    for name in [name for name in os.environ if name.upper() in images.PROXIES]:
        monkeypatch.delenv(name)
    return commands


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pipelines.images", *arguments])
    with pytest.raises(SystemExit) as end:
        images.main()
    assert not end.value.code
    return json.loads(images.IMAGES.read_text())


@pytest.mark.parametrize("registry", ["registry.example/team", "docker.io/team"])
def test_images_are_recorded_with_revision_and_digest(registry, docker, monkeypatch):
    built = call(monkeypatch, "build", "--registry", registry)
    revision = source_revision()
    assert built["train"] == {
        "image": f"{registry}/dynamic-transformers-train:{images.default_tag(revision)}",
        "revision": revision,
        "digest": None,
        "bytes": 1000000,
    }
    assert images.revision_mismatch() == ""
    pushed = call(monkeypatch, "push")
    assert pushed["train"]["digest"] == f"{registry}/dynamic-transformers-train@sha256:1"
    assert images.revision_mismatch() == ""


def refusal(monkeypatch, capsys, *arguments):
    """What `python -m pipelines.images` says of a mistake."""
    monkeypatch.setattr(sys, "argv", ["pipelines.images", *arguments])
    with pytest.raises(SystemExit) as end:
        images.main()
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_password_does_not_get_into_an_images_history(docker, monkeypatch, capsys):
    url = "https://me:s3cret@wheels.example/cpu"
    line = refusal(monkeypatch, capsys, "build", "--torch-index-url", url)
    assert line.startswith("error: TORCH_INDEX_URL holds credentials") and "s3cret" not in line
    assert not docker
    call(monkeypatch, "build", "--torch-index-url", "https://wheels.example/cpu@1")


def test_images_without_a_registry_are_not_pushed(docker, monkeypatch, capsys):
    call(monkeypatch, "build")
    docker.clear()
    line = refusal(monkeypatch, capsys, "push")
    assert re.fullmatch(
        r"error: dynamic-transformers-prepare:\S+ names no registry; "
        r"build the images with `make build-images REGISTRY=...`",
        line,
    )
    assert not docker


def test_a_push_takes_the_images_as_they_were_built(docker, monkeypatch, capsys):
    call(monkeypatch, "build", "--registry", "registry.example/team")
    line = refusal(monkeypatch, capsys, "push", "--registry", "registry.example/other")
    assert line.endswith("unrecognized arguments: --registry registry.example/other")


def test_a_build_goes_through_the_callers_proxy(docker, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    call(monkeypatch, "build")
    builds = [arguments for arguments in docker if arguments[0] == "build"]
    assert len(builds) == 5
    # Not its value, which others would see among the processes.
    assert all(arguments[-3:] == ("--build-arg", "https_proxy", ".") for arguments in builds)
