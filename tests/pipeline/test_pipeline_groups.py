"""Data that several steps tokenize in groups of shards, `--data-shards`."""

import json
import subprocess
import sys

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler, dsl, local
from kfp.components import load_component_from_file
from kfp.pipeline_spec import pipeline_spec_pb2

from components import image_of
from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import PROJECT_ROOT
from pipelines.cluster import LOCAL, ClusterSettings, StepSettings
from pipelines.comparison import prepared_in_groups
from pipelines.compile import compile_pipeline, main
from pipelines.package import GROUPS, RUNS, read_package
from pipelines.run import collect_logs

STEPS = {"plan-data", "tokenize-shards", "merge-data"}


def compiled(path, cluster, groups):
    spec = next(yaml.safe_load_all(compile_pipeline(cluster, path, data_shards=groups).read_text()))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())  # refuses unknown fields
    return spec


def tasks_by_loop(spec):
    """Tasks within the exit handler that are in no loop, and each loop's task with those in it."""
    handled = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    loops = {name: task for name, task in handled.items() if name.startswith("for-loop")}
    inner = [
        (task, spec["components"][task["componentRef"]["name"]]["dag"]["tasks"]) for task in loops.values()
    ]
    return {name: task for name, task in handled.items() if name not in loops}, inner


def test_a_plan_is_tokenized_in_a_loop_and_merged(tmp_path):
    path = tmp_path / "p.yaml"
    alone, [(loop, inner), (_, runs)] = tasks_by_loop(compiled(path, ClusterSettings(), 3))
    assert alone.keys() == {"plan-data", "merge-data", "compare"} and inner.keys() == {"tokenize-shards"}
    assert json.loads(loop["parameterIterator"]["items"]["raw"]) == [1, 2, 3]
    assert "iteratorPolicy" not in loop  # all at once, if there are nodes
    task = inner["tokenize-shards"]
    assert task["inputs"]["parameters"]["groups"]["runtimeValue"]["constant"] == 3
    # What a group's result depends on is in the cache's key: the plan, of which it is one part.
    assert task["inputs"]["artifacts"]["plan"] == {
        "componentInputArtifact": "pipelinechannel--plan-data-plan"
    }
    kept = (alone["plan-data"], task, alone["merge-data"])
    assert all(entry["cachingOptions"] == {"enableCache": True} for entry in kept)
    assert alone["merge-data"]["inputs"]["artifacts"]["shards"]["taskOutputArtifact"]["producerTask"]
    assert runs["train"]["inputs"]["artifacts"]["data"] == {
        "componentInputArtifact": "pipelinechannel--merge-data-data"
    }
    steps = read_package(path).steps
    assert [steps[name] for name in ("plan-data", "tokenize-shards", "train")] == [None, GROUPS, RUNS]


def test_each_of_the_steps_gets_what_prepare_data_gets(tmp_path):
    cluster = ClusterSettings(steps={"prepare_data": StepSettings(cpu="8", timeout_seconds=60)}, retries=3)
    spec = compiled(tmp_path / "p.yaml", cluster, 2)
    alone, [(_, inner), _] = tasks_by_loop(spec)
    for step in STEPS:
        container = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
        assert container["image"] == image_of("prepare")
        assert container["resources"]["resourceCpuLimit"] == "8"
        assert (alone | inner)[step]["retryPolicy"]["maxRetryCount"] == 3


def test_on_one_machine_the_groups_come_one_after_the_other(tmp_path):
    _, [(loop, _), _] = tasks_by_loop(compiled(tmp_path / "p.yaml", LOCAL, 2))
    assert loop["iteratorPolicy"] == {"parallelismLimit": 1}


def test_one_group_is_the_step_that_does_it_all(tmp_path):
    one, default = tmp_path / "one.yaml", tmp_path / "default.yaml"
    for path, *option in ((one, "--data-shards", "1"), (default,)):
        with pytest.raises(SystemExit, match="0"):
            main([str(path), *option])
    assert one.read_text() == default.read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--data-shards", "0"], "--data-shards 0: must be at least 1"),
        (
            ["--data-shards", "2", "--data-uri", "s3://a/b"],
            "--data-shards is for data that have to be prepared",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "p.yaml"), *arguments])
    assert capsys.readouterr().err.startswith(f"error: {line}") and not list(tmp_path.iterdir())


def test_logs_are_named_after_their_group_or_run(tmp_path):
    places = {
        "for-loop-3-iteration-2/tokenize-shards/shards.log": "tokenize-shards-3.log",
        "for-loop-4-iteration-0/train/run_folder.log": "train-mod-seed0.log",
        "merge-data/data.log": "merge-data.log",
    }
    for place in places:
        (tmp_path / "x" / place).parent.mkdir(parents=True)
        (tmp_path / "x" / place).touch()
    collect_logs(tmp_path / "x", ["mod-seed0"], tmp_path / "logs")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == set(places.values())


def test_a_run_here_plans_first(tmp_path, micro_overrides):
    sources = "data.dataset_configs=[{name: gone, path: json, data_files: /nowhere/gone.jsonl}]"
    options = (f"run.output_dir={tmp_path}", "--variants", "standard", "--data-shards", "2", sources)
    command = [sys.executable, "-m", "pipelines.run", *options, *micro_overrides]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "plan-data" in result.stderr and "Traceback" not in result.stdout + result.stderr
    assert "gone.jsonl" in (tmp_path / "quickstart" / "logs" / "plan-data.log").read_text()


def write_corpus(folder):
    """Three sources, each of a format of its own."""
    texts = [
        f"{number} the gate gives token {number % 7} to a layer of depth {number % 5}"
        for number in range(300)
    ]
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": 3}']))
    (folder / "c.csv").write_text("text\n" + "".join(f"c {text}\n" for text in texts))
    (folder / "d.txt").write_text("".join(f"d {text}\n" for text in texts))
    files = {"json": "*.jsonl", "csv": "c.csv", "text": "d.txt"}
    return [{"name": kind, "path": kind, "data_files": str(folder / file)} for kind, file in files.items()]


def test_on_this_machine_the_steps_give_the_bytes_of_one_process(tmp_path):
    data = {"vocab_size": 300, "block_size": 32, "cloze_examples": 4, "arithmetic_examples": 0}
    settings = settings_from_dict(
        {"data": data | {"dataset_configs": write_corpus(tmp_path)}, "training": {"max_steps": 1}}
    )

    @dsl.pipeline(name="data-alone")
    def pipeline(settings: str):
        prepared_in_groups(settings, 3, LOCAL)

    compiler.Compiler().compile(pipeline, str(tmp_path / "p.yaml"))  # type: ignore[arg-type]
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"))
    load_component_from_file(str(tmp_path / "p.yaml"))(settings=settings.to_json())
    (made,) = (tmp_path / "root").iterdir()
    groups = [made / f"for-loop-2-iteration-{number}" / "tokenize-shards" / "shards" for number in range(3)]
    planned = len(read_manifest(made / "plan-data" / "plan")["shards"])
    sizes = [len(json.loads((group / "shards.json").read_text())) for group in groups]
    assert sum(sizes) == planned == 3 and min(sizes) == 1
    alone, together = prepare(settings, tmp_path / "alone"), made / "merge-data" / "data"
    names = {str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(together)) for path in together.rglob("*") if path.is_file()}
    assert [name for name in names if (alone / name).read_bytes() != (together / name).read_bytes()] == []
