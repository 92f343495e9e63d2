"""The compiled pipeline, as a cluster would read it."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components import image_of
from dynamic_transformers.settings import PROJECT_ROOT
from pipelines.compile import compile_pipeline

IMAGES = {
    "compare": "evaluate",
    "evaluate": "evaluate",
    "export": "export",
    "prepare-data": "prepare",
    "start-comparison": "prepare",
    "train": "train",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return yaml.safe_load(compile_pipeline(tmp_path_factory.mktemp("build") / "pipeline.yaml").read_text())


def executors(package):
    return package["deploymentSpec"]["executors"]


def test_it_is_a_valid_pipeline_spec(package):
    # Refuses unknown fields.
    spec = json_format.ParseDict(package, pipeline_spec_pb2.PipelineSpec())
    assert spec.pipeline_info.name == "dynamic-transformers-comparison"


def test_every_step_runs_in_our_image_and_installs_nothing(package):
    assert {name.removeprefix("exec-") for name in executors(package)} == set(IMAGES)
    for name, executor in executors(package).items():
        container = executor["container"]
        assert container["image"] == image_of(IMAGES[name.removeprefix("exec-")])
        assert "pip install" not in " ".join(container["command"] + container.get("args", []))


def test_steps_import_the_package_inside_their_bodies(package):
    for name, executor in executors(package).items():
        source = executor["container"]["command"][-1]
        body = source[source.index("def ") :]
        assert re.search(r"^    from dynamic_transformers\.", body, re.MULTILINE), name


def tasks(component):
    return component["dag"]["tasks"]


def test_runs_are_looped_over_and_only_the_parent_run_is_never_cached(package):
    root = tasks(package["root"])
    (loop,) = (task for name, task in root.items() if name.startswith("for-loop"))
    inner = tasks(package["components"][loop["componentRef"]["name"]])
    assert set(inner) == {"train", "export", "evaluate"}
    assert inner["export"]["dependentTasks"] == ["train"]
    assert not root["start-comparison"]["cachingOptions"].get("enableCache")
    assert all(task["cachingOptions"]["enableCache"] for task in inner.values())


def test_the_package_names_images_by_digest_once_they_are_pushed(tmp_path):
    pushed = {"image": "r.example/dynamic-transformers-train:1", "digest": f"r.example/t@sha256:{'0' * 64}"}
    built = {"image": "r.example/dynamic-transformers-other:1", "digest": None}
    record = tmp_path / "images.json"
    record.write_text(
        json.dumps({step: built for step in ("prepare", "export", "evaluate")} | {"train": pushed})
    )
    subprocess.run(
        [sys.executable, "-m", "pipelines.compile", str(tmp_path / "pipeline.yaml")],
        env=os.environ | {"DYNAMIC_TRANSFORMERS_IMAGES": str(record)},
        cwd=PROJECT_ROOT,
        check=True,
        capture_output=True,
    )
    found = executors(yaml.safe_load((tmp_path / "pipeline.yaml").read_text()))
    assert found["exec-train"]["container"]["image"] == pushed["digest"]
    assert found["exec-export"]["container"]["image"] == built["image"]
