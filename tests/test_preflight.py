"""What is around the settings is looked at before any work is done, and nothing is left behind."""

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from dynamic_transformers.accelerate_environment import check_accelerate_environment
from dynamic_transformers.evaluation.task_index import task_manager
from dynamic_transformers.preflight import check_places, preflight
from dynamic_transformers.settings import UserError
from dynamic_transformers.study import study_runs


@pytest.fixture
def given(make_settings, tmp_path):
    """Settings of a run in an empty folder; keyword arguments as in `make_settings`."""

    def make(architecture="standard", **groups):
        return make_settings(architecture, **{"run": {"output_dir": str(tmp_path / "out")}} | groups)

    return make


def refusal(settings, **options):
    with pytest.raises(UserError) as error:
        preflight(settings, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sound_settings_pass_and_leave_nothing(given, tmp_path):
    preflight(given())
    preflight(given(), [run.settings for run in study_runs(given())], here=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["quick_tset"], "no suite or lm-eval task 'quick_tset'; did you mean quick_test"),
        (
            ["quick_test", "humaneval_instruct"],
            "humaneval_instruct: runs code that the model writes; consent with",
        ),
        (
            ["code"],
            "mbpp: runs code that the model writes; consent with",
        ),
        (["mbpp"], "evaluation.confirm_run_unsafe_code=true"),
        (["dt_perplexity_mth"], "dt_perplexity_mth is of no source; there are math"),
        (["dt_clouze"], "no task 'dt_clouze'"),
    ],
)
@pytest.mark.parametrize("here", [True, False])
def test_tasks_are_known_and_agreed_to(given, tasks, words, here):
    assert words in refusal(given(evaluation={"tasks": tasks}), here=here)


def test_tasks_that_are_known_and_agreed_to_pass(given):
    tasks = ["quick_test", "general", "code", "dt_cloze", "dt_perplexity_math"]
    preflight(given(evaluation={"tasks": tasks, "confirm_run_unsafe_code": True}))


@pytest.mark.parametrize("here", [True, False])
def test_tasks_of_a_folder_are_known(given, tmp_path, here):
    asked = given(evaluation={"tasks": ["capitals"], "task_dir": str(tmp_path)})
    assert f"task_dir {tmp_path}: no task in it" in refusal(asked, here=here)
    (tmp_path / "capitals.yaml").write_text("task: capitals\n")
    task_manager.cache_clear()
    preflight(asked, here=here)


def test_a_resume_source_is_a_checkpoint(given, tmp_path):
    assert "nonsense: no such folder" in refusal(given(training={"resume": "nonsense"}))
    assert "not a checkpoint" in refusal(given(training={"resume": str(tmp_path)}))
    (tmp_path / "state.json").write_text("{}")
    preflight(given(training={"resume": str(tmp_path)}))
    preflight(given(training={"resume": "nonsense"}), here=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_device_is_there(given):
    settings = given(system={"device": "cuda"})
    assert "system.device=cuda: no CUDA device" in refusal(settings)
    preflight(settings, here=False)


def test_a_tracker_is_installed(given, monkeypatch):
    settings = given(tracking={"wandb": True})
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install 'dynamic-transformers[wandb]'" in refusal(settings)
    preflight(settings, here=False)
    package = ModuleType("wandb")
    package.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", package)
    preflight(settings)


@pytest.mark.parametrize(("key", "group"), [("run.output_dir", "run"), ("data.output_dir", "data")])
def test_folders_can_be_made(given, key, group, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for place, words in (
        ("/proc/x/y", "/proc/x/y"),
        (f"{tmp_path}/file", "is a file, not a folder"),
        (f"{tmp_path}/file/below", "file"),
        (f"{tmp_path}/link", "leads nowhere"),
        (f"{tmp_path}/{'x' * 300}", "cannot be written"),
    ):
        settings = given(**{group: {"output_dir": place}})
        with pytest.raises(UserError) as error:
            check_places(settings)
        assert str(error.value).startswith(key) and words in str(error.value)
        assert refusal(settings).startswith(key)
        preflight(settings, here=False)


def test_a_volume_that_is_mounted_as_the_run_folder_is_refused_before_data_are_prepared(
    given, tmp_path, monkeypatch
):
    line = refusal(given(run={"output_dir": "/dev", "name": "shm"}))
    assert line.startswith("/dev/shm: is a mount point") and "name a folder in it" in line
    (tmp_path / "out" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "here")
    assert "is the working folder" in refusal(given(run={"output_dir": "..", "name": "here"}))


def test_a_folder_that_may_not_be_written_is_refused(given):
    settings = given(run={"output_dir": "/outputs"})
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(UserError, match=r"^run\.output_dir: /outputs/.* \(/: Permission denied\)$"):
            check_places(settings)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", 0.25),
        ("selection_rule", "topk"),
        ("training_rule", "threshold"),
        ("predictor_weight", 0.1),
    ],
)
def test_settings_of_routing_are_refused_for_a_model_that_routes_nothing(given, name, value):
    settings = given(model={name: value})
    assert f"model.{name}={value}: a standard model routes nothing" in refusal(settings)
    variants = {name: [f"model.type={name}"] for name in ("standard", "mod", "sdt")}
    study = given(model={name: value}, study={"variants": variants})
    preflight(study, [run.settings for run in study_runs(study)])  # the others take it


def test_every_variant_of_a_pipeline_is_checked(given):
    def study(model, *names):
        return given(
            model=model,
            study={"variants": {name: [f"model.type={name}"] for name in names}, "baseline": None},
        )

    one_layer = {"dimensions": {"num_hidden_layers": 1}}
    study_runs(study(one_layer, "standard"))
    with pytest.raises(UserError, match=r"study\.variants\.sdt: .*num_hidden_layers=1: model\.type=sdt"):
        study_runs(study(one_layer, "standard", "sdt"))
    with pytest.raises(UserError, match="STT's student is its predictor"):
        study_runs(study({"predictor_weight": 0.1}, "mod", "stt"))


def test_a_variant_that_cannot_be_compiled_is_refused(given):
    variants = {"mod": ["model.type=mod"], "stt": ["model.type=stt", "model.stt.targets=threshold"]}
    study = given(system={"compile": True}, study={"variants": variants, "baseline": "mod"})
    runs = [run.settings for run in study_runs(study)]
    assert "not with model.stt.targets=threshold" in refusal(study, runs=runs)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("MIXED_PRECISION", "bf16", "give system.precision=bf16 instead"),
        ("MIXED_PRECISION", "fp16", "not supported"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "give training.gradient_accumulation_steps=4 instead"),
        ("GRADIENT_ACCUMULATION_STEPS", "many", "give a number"),
        ("GRADIENT_CLIPPING", "0.5", "give training.optimizer.max_grad_norm=0.5 instead"),
        ("USE_FSDP", "true", "does not use FSDP"),
        ("USE_DEEPSPEED", "true", "does not use DeepSpeed"),
        ("USE_MEGATRON_LM", "true", "does not use Megatron-LM"),
        ("USE_PARALLELISM_CONFIG", "true", "does not use a parallelism configuration"),
        ("DYNAMO_BACKEND", "INDUCTOR", "not supported"),
        ("TORCH_DEVICE", "cuda:1", "not supported"),
    ],
)
def test_what_accelerate_is_asked_for_is_refused_where_the_settings_differ(
    given, monkeypatch, variable, value, words
):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    message = refusal(given())
    assert f"ACCELERATE_{variable}={value.lower() if variable == 'DYNAMO_BACKEND' else value}" in message
    assert words in message
    preflight(given(), here=False)


def test_what_accelerate_launch_says_by_itself_or_as_the_settings_do_passes(given, monkeypatch):
    """The variables that `accelerate launch` sets without any option."""
    said = {"MIXED_PRECISION": "no", "USE_CPU": "False", "DYNAMO_BACKEND": "no", "DYNAMO_MODE": "default"}
    said |= {"DYNAMO_USE_FULLGRAPH": "False", "GRADIENT_ACCUMULATION_STEPS": "1"}
    for name, value in said.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    settings = given(training={"gradient_accumulation_steps": 4}, system={"precision": "bf16"})
    check_accelerate_environment(settings)
    for steps, norm in (("04", "1"), ("4.0", "1e0"), ("1.0", "1.00")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", norm)
        check_accelerate_environment(settings)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    check_accelerate_environment(settings)
