"""What tests of submissions share: a small pipeline, and the command as a user calls it."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import compiler, dsl, kubernetes

from dynamic_transformers.settings import PROJECT_ROOT
from pipelines.images import SERVER, STEPS, source_revision

TOKEN = "a-secret-that-nobody-may-see"


VARIABLES = ("KFP_HOST", "KFP_TOKEN", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_SA_TOKEN_PATH")


def pushed(image):
    """An image as a registry names it."""
    return f"{image}@sha256:{sha256(image.encode()).hexdigest()}"


PUSHED = pushed("registry.example/train:1")


def write_package(path, image=PUSHED, pull_policy=None, needs_more=False, cached=True):
    """A pipeline that takes what ours takes, of its form: configure, (train, export) in a loop, compare."""

    @dsl.component(base_image=image, install_kfp_package=False)
    def configure(settings: str, grid: str) -> List[str]:  # noqa: UP006
        return []

    @dsl.component(base_image=image, install_kfp_package=False)
    def train(run: str) -> str:
        return run

    @dsl.component(base_image=image, install_kfp_package=False)
    def export(run: str) -> str:
        return run

    @dsl.component(base_image=image, install_kfp_package=False)
    def compare(runs: List[str]):  # noqa: UP006
        pass

    def pipeline(settings: str, variants: str = "", grid: str = "", dataset: str = "embedded"):
        configured = configure(settings=settings, grid=grid).set_caching_options(False)
        with dsl.ParallelFor(configured.output) as run:
            trained = train(run=run).set_caching_options(cached)
            exported = export(run=trained.output).set_caching_options(cached)
        compare(runs=dsl.Collected(exported.output)).set_caching_options(False)
        if pull_policy:
            kubernetes.set_image_pull_policy(trained, pull_policy)

    def needier_pipeline(settings: str, budget: float, variants: str = "", grid: str = ""):
        train(run=settings)

    definition = dsl.pipeline(name="small-comparison")(needier_pipeline if needs_more else pipeline)
    compiler.Compiler().compile(definition, str(path))
    return path


def command(*arguments, **environment):
    """Runs the command as a user does."""
    result = subprocess.run(
        [sys.executable, "-m", "pipelines.submit", *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert TOKEN not in result.stdout + result.stderr
    return result


def write_record(path, **fields):
    """What `make build-images` records, pushed, with `fields` in the place of some."""
    entry = {"revision": source_revision(), "bytes": 0} | fields
    names = {step: f"registry.example/{step}:1" for step in (*STEPS, SERVER)}
    images = {step: {"image": name, "digest": pushed(name), **entry} for step, name in names.items()}
    path.write_text(json.dumps(images))
    return str(path)


RUNS = ("--variants", "standard,mod", "--seeds", "0,1")  # standard and mod of seed 0, then of seed 1
