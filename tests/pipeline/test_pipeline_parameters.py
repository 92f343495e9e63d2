"""The pipeline's parameters, as `configure` takes them."""

import json
from types import SimpleNamespace

import pytest

from components.configure import configure
from dynamic_transformers.configure import settings_from_parameters
from dynamic_transformers.settings import UserError
from dynamic_transformers.study import study_runs

QUICK = {
    "variants": "",
    "grid": "",
    "overrides": [],
    "dataset_configs": "",
    "max_flops": 0.0,
    "mlflow_uri": "",
    "mlflow_experiment": "",
}


def merged(**parameters):
    settings = {
        "data": {"dataset_configs": [{"name": "math", "path": "embedded"}]},
        "training": {"max_steps": 3},
    }
    return settings_from_parameters(**{"settings": json.dumps(settings)} | QUICK | parameters)


def test_parameters_go_over_the_settings(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert merged().training.max_steps == 3
    assert merged().tracking.mlflow is False  # nowhere to track to
    changed = merged(
        overrides=["model.size=micro", "data.block_size=64"],
        dataset_configs='[{"name": "code", "path": "embedded"}]',
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
        ({"variants": "["}, "variants: not JSON"),
        ({"variants": "[]"}, "variants: must be a JSON object, not []"),
        ({"grid": "3"}, "grid: must be a JSON object, not 3"),
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


def test_a_study_in_the_form_takes_the_place_of_that_of_the_settings():
    settings = json.dumps({"training": {"max_steps": 3}, "study": {"variants": {"old": ["model.type=sdt"]}}})
    changed = merged(
        settings=settings, variants='{"mod": ["model.type=mod"]}', grid='{"run.seed": [0, 1]}',
        overrides=["study.baseline=mod"], dataset_configs='[{"name": "math", "path": "embedded"}]',
    )  # fmt: skip
    assert [run.name for run in study_runs(changed)] == ["mod-seed0", "mod-seed1"]
    assert list(
        merged(settings=settings, dataset_configs='[{"name": "math", "path": "embedded"}]').study.variants
    ) == ["old"]


def test_data_of_other_settings_are_refused_before_a_run_is_begun(data_dir, make_settings, tmp_path):
    def configured(**groups):
        outputs = {name: str(tmp_path / name) for name in ("merged", "runs")}
        settings = make_settings(**groups).to_json()
        data = SimpleNamespace(path=str(data_dir))
        configure.python_func(**QUICK | {"settings": settings}, **outputs, data=data)

    configured()
    with pytest.raises(SystemExit, match="2"):
        configured(data={"block_size": 64})
    log = (tmp_path / "merged.log").read_text()
    assert f"{data_dir}: holds data of other settings: data.block_size=64 (there 32); give" in log
    assert "Traceback" not in log
