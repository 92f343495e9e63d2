"""The evaluate step on a small run: what it writes, in which precision, and how many models it holds."""

import gc
import json
import weakref

import pytest
import torch
from accelerate.state import AcceleratorState

from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.data.loading import load_split, source_names
from dynamic_transformers.data.preview import Preview, read_preview
from dynamic_transformers.evaluation import evaluate as step
from dynamic_transformers.evaluation import exported, harness
from dynamic_transformers.evaluation.evaluate import evaluate
from dynamic_transformers.evaluation.exported import load_model, trained_precision
from dynamic_transformers.export import export
from dynamic_transformers.model_card import CARD
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train

MODEL = {"capacity": 0.5}


@pytest.fixture(scope="module")
def made(make_settings, data_dir, tmp_path_factory):
    """Settings, run and exported model of a MoD trained in bf16."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = make_settings("mod", model=MODEL, system={"precision": "bf16"})
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision for each process
    run_dir = train(settings, data_dir, folder / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    return settings, run_dir, export(run_dir, folder / "model", data_dir)


@pytest.fixture(scope="module")
def evaluated(made, data_dir, tmp_path_factory):
    settings, run_dir, model_dir = made
    return evaluate(settings, data_dir, run_dir, model_dir, tmp_path_factory.mktemp("out") / "evaluation")


def test_what_was_computed_is_written_by_domain_and_task(evaluated, made, data_dir):
    result = json.loads((evaluated / "evaluation.json").read_text())
    model = load_model(made[2], dtype="bf16")
    heldout = evaluate_heldout(model, load_split(data_dir, "test"), 16, source_names(data_dir))
    assert result["eval"]["loss"] == heldout.loss and result["eval"]["dtype"] == "bf16"
    assert result["training_rule"] == "topk"
    assert result["eval"]["domains"]["math"]["loss"] == pytest.approx(heldout.loss)
    assert result["eval"]["domains"]["math"]["fraction"]["sd"] > 0
    efficiency = result["efficiency"]
    assert efficiency["forward_flops_per_token"] == heldout.realised.forward_flops_per_token
    assert efficiency["mean_routed_fraction"] == vars(heldout.realised.fraction)
    for layer, spread in heldout.realised.layers.items():
        found = efficiency["routed_fraction"][str(layer)]
        assert (found["eval"], found["eval_sd"]) == (spread.mean, spread.sd)
    realised = json.loads((evaluated / "results.json").read_text())["realised"]
    assert set(realised) == set(result["bench"]) > {"dt_perplexity_math"}
    for task, figures in result["bench"].items():
        assert figures["routed_fraction"] == realised[task]["fraction"]["mean"]
        assert figures["routed_fraction_sd"] == realised[task]["fraction"]["sd"]
        assert set(realised[task]["layers"]) == set(efficiency["routed_fraction"])


def test_the_preview_of_the_data_is_beside_it(evaluated, data_dir):
    preview = Preview.from_dict(json.loads((evaluated / "data.json").read_text()))
    assert preview == read_preview(data_dir)


def test_the_card_has_the_results(evaluated, made):
    result = json.loads((evaluated / "evaluation.json").read_text())
    before, after = ((folder / CARD).read_text() for folder in (made[2], evaluated))
    assert f"| test/loss | {result['eval']['loss']:.4g} |" in after and "not evaluated yet" in before
    assert "weights in bf16, tokens selected by `threshold`." in after
    for task in result["bench"]:
        assert f"| bench/{task}/" in after
    start, end = before.index("## Results"), before.index("## Data")
    assert after.startswith(before[:start]) and after.endswith(before[end:])


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("standard", {}, None),
        ("mod", {}, "topk"),
        ("sdt", {"training_rule": "threshold"}, "threshold"),
        ("stt", {"selection_rule": "even", "training_rule": "threshold"}, "even"),
    ],
)
def test_the_training_rule_is_the_one_that_selected(architecture, options, expected):
    assert step.training_rule(ARCHITECTURES[architecture].config_class(**options)) == expected


def test_its_speed_is_measured_with_the_fraction(evaluated, made, tmp_path):
    compare([evaluated], tmp_path / "report", models=[made[2]])
    (run,) = json.loads((tmp_path / "report" / "comparison.json").read_text())["runs"]
    timed = run["efficiency"]["timed_routed_fraction"]
    assert set(timed["prefill"]) == set(timed["decode"]) == set(run["efficiency"]["routed_fraction"])
    assert run["efficiency"]["decode_tokens_per_second"] > 0


@pytest.mark.parametrize(("asked", "expected"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_the_precision_is_the_runs_unless_another_is_asked_for(
    asked, expected, made, make_settings, data_dir, tmp_path, monkeypatch
):
    """For held-out loss and benchmarks; and each loads its model when the other's is gone."""
    settings, run_dir, model_dir = made
    settings = make_settings("mod", model=MODEL, system={"precision": "bf16"}, evaluation={"dtype": asked})
    alive, seen = [], []

    def watched(*args, **options):
        model = load_model(*args, **options)
        alive.append(weakref.ref(model))
        gc.collect()
        seen.append((model.dtype, sum(reference() is not None for reference in alive)))
        return model

    for module in (step, harness):
        monkeypatch.setattr(module, "load_model", watched)
    evaluate(settings, data_dir, run_dir, model_dir, tmp_path / "evaluation")
    assert seen == [(expected, 1)] * 2


TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: The capital of {{country}} is
doc_to_choice: [Paris, Lima]
doc_to_target: answer
"""


def test_tasks_of_a_folder_are_evaluated_anew_when_they_change(made, make_settings, data_dir, tmp_path):
    _, run_dir, model_dir = made
    folder, output = tmp_path / "tasks", tmp_path / "evaluation"
    evaluation = {"tasks": ["capitals"], "task_dir": str(folder)}
    settings = make_settings("mod", model=MODEL, system={"precision": "bf16"}, evaluation=evaluation)

    def answers():
        evaluate(settings, data_dir, run_dir, model_dir, output)
        (task,) = json.loads((output / "evaluation.json").read_text())["bench"].items()
        return task, (output / "evaluation.json").stat().st_ino

    with pytest.raises(UserError, match="tasks: no such folder"):
        answers()
    folder.mkdir()
    (folder / "capitals.yaml").write_text(TASK.replace("FILE", str(folder / "capitals.jsonl")))
    (folder / "capitals.jsonl").write_text('{"country": "Peru", "answer": 1}\n')
    (name, figures), first = answers()
    assert name == "capitals" and figures["acc"] in (0, 1) and figures["routed_fraction"] > 0
    assert answers()[1] == first
    (folder / "capitals.jsonl").write_text('{"country": "Peru", "answer": 0}\n')
    (name, changed), second = answers()
    assert second != first and changed["acc"] == 1 - figures["acc"]


def test_bench_takes_the_precision_of_the_training(made, tmp_path):
    assert trained_precision(made[2]) == "bf16"
    assert trained_precision(tmp_path) == "fp32"
    assert exported.load_model(made[2]).dtype == torch.float32
