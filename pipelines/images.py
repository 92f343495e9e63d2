"""Builds and pushes the images: `python -m pipelines.images build|push`.

`build/images.json` records for each the tag, the revision, the size and, once pushed, the digest. A pipeline
that is compiled afterwards names the images by it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

from components import IMAGES
from dynamic_transformers import __version__
from dynamic_transformers.command_line import run_command
from dynamic_transformers.manifest import source_revision, write_json
from dynamic_transformers.settings import PROJECT_ROOT, UserError, holds_credentials

STEPS = ("prepare", "train", "export", "evaluate")
SERVER = "mlflow"  # the tracking server of cluster/
DOCKER = os.environ.get("DOCKER", "docker")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def default_tag(revision: str) -> str:
    """Version and revision of the sources; not what else goes into a build, such as the base image."""
    commit, *changes = revision.split("-", 1)
    return "-".join([__version__, commit[:12], *changes])


def revision_mismatch() -> str:
    """Why the images that the pipeline names are not of these sources; empty if they are."""
    if not IMAGES.is_file():
        return f"{IMAGES}: no such file; `make build-images` builds the images that the pipeline names"
    revision = source_revision()
    for entry in json.loads(IMAGES.read_text()).values():
        if (built := entry.get("revision", "an unknown revision")) != revision:
            return f"{entry['image']} is of {built}, these sources are {revision}; run `make build-images`"
    return ""


def warn_of_revision_mismatch() -> None:
    """Print it."""
    if reason := revision_mismatch():
        print(f"warning: {reason}", file=sys.stderr)


def docker(*arguments: str, capture: bool = False) -> str:
    """Run docker, and give back what it prints if asked.

    Raises:
        UserError: docker is missing or fails.
    """
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    try:
        answer = subprocess.run(
            [DOCKER, *arguments], cwd=PROJECT_ROOT, env=environment, text=True, capture_output=capture
        )
    except FileNotFoundError as error:
        raise UserError(f"{DOCKER}: not found; install Docker, or name its command in DOCKER") from error
    if answer.returncode:
        reason = f": {answer.stderr.strip()}" if capture else "; see above"
        raise UserError(f"`{DOCKER} {arguments[0]}` failed{reason}")
    return (answer.stdout or "").strip()


def build(args: argparse.Namespace) -> None:
    """Build every image and record it."""
    revision = source_revision()
    tag = args.tag or default_tag(revision)
    if tag == "latest" or not re.fullmatch(r"\w[\w.-]*", tag):
        raise UserError(f"tag {tag!r}: give one that names a version, without '/' and ':', and not 'latest'")
    if holds_credentials(args.torch_index_url):
        raise UserError(
            "TORCH_INDEX_URL holds credentials, which `docker history` would show; "
            "put the wheels into images/wheels/"
        )
    # By name only: docker takes their values, which may hold a password, from the environment.
    proxies = [part for name in os.environ if name.upper() in PROXIES for part in ("--build-arg", name)]
    registry = f"{args.registry.rstrip('/')}/" if args.registry else ""
    images = {}
    for step in (*STEPS, SERVER):
        name = f"{registry}dynamic-transformers-{step}:{tag}"
        values = {"STEP": step, "VERSION": __version__, "REVISION": revision}
        values |= {"BASE_IMAGE": args.base_image} if args.base_image else {}
        values |= {"TORCH_INDEX_URL": args.torch_index_url} if args.torch_index_url else {}
        arguments = [part for key, value in values.items() for part in ("--build-arg", f"{key}={value}")]
        docker("build", "--file", "images/Dockerfile", "--tag", name, *arguments, *proxies, ".")
        size = int(docker("image", "inspect", "--format", "{{.Size}}", name, capture=True))
        images[step] = {"image": name, "revision": revision, "digest": None, "bytes": size}
    IMAGES.parent.mkdir(parents=True, exist_ok=True)
    write_json(IMAGES, images)
    for entry in images.values():
        print(f"{entry['bytes'] / 1e9:6.2f} GB  {entry['image']}")
    print(f"written: {IMAGES}")


def push(args: argparse.Namespace) -> None:
    """Push every image that `build` recorded, and record its digest."""
    if not IMAGES.is_file():
        raise UserError(f"{IMAGES}: no such file; build the images first, with REGISTRY=...")
    images = json.loads(IMAGES.read_text())
    for entry in images.values():
        if "/" not in entry["image"]:  # Docker would send it to Docker Hub
            raise UserError(
                f"{entry['image']} names no registry; build the images with `make build-images REGISTRY=...`"
            )
        docker("push", entry["image"])
        found = docker("image", "inspect", "--format", "{{json .RepoDigests}}", entry["image"], capture=True)
        repository = entry["image"].rpartition(":")[0]
        # Docker does not write the name of its own registry.
        names = (f"{repository}@", f"{repository.removeprefix('docker.io/')}@")
        digests = [text.partition("@")[2] for text in json.loads(found) if text.startswith(names)]
        if not digests:
            raise UserError(f"{entry['image']}: the registry gave no digest")
        entry["digest"] = f"{repository}@{digests[0]}"
        print(entry["digest"])
    write_json(IMAGES, images)


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """What the images are called, and what they are built on."""
    parser.add_argument("--registry", default="", help="what stands before the images' names")
    parser.add_argument("--tag", default="", help="default: version and git revision")
    parser.add_argument("--base-image", default="", help="an image with Python (default: the Dockerfile's)")
    parser.add_argument("--torch-index-url", default="", help="pip's extra index for torch, for a CPU build")


def main() -> None:
    """Entry of `python -m pipelines.images`."""
    parser = argparse.ArgumentParser(prog="pipelines.images", description=__doc__)
    parser.add_argument("command", choices=("build", "push"))
    if sys.argv[1:2] != ["push"]:  # which takes the images as they were built
        add_build_arguments(parser)
    run_command(lambda args: {"build": build, "push": push}[args.command](args), parser)


if __name__ == "__main__":
    main()
