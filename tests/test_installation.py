"""A wheel in an environment of its own: every command, from folders that know nothing of the project."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
import yaml

from dynamic_transformers.settings import PROJECT_ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command of an environment that holds our wheel, and its dependencies as this one has them."""
    folder = tmp_path_factory.mktemp("installed")
    sources, environment = folder / "sources", folder / "environment"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "config"):
        shutil.copytree(PROJECT_ROOT / name, sources / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT_ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, sources], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(*command, cwd):
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program = environment / "bin" / command[0]
        arguments = [str(program), *map(str, command[1:])]
        result = subprocess.run(arguments, cwd=cwd, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run.environment = environment
    return run


def test_a_wheel_trains_and_benchmarks_from_any_folder(installed, tmp_path, micro_overrides):
    place = installed("python", "-c", "import dynamic_transformers as d; print(d.__file__)", cwd=tmp_path)
    assert place.startswith(str(installed.environment))
    (tmp_path / "config").mkdir()
    mine = {"defaults": ["default"], "run": {"name": "mine"}, "tracking": {"mlflow": False}}
    mine["training"] = {"max_steps": 1}
    mine["data"] = {"dataset_configs": [{"name": "math", "path": "embedded"}]}
    (tmp_path / "config" / "mine.yaml").write_text(yaml.safe_dump(mine))
    options = ("--config-name=mine", *micro_overrides)
    assert "data: " in installed("dynamic-transformers", "prepare", *options, cwd=tmp_path)
    trained = installed("python", PROJECT_ROOT / "train.py", *options, cwd=tmp_path)
    model = tmp_path / "outputs" / "mine" / "final_model"
    assert "is finished" in trained and (model / "config.json").is_file()
    bench = ("--model_path", model.relative_to(tmp_path), "--tasks", "quick_test", "--limit", "2")
    table = installed("python", PROJECT_ROOT / "bench.py", *bench, cwd=tmp_path)
    assert "dt_arithmetic" in table


def test_a_wheel_has_every_configuration_of_the_project(installed):
    (config,) = installed.environment.glob("lib/python*/site-packages/dynamic_transformers/config")
    ours = {path.relative_to(PROJECT_ROOT / "config") for path in (PROJECT_ROOT / "config").rglob("*.yaml")}
    assert ours and ours == {path.relative_to(config) for path in config.rglob("*.yaml")}
    help_text = installed("dynamic-transformers", "train", "--help", cwd="/")
    assert "--config-name" in help_text
