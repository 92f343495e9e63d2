"""The pipeline's parameters, as `configure` takes them."""

import json

import pytest

from dynamic_transformers.configure import run_names, settings_from_parameters
from dynamic_transformers.settings import UserError

QUICK = {"overrides": [], "dataset_configs": "", "max_flops": 0.0, "mlflow_uri": "", "mlflow_experiment": ""}


def merged(**parameters):
    settings = {
        "data": {"dataset_configs": [{"name": "math", "type": "embedded"}]},
        "training": {"max_steps": 3},
    }
    return settings_from_parameters(**{"settings": json.dumps(settings)} | QUICK | parameters)


def test_parameters_go_over_the_settings(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert merged().training.max_steps == 3
    assert merged().tracking.mlflow is False  # nowhere to track to
    changed = merged(
        overrides=["model.size=micro", "data.block_size=64"],
        dataset_configs='[{"name": "code", "type": "embedded"}]',
        max_flops=1e9,
        mlflow_uri="http://mlflow.example",
        mlflow_experiment="other",
    )
    assert (changed.model.size, changed.data.block_size) == ("micro", 64)
    assert [source.name for source in changed.data.dataset_configs] == ["code"]
    assert (changed.training.max_steps, changed.training.max_flops) == (None, 1e9)
    assert changed.tracking.mlflow and changed.tracking.experiment == "other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert merged().tracking.mlflow


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"settings": "{"}, "settings: not JSON"),
        ({"settings": "3"}, "settings: must be a JSON object, not 3"),
        ({"settings": "null"}, "settings: must be a JSON object"),
        ({"settings": "[]"}, "settings: must be a JSON object"),
        ({"settings": '{"training": []}'}, "training=[]: must be a mapping"),
        ({"settings": '{"data": 3}'}, "data=3: must be a mapping"),
        ({"settings": '{"run": {"name": "${x"}}'}, "run.name: "),
        ({"dataset_configs": "[{]"}, "dataset_configs: not JSON"),
        ({"dataset_configs": "{}"}, "dataset_configs: must be a JSON list, not {}"),
        ({"dataset_configs": "[1]"}, "data.dataset_configs[0]=1: must be a mapping"),
        ({"overrides": ["model.nonsense=1"]}, "nonsense"),
        ({"overrides": ["evaluation.tasks=["]}, "evaluation.tasks=[: expected the node content"),
        ({"overrides": [3]}, "'3' is not of the form key=value"),
        ({"overrides": ["training.optimizer.lr=inf"]}, "training.optimizer.lr=inf: must be finite"),
        ({"max_flops": float("nan")}, "training.max_flops=nan: must be finite"),
        ({"mlflow_uri": "http://["}, "tracking.mlflow_uri: Invalid IPv6 URL"),
        ({"mlflow_experiment": "${"}, "tracking.experiment: "),
    ],
)
def test_wrong_parameters_end_in_one_line(parameters, words):
    with pytest.raises(UserError) as error:
        merged(**parameters)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_runs_are_named_by_architecture_and_seed():
    assert run_names(["mod", "stt"], [0.0, 1.0]) == ["mod:0", "stt:0", "mod:1", "stt:1"]
    for architectures, seeds in (
        (["transformer"], [0]),
        (["mod"], [0.5]),
        (["mod"], [-1]),
        (["mod"], []),
        (["mod"], [1, 1]),
        (["mod"], ["x"]),
        (["mod"], [None]),
        (["mod"], [float("inf")]),
        ([None], [0]),
    ):
        with pytest.raises(UserError, match=r"architectures|seeds"):
            run_names(architectures, seeds)
