"""Which models are timed beside which, and on what: `compare` with models."""

import json

import pytest
from synthetic_evaluations import make_run, write_run

from dynamic_transformers.comparison import compare as module
from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.evaluation.efficiency import Speed
from dynamic_transformers.evaluation.evaluate import PROMPTS
from dynamic_transformers.manifest import write_json, write_manifest
from dynamic_transformers.settings import UserError

TEXT = "12 + 7 = 19"


@pytest.fixture
def measured(data_dir, tmp_path, monkeypatch):
    """A comparison of runs whose models are not run: what would be timed, and the report's runs."""
    asked = []

    def noted(reference, others):
        asked.extend([reference, *others])
        return [
            Speed(100.0 + place, 10.0, {}, {"number": 1, "prefill": 1.0, "decode": 2.0})
            for place in range(len(asked))
        ]

    monkeypatch.setattr(module, "measure_side_by_side", noted)

    def measure(runs, prompts=TEXT, tokenizers=None):
        evaluations, models = [], []
        for number, run in enumerate(runs):
            model = tmp_path / f"model{number}"
            model.mkdir()
            if tokenizer := tokenizers[number] if tokenizers else load_tokenizer(data_dir):
                tokenizer.save_pretrained(model)
            write_manifest(model, "export", {"number": number}, {})
            run["model_digest"] = json.loads((model / "manifest.json").read_text())["digest"]
            folder = write_run(tmp_path / f"evaluation{number}", run)
            if prompts == TEXT:
                write_json(folder / PROMPTS, [{"ids": [number, 1, 2], "prefilled": 1, "text": TEXT}])
            elif prompts is not None:
                write_json(folder / PROMPTS, prompts)
            evaluations.append(folder)
            models.append(model)
        report = compare(evaluations, tmp_path / "report", models=models[::-1])
        return asked, json.loads((report / "comparison.json").read_text())["runs"]

    return measure


def test_all_are_timed_beside_the_first_baseline_on_its_text(measured):
    runs = [make_run("mod", 0), make_run("standard", 1), make_run("standard", 0), make_run("mod", 1)]
    for run in runs:
        run["eval"]["dtype"] = "bf16"
    asked, compared = measured(runs)
    assert [subject.folder.name for subject in asked] == ["model2", "model1", "model0", "model3"]
    assert {subject.dtype for subject in asked} == {"bf16"}
    assert [subject.prompts[0].ids for subject in asked] == [[2, 1, 2]] * 4
    speeds = {
        (run["architecture"], run["seed"]): run["efficiency"]["prefill_tokens_per_second"] for run in compared
    }
    assert speeds == {("standard", 0): 100, ("standard", 1): 101, ("mod", 0): 102, ("mod", 1): 103}


def test_a_model_of_the_same_tokens_and_another_test_split_reads_the_same_ids(measured):
    """A text cut again may give other ids: [0, 1, 2] is no result of the tokenizer."""
    runs = [make_run("standard"), make_run("mod")]
    runs[1]["reference"]["test_sha256"] = "b" * 64
    asked, _ = measured(runs)
    assert [subject.prompts[0].ids for subject in asked] == [[0, 1, 2]] * 2


def test_a_model_of_other_tokens_reads_the_same_text(measured, data_dir):
    """Although its evaluation says that the test split is the same."""
    tokenizer = load_tokenizer(data_dir)
    tokenizer.add_tokens(["12 + 7"])
    asked, _ = measured(
        [make_run("standard"), make_run("mod")], tokenizers=(load_tokenizer(data_dir), tokenizer)
    )
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) < len(load_tokenizer(data_dir)(TEXT)["input_ids"])
    assert asked[1].prompts[0].ids == tokens
    assert len(tokens) - asked[1].prompts[0].prefilled == 2


def test_a_model_without_its_tokenizer_is_named(measured):
    with pytest.raises(UserError, match=r"model0: has no tokenizer\.json"):
        measured([make_run("standard")], tokenizers=[None])


def test_a_model_that_was_not_given_is_named(tmp_path):
    folder = write_run(tmp_path / "in", make_run("standard"))
    (tmp_path / "model").mkdir()
    write_manifest(tmp_path / "model", "export", {}, {})
    with pytest.raises(UserError, match="its model is not among"):
        compare([folder], tmp_path / "report", models=[tmp_path / "model"])


@pytest.mark.parametrize("lacking", ["eval.dtype", "reference", PROMPTS])
def test_an_evaluation_of_an_older_version_is_refused_in_one_line(measured, lacking):
    run = make_run("standard")
    if lacking == "eval.dtype":
        del run["eval"]["dtype"]
    else:
        run.pop(lacking, None)
    with pytest.raises(UserError, match=r"evaluate the model again with this version$") as refusal:
        measured([run], prompts=None if lacking == PROMPTS else TEXT)
    assert lacking in str(refusal.value)


def test_prompts_of_another_form_are_refused(measured):
    with pytest.raises(UserError, match=rf"{PROMPTS}: .*evaluate the model again with this version$"):
        measured([make_run("standard")], prompts=[{"tokens": [1, 2]}])


def test_without_models_and_without_speed_the_models_are_asked_for(tmp_path):
    run = make_run("standard")
    del run["efficiency"]["prefill_tokens_per_second"]
    with pytest.raises(UserError, match="its speed was not measured; give its model"):
        compare([write_run(tmp_path / "in", run)], tmp_path / "report")
