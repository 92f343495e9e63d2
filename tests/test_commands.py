"""The commands of the README, as a user types them."""

import json
import subprocess
import sys

import pytest

from dynamic_transformers.settings import PROJECT_ROOT


def python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=PROJECT_ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("config_name", ["default", "my_experiment"])
def test_train_and_bench(config_name, tmp_path, micro_overrides):
    arguments = [] if config_name == "default" else [f"--config-name={config_name}"]
    place = (f"run.output_dir={tmp_path}", "run.name=run", "tracking.mlflow=false")
    trained = python("train.py", *arguments, *place, "training.max_steps=3", *micro_overrides)
    assert trained.returncode == 0, trained.stderr
    model = tmp_path / "run" / "final_model"
    assert f"model: {model}" in trained.stdout
    if config_name == "my_experiment":
        assert json.loads((model / "config.json").read_text())["capacity"] == 0.25
        command = ("bench.py", "--model_path", model, "--tasks", "quick_test", "--batch_size", 8)
        benched = python(*command)
        assert benched.returncode == 0, benched.stderr
        results = json.loads((model / "results.json").read_text())
        assert results["config"]["causal"] is True
        assert "dt_arithmetic" in results["results"] and "dt_arithmetic" in benched.stdout
        report = tmp_path / "report"
        command = ("-m", "dynamic_transformers.cli", "compare", tmp_path / "run", "--output_dir", report)
        compared = python(*command)
        assert compared.returncode == 0, compared.stderr
        assert str(report / "report.html") in compared.stdout and "MoD" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.tpye=mod"], "error: model.tpye: no such key; did you mean model.type?"),
        (["model.type=rnn"], "error: model.type=rnn: must be one of standard, mod, sdt, stt"),
        (["--config-name=nothing"], "error: no configuration 'nothing'"),
        (["training.max_tokens=10"], "error: give exactly one of training.max_steps, max_tokens, max_flops"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message):
    result = python("train.py", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


def test_every_test_file_is_collected(request):
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("only part of the suite was asked for")
    collected = {item.path for item in request.session.items}
    files = set((PROJECT_ROOT / "tests").rglob("*.py"))
    helpers = {
        "conftest.py",
        "fake_kfp.py",
        "fake_kubernetes.py",
        "real_docker.py",
        "synthetic_evaluations.py",
        "tiny.py",
    }
    assert {path.name for path in files - collected} == helpers
