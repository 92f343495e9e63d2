"""The compiled pipeline, as a cluster would read it."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from components import image_of
from dynamic_transformers import __version__
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from pipelines.cluster import ClusterSettings, StepSettings, read_cluster
from pipelines.compile import compile_pipeline, main
from pipelines.images import default_tag
from pipelines.package import read_package

GOLDEN = PROJECT_ROOT / "tests" / "pipeline" / "golden" / "pipeline.yaml"


EXAMPLE = PROJECT_ROOT / "cluster" / "example.yaml"


IMAGES = {
    "compare": "evaluate",
    "configure": "evaluate",
    "evaluate": "evaluate",
    "export": "export",
    "prepare-data": "prepare",
    "report-finished": "evaluate",
    "train": "train",
}


def compiled(cluster, folder):
    text = compile_pipeline(cluster, folder / "pipeline.yaml").read_text()
    spec, *platforms = yaml.safe_load_all(text)
    return text, spec, platforms[0] if platforms else None


@pytest.fixture(scope="module")
def full_example(tmp_path_factory):
    """The example with all that it leaves to a person, but for the volume."""
    text = re.sub(r"^( *)#(?! |\n)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    path = tmp_path_factory.mktemp("cluster") / "full.yaml"
    path.write_text(text)
    assert read_cluster(path).nodes == 2
    path.write_text(re.sub(r"^(volume_claim|nodes): .*$", "", text, flags=re.MULTILINE))
    return path


@pytest.fixture(scope="module")
def package(full_example, tmp_path_factory):
    """Text, pipeline spec and platform spec, compiled for the cluster of the example."""
    return compiled(read_cluster(full_example), tmp_path_factory.mktemp("build"))


def executors(spec):
    return spec["deploymentSpec"]["executors"]


def kubernetes_config(platform, step):
    return platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]


def tasks(component):
    return component["dag"]["tasks"]


def inner_tasks(spec):
    """Tasks by the part of the pipeline that they belong to: root, exit handler, loop."""
    root = tasks(spec["root"])
    (handler,) = (task for name, task in root.items() if name.startswith("exit-handler"))
    handled = tasks(spec["components"][handler["componentRef"]["name"]])
    (loop,) = (task for name, task in handled.items() if name.startswith("for-loop"))
    return root, handled, tasks(spec["components"][loop["componentRef"]["name"]]), loop


def launch_of_package(spec):
    _, _, loop, _ = inner_tasks(spec)
    return Launch.from_json(loop["train"]["inputs"]["parameters"]["launch"]["runtimeValue"]["constant"])


def test_both_specs_are_valid(package):
    # ParseDict refuses unknown fields.
    _, spec, platform = package
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert parsed.pipeline_info.name == "dynamic-transformers-comparison"
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    for step in IMAGES:
        json_format.ParseDict(
            kubernetes_config(platform, step), kubernetes_executor_config_pb2.KubernetesExecutorConfig()
        )


def test_every_step_runs_in_our_image_and_installs_nothing(package):
    _, spec, _ = package
    assert {name.removeprefix("exec-") for name in executors(spec)} == set(IMAGES)
    for name, executor in executors(spec).items():
        container = executor["container"]
        assert container["image"] == image_of(IMAGES[name.removeprefix("exec-")])
        assert "pip install" not in " ".join(container["command"] + container.get("args", []))


def test_steps_import_the_package_inside_their_bodies(package):
    for name, executor in executors(package[1]).items():
        source = executor["container"]["command"][-1]
        body = source[source.index("def ") :]
        assert re.search(r"^    from dynamic_transformers\.", body, re.MULTILINE), name


def test_runs_are_looped_over_and_whatever_happens_something_is_reported(package):
    root, handled, loop, task = inner_tasks(package[1])
    assert set(loop) == {"train", "export", "evaluate"}
    assert loop["export"]["dependentTasks"] == ["train"]
    assert task["iteratorPolicy"]["parallelismLimit"] == 4
    assert root["report-finished"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    anew = (root["configure"], handled["compare"], root["report-finished"])
    assert not any(entry["cachingOptions"].get("enableCache") for entry in anew)
    kept = (handled["prepare-data"], *loop.values())
    assert all(entry["cachingOptions"]["enableCache"] for entry in kept)


def test_prepared_data_come_in_by_an_importer(tmp_path):
    with pytest.raises(SystemExit, match="0"):
        main([str(tmp_path / "pipeline.yaml"), "--data-uri", "s3://bucket/data"])
    spec = yaml.safe_load((tmp_path / "pipeline.yaml").read_text().split("\n---\n")[0])
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    root, handled, loop, _ = inner_tasks(spec)
    assert executors(spec)["exec-importer"] == {
        "importer": {
            "artifactUri": {"constant": "s3://bucket/data"},
            "typeSchema": {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"},
        }
    }
    assert "prepare-data" not in handled and "exec-prepare-data" not in executors(spec)
    imported = {"taskOutputArtifact": {"outputArtifactKey": "artifact", "producerTask": "importer"}}
    assert root["configure"]["inputs"]["artifacts"]["data"] == imported  # which refuses data of others
    assert {task["inputs"]["artifacts"]["data"]["componentInputArtifact"] for task in loop.values()} == {
        "pipelinechannel--importer-artifact"
    }
    # For `submit`: the importer's image is the server's, and its state is shown.
    package = read_package(tmp_path / "pipeline.yaml")
    assert package.steps["importer"] is None and len(package.images) == len(IMAGES) - 1


@pytest.mark.parametrize(
    "uri", ["outputs/data/abc", "/data", "file:///data", "s3://bucket", "https://a/b", "s3://b/c d"]
)
def test_an_address_that_no_step_on_a_cluster_can_read_is_refused(uri, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "pipeline.yaml"), "--data-uri", uri])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --data-uri {uri}: must be like s3://bucket/folder")
    assert not list(tmp_path.iterdir())


def test_the_cache_key_holds_version_and_revision():
    # KFP's key has the image's name, not what is in it: the tag must change with our code.
    commit = "0123456789abcdef" * 2
    assert default_tag(commit) == f"{__version__}-0123456789ab"
    assert default_tag(f"{commit}-dirty-1a2b") == f"{__version__}-0123456789ab-dirty-1a2b"


def test_resources_and_places(package):
    _, spec, platform = package
    train = executors(spec)["exec-train"]["container"]["resources"]
    assert train["accelerator"] == {
        "count": "1", "resourceCount": "1", "resourceType": "nvidia.com/gpu", "type": "nvidia.com/gpu"
    }  # fmt: skip
    assert (train["resourceCpuLimit"], train["resourceMemoryLimit"]) == ("16", "64Gi")
    config = kubernetes_config(platform, "train")
    assert config["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    (toleration,) = config["tolerations"]
    assert (toleration["key"], toleration["effect"]) == ("nvidia.com/gpu", "NoSchedule")
    (memory,) = config["emptyDirMounts"]
    assert (memory["mountPath"], memory["medium"], memory["sizeLimit"]) == ("/dev/shm", "Memory", "8Gi")
    assert "pvcMount" not in config
    assert config["activeDeadlineSeconds"] == "172800"
    assert "nodeSelector" not in kubernetes_config(platform, "export")
    for step in IMAGES:
        (secret,) = kubernetes_config(platform, step)["imagePullSecret"]
        assert secret["secretName"] == "registry"
    _, _, loop, _ = inner_tasks(spec)
    assert loop["train"]["retryPolicy"]["maxRetryCount"] == 2


def test_secrets_are_named_and_never_held(package):
    text, _, platform = package
    for step in IMAGES:
        references = kubernetes_config(platform, step)["secretAsEnv"]
        variables = {pair["envVar"] for entry in references for pair in entry["keyToEnv"]}
        assert {"MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "WANDB_API_KEY"} <= variables
        for entry in references:
            assert entry.keys() <= {"secretName", "secretNameParameter", "keyToEnv", "optional"}
    assert "pip install" not in text


def test_the_example_needs_nothing_of_a_cluster_that_is_not_made_yet(tmp_path):
    _, spec, platform = compiled(read_cluster(EXAMPLE), tmp_path)
    configs = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {key for config in configs.values() for key in config} == {
        "tolerations", "emptyDirMounts", "activeDeadlineSeconds"
    }  # fmt: skip
    found = executors(spec)
    for step in ("compare", "report-finished"):  # which does what compare could not do
        assert (
            found[f"exec-{step}"]["container"]["resources"]
            == found["exec-evaluate"]["container"]["resources"]
        )
        assert kubernetes_config(platform, step) == kubernetes_config(platform, "evaluate")


def test_no_value_of_the_environment_gets_into_the_package(full_example, tmp_path):
    values = {name: f"secret-of-{name}" for name in ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "WANDB_API_KEY")}
    values["MLFLOW_TRACKING_URI"] = "https://someone:secret-of-uri@mlflow.example"
    command = [sys.executable, "-m", "pipelines.compile", str(tmp_path / "p.yaml"), "--cluster", full_example]
    subprocess.run(command, env=os.environ | values, cwd=PROJECT_ROOT, check=True, capture_output=True)
    assert "secret-of" not in (tmp_path / "p.yaml").read_text()


@pytest.mark.parametrize("nodes", [1, 2])
def test_with_a_volume_training_is_the_trainers_business(nodes, full_example, tmp_path):
    cluster = read_cluster(full_example)
    cluster.nodes, cluster.volume_claim = nodes, "dynamic-transformers"
    _, spec, platform = compiled(cluster, tmp_path)
    launch = launch_of_package(spec)
    assert (launch.nodes, launch.processes, launch.claim) == (nodes, 1, "dynamic-transformers")
    (claim,) = kubernetes_config(platform, "train")["pvcMount"]
    assert claim["mountPath"] == launch.mount_path == "/shared"
    assert launch.resources == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "1"}
    assert launch.image == image_of("train")
    assert {entry.secret for entry in launch.secrets} == {
        "mlflow-client",
        "huggingface",
        "wandb",
    }
    assert (launch.image_pull_secrets, launch.shared_memory) == (["registry"], "8Gi")
    assert launch.timeout_seconds == 172800
    # The task itself only watches, and ends when its job does: it has no time limit that could be the first.
    assert "accelerator" not in executors(spec)["exec-train"]["container"].get("resources", {})
    config = kubernetes_config(platform, "train")
    assert config.keys() == {"imagePullSecret", "pvcMount", "secretAsEnv"}


def test_variables_reach_every_step_and_the_nodes_of_a_job(tmp_path):
    cluster = ClusterSettings(
        environment={"NCCL_DEBUG": "WARN"},
        volume_claim="claim",
        runtime="torch-of-ours",
        grace_seconds=900,
    )
    _, spec, _ = compiled(cluster, tmp_path)
    for executor in executors(spec).values():
        assert executor["container"]["env"] == [{"name": "NCCL_DEBUG", "value": "WARN"}]
    launch = launch_of_package(spec)
    assert (launch.environment, launch.runtime) == ({"NCCL_DEBUG": "WARN"}, "torch-of-ours")
    assert launch.grace_seconds == 900


def test_without_cluster_settings_only_shared_memory_and_retries_are_asked_for(tmp_path):
    _, spec, platform = compiled(ClusterSettings(), tmp_path)
    memory = {"mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "2Gi", "volumeName": "shared-memory"}
    assert platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"] == {
        "exec-train": {"emptyDirMounts": [memory]}
    }
    for executor in executors(spec).values():
        assert executor["container"].keys() == {"image", "command", "args"}
    retried = {name: policy.get("maxRetryCount") for name, policy in retry_policies(spec).items()}
    assert retried == dict.fromkeys(IMAGES, 2) | {"configure": None, "report-finished": None}


def retry_policies(spec):
    root, handled, loop, _ = inner_tasks(spec)
    steps = {
        name: task for name, task in (root | handled | loop).items() if f"exec-{name}" in executors(spec)
    }
    assert steps.keys() == set(IMAGES)
    return {name: task.get("retryPolicy", {}) for name, task in steps.items()}


def limited(**seconds):
    return {name: StepSettings(timeout_seconds=limit) for name, limit in seconds.items()}


@pytest.mark.parametrize(
    "cluster",
    [
        ClusterSettings(),
        ClusterSettings(retries=0, steps=limited(train=60)),
        ClusterSettings(retries=1, steps=limited(prepare_data=30, train=172800, evaluate=7200, compare=600)),
        ClusterSettings(retries=10, steps=limited(train=14 * 86400, export=1)),
        ClusterSettings(retries=3, steps=limited(train=172800), volume_claim="claim"),  # the job's limit
    ],
)
def test_every_attempt_fits_into_the_window_of_the_retries(cluster, tmp_path):
    # Argo counts its maxDuration from the first attempt's start, and ends the last attempt with it.
    _, spec, _ = compiled(cluster, tmp_path)
    month = 30 * 86400
    for name, policy in retry_policies(spec).items():
        if name in ("configure", "report-finished") or not cluster.retries:
            assert not policy
            continue
        limit = cluster.steps.get(name.replace("-", "_"), StepSettings()).timeout_seconds or month
        first, window = (int(policy[key][:-1]) for key in ("backoffDuration", "backoffMaxDuration"))
        waits = [first * policy["backoffFactor"] ** retry for retry in range(cluster.retries)]
        assert policy["maxRetryCount"] == cluster.retries
        assert window > (cluster.retries + 1) * limit + sum(waits)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("pipeline", "must end in .yaml"),
        ("/proc/x/p.yaml", "cannot be written"),
        ("file/p.yaml", "cannot be"),
    ],
)
def test_a_place_that_cannot_hold_the_package_is_named(place, reason, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"^{tmp_path / place}: {reason}"):
        compile_pipeline(ClusterSettings(), tmp_path / place)


def test_the_package_is_the_golden_one(full_example, tmp_path):
    """What changes in the compiled pipeline changes before someone's eyes; WRITE_GOLDEN=1 writes it anew."""
    record = tmp_path / "images.json"
    steps = ("prepare", "train", "export", "evaluate")
    record.write_text(
        json.dumps({step: {"image": f"r.example/{step}:golden", "digest": None} for step in steps})
    )
    command = [sys.executable, "-m", "pipelines.compile", str(tmp_path / "p.yaml"), "--cluster", full_example]
    environment = os.environ | {"DYNAMIC_TRANSFORMERS_IMAGES": str(record)}
    subprocess.run(command, env=environment, cwd=PROJECT_ROOT, check=True, capture_output=True)
    got = (tmp_path / "p.yaml").read_text()
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(got)
    assert got == GOLDEN.read_text()


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
    found = executors(next(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())))
    assert found["exec-train"]["container"]["image"] == pushed["digest"]
    assert found["exec-export"]["container"]["image"] == built["image"]


def test_what_only_says_where_a_step_runs_is_not_in_the_cache_key_of_training(full_example, tmp_path):
    cluster = read_cluster(full_example)
    cluster.volume_claim, cluster.nodes = "", 1
    cluster.steps["train"].accelerators = 4
    _, spec, _ = compiled(cluster, tmp_path)
    assert launch_of_package(spec) == Launch(processes=4)
