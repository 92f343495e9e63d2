"""An architecture from outside (`model.plugin`): trained, exported, evaluated, compared and benchmarked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamic_transformers.configure import compose_settings, settings_from_dict
from dynamic_transformers.evaluation.exported import load_config
from dynamic_transformers.models import plugin
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.plugin import add_plugin
from dynamic_transformers.preflight import preflight
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from dynamic_transformers.study import study_runs
from dynamic_transformers.training.identity import settings_identity

RECORD = """
from dataclasses import dataclass
from typing import Annotated

from dynamic_transformers.constraints import In

from .base import Architecture


@dataclass
class LouderSettings:
    gain: Annotated[float, In("(0, 10]")] = 1.0


class Louder(Architecture):
    name, title, description = "louder", "Louder", "a Qwen2 whose last norm has one more learned factor"
    model_type, module, classes = "qwen2_louder", "modeling_louder", "Qwen2Louder"
    settings = LouderSettings


ARCHITECTURE = Louder()
"""
MODEL = """
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel

from .carried import CarriedCode


class Qwen2LouderConfig(Qwen2Config):
    model_type = "qwen2_louder"
    gain: float = 1.0


class Louder(nn.Module):
    def __init__(self, norm, gain):
        super().__init__()
        self.norm, self.gain = norm, nn.Parameter(torch.tensor([gain]))

    def forward(self, hidden_states):
        return self.gain * self.norm(hidden_states)


class Qwen2LouderModel(CarriedCode, Qwen2Model):
    config: Qwen2LouderConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = Louder(self.norm, config.gain)


class Qwen2LouderForCausalLM(CarriedCode, Qwen2ForCausalLM):
    config: Qwen2LouderConfig

    def __init__(self, config):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = Qwen2LouderModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
"""
DATA = {"dataset_configs": [{"name": "math", "path": "embedded"}]}
BUDGET = {"training": {"max_steps": 1}, "data": DATA}


@pytest.fixture(autouse=True)
def forgotten():
    """What a test loads is not there for the next one."""
    known = dict(ARCHITECTURES)
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(known)
    for name in plugin._staged:
        for package in ("models", "models.architectures"):
            sys.modules.pop(f"dynamic_transformers.{package}.{Path(name).stem}", None)
    plugin._staged.clear()


def write_plugin(folder):
    """The two files; returns that of the record."""
    (folder / "modeling_louder.py").write_text(MODEL)
    (folder / "louder.py").write_text(RECORD)
    return folder / "louder.py"


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "MLFLOW_TRACKING_URI": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, micro_overrides):
    """The folder of a pipeline that trained a plugin, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    write_plugin(folder)
    study = {"loud": ["model.type=louder", "model.options.gain=2"]}
    ended = run(
        folder, "-m", "pipelines.run", "--variants", "loud", f"study.variants={json.dumps(study)}",
        "study.baseline=null", "model.plugin=louder.py", "run.output_dir=outputs", "training.max_flops=2.0e9",
        *micro_overrides,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder, ended.stdout


def test_a_plugin_goes_through_the_whole_pipeline(pipeline):
    folder, printed = pipeline
    assert "loud" in printed
    (report,) = folder.glob("outputs/*/report/comparison.json")
    (found,) = json.loads(report.read_text())["runs"]
    assert (found["variant"], found["architecture"]) == ("loud", "louder") and found["eval"]["loss"] < 7


def exported(folder):
    configs = folder.glob("outputs/quickstart/**/model/config.json")
    (config,) = [path for path in configs if "qwen2_louder" in path.read_text()]
    return config.parent


def test_its_files_lie_beside_the_weights_and_load_without_this_package(pipeline):
    model = exported(pipeline[0])
    assert (model / "louder.py").read_text() == RECORD and (model / "modeling_louder.py").read_text() == MODEL
    config = json.loads((model / "config.json").read_text())
    assert config["gain"] == 2
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_louder.Qwen2LouderForCausalLM"
    assert "trust_remote_code=True" in (model / "README.md").read_text()
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M\n"
        "model = M.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'dynamic_transformers' not in sys.modules; print(model.model.norm.gain.item())"
    )
    ended = run(model, "-c", code, str(model))
    assert ended.returncode == 0 and float(ended.stdout) != 2, ended.stderr


def test_bench_runs_its_code_only_where_it_is_named(pipeline):
    model = exported(pipeline[0])
    bench = (str(PROJECT_ROOT / "bench.py"), "--model_path", str(model), "--limit", "2")
    refused = run(pipeline[0], *bench)
    assert refused.returncode == 2 and "y/N" not in refused.stdout
    assert refused.stderr.splitlines()[-1].endswith("not ours; --plugin FILE names its record")
    done = run(pipeline[0], *bench, "--plugin", str(model / "louder.py"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_options_are_those_of_the_record(tmp_path):
    model = {"plugin": str(write_plugin(tmp_path)), "type": "louder"}
    settings = settings_from_dict(BUDGET, {"model": model})
    assert settings.model.options == {"gain": 1.0}
    assert list(settings.model.plugin) == ["louder.py", "modeling_louder.py"]
    assert settings_from_dict(settings.to_dict()) == settings
    with pytest.raises(UserError, match=r"model.options.gain=11.0: must be in \(0, 10\]"):
        settings_from_dict(BUDGET, {"model": model | {"options": {"gain": 11}}})
    with pytest.raises(
        UserError, match=r"model.options.gian: no such key; did you mean model.options.gain\?"
    ):
        settings_from_dict(BUDGET, {"model": model | {"options": {"gian": 2}}})
    with pytest.raises(UserError, match=r"model\.options are those of a model.plugin"):
        settings_from_dict(BUDGET, {"model": {"options": {"gain": 2}}})


def test_options_that_nothing_reads_are_refused(tmp_path):
    path = write_plugin(tmp_path)
    path.write_text(RECORD.replace("    settings = LouderSettings\n", ""))
    model = {"plugin": str(path), "type": "louder", "options": {"gain": 2}}
    with pytest.raises(UserError, match=r"model\.options: louder has none"):
        settings_from_dict(BUDGET, {"model": model})


def test_a_plugin_that_a_run_does_not_use_is_refused(tmp_path):
    settings = settings_from_dict(BUDGET, {"model": {"plugin": str(write_plugin(tmp_path))}})
    with pytest.raises(UserError, match=r"model\.plugin=louder\.py and model\.type=standard"):
        preflight(settings)


def test_a_run_is_another_with_another_text(tmp_path):
    settings = settings_from_dict(BUDGET, {"model": {"plugin": str(write_plugin(tmp_path))}})
    before = settings_identity(settings)
    assert "Qwen2Louder" not in json.dumps(before) and "model.plugin.louder.py" in before
    settings.model.plugin |= {"modeling_louder.py": "# changed"}
    assert settings_identity(settings) != before


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("1 +"), "SyntaxError"),
        (lambda path: path.write_text("ARCHITECTURE = 3"), "must be an Architecture with name"),
        (
            lambda path: path.write_text(RECORD.replace('"louder"', '"mod"')),
            r"an architecture mod \(qwen2_mod\) already",
        ),
        (lambda path: path.with_name("modeling_louder.py").unlink(), "modeling_louder.py: No such file"),
        (lambda path: path.write_text(RECORD + "#" * 90_000), "at most 90,000 fit"),
        (lambda path: path.write_text(RECORD + "#" + "é" * 20_000), "at most 90,000 fit"),
        (lambda path: path.write_text(RECORD.replace("modeling_louder", "mod")), "mod.py: No such file"),
        (lambda path: path.write_text(RECORD.replace("modeling_louder", "louder")), "a file of its own"),
        (lambda path: path.write_text(RECORD.replace("qwen2_louder", "qwen2_mod")), "an architecture mod"),
        (lambda path: path.write_text(RECORD + "# ${run.name}"), "read as an interpolation"),
        (lambda path: path.write_text("raise SystemExit(0)"), "SystemExit"),
    ],
)
def test_what_is_no_plugin_is_refused_in_one_line(change, told, tmp_path):
    path = write_plugin(tmp_path)
    change(path)
    with pytest.raises(UserError, match=told) as refused:
        settings_from_dict(BUDGET, {"model": {"plugin": str(path)}})
    assert str(refused.value).startswith("model.plugin: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["mod", "carried", "looped"])
def test_a_file_does_not_take_the_name_of_one_of_ours(name, tmp_path):
    path = write_plugin(tmp_path).rename(tmp_path / f"{name}.py")
    with pytest.raises(UserError, match=rf"{name}\.py: is the name of a file of ours; choose another"):
        settings_from_dict(BUDGET, {"model": {"plugin": str(path)}})


@pytest.mark.parametrize("name", ["../louder.py", "sub/louder.py", "louder"])
def test_the_name_of_a_file_is_no_path(name):
    with pytest.raises(UserError, match="must be the name of a Python file"):
        settings_from_dict(BUDGET, {"model": {"plugin": {name: RECORD, "modeling_louder.py": MODEL}}})


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("class Qwen2LouderConfig", "1 +", "SyntaxError"),
        ("class Qwen2LouderConfig", "class Other", "NameError"),
        ("from .carried", "from .nowhere", "ModuleNotFoundError"),
        ('model_type = "qwen2_louder"', 'model_type = "other"', "model_type 'other', the record says"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_before_anything_costs_time(before, after, told, tmp_path):
    path = write_plugin(tmp_path)
    (tmp_path / "modeling_louder.py").write_text(MODEL.replace(before, after))
    settings = settings_from_dict(BUDGET, {"model": {"plugin": str(path), "type": "louder"}})
    with pytest.raises(UserError, match=told):
        preflight(settings)


def test_weights_are_read_by_the_code_that_they_were_made_with(pipeline, tmp_path):
    add_plugin({"louder.py": RECORD, "modeling_louder.py": MODEL + "# another"})
    with pytest.raises(UserError, match=r"was made with another modeling_louder\.py than the plugin's"):
        load_config(exported(pipeline[0]))


def test_the_study_that_the_report_hands_out_composes(pipeline):
    (study,) = pipeline[0].glob("outputs/*/report/study.yaml")
    (again,) = study_runs(compose_settings("study", config_dir=study.parent))
    assert again.variant == "loud" and again.settings.model.options == {"gain": 2}
    assert again.settings.model.plugin == {"louder.py": RECORD, "modeling_louder.py": MODEL}


@pytest.mark.parametrize("override", ["model.plugin={}", "model={{plugin: {}}}"])
def test_no_run_of_a_study_has_a_plugin_of_its_own(override, tmp_path):
    study = {"baseline": None, "variants": {"mine": [override.format(write_plugin(tmp_path))]}}
    with pytest.raises(UserError, match=r"model\.plugin is the same for all runs"):
        study_runs(settings_from_dict(BUDGET, {"study": study}))
