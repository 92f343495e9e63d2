"""`dynamic-transformers calibrate`, and the rules that `bench` refuses, as a user types them."""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynamic_transformers.cli import main
from dynamic_transformers.data.loading import load_split
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.evaluation.evaluate import evaluate
from dynamic_transformers.evaluation.exported import load_model
from dynamic_transformers.export import export
from dynamic_transformers.manifest import MANIFEST, input_folder, read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train


def cli(*arguments):
    """A command as `dynamic-transformers` runs it, in this process: imports take seconds."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        patch.setattr(sys, "argv", ["dynamic-transformers", *map(str, arguments)])
        main()
    return subprocess.CompletedProcess(arguments, end.value.code, out.getvalue(), err.getvalue())


def refused(*arguments):
    """The one line of a command that is refused."""
    result = cli(*arguments)
    assert result.returncode == 2, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def model_of(make_settings, data_dir, tmp_path_factory):
    """The exported model of a short run, made once for each architecture."""
    made = {}

    def get(architecture, **groups):
        key = architecture, str(groups)
        if key not in made:
            run = tmp_path_factory.mktemp("runs") / architecture
            train(make_settings(architecture, **groups), data_dir, run)
            made[key] = export(run, run / "final_model")
        return made[key]

    return get


@pytest.fixture(scope="module")
def prose(model_of, make_settings, tmp_path_factory):
    """Data of another domain, with the model's tokenizer."""
    domain = {"dataset_configs": [{"name": "prose", "path": "embedded"}]}
    tokenizer = {"tokenizer_name": str(model_of("sdt"))}
    return prepare(make_settings(data=domain | tokenizer), tmp_path_factory.mktemp("data") / "prose")


def fractions(model_dir, data_dir):
    model = load_model(model_dir)
    return list(evaluate_heldout(model, load_split(data_dir, "validation"), 1).routed_fraction.values())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_another_capacity_and_another_domain(model_of, prose, data_dir, tmp_path):
    model_dir = model_of("sdt")
    before, weights = contents(model_dir), load_file(model_dir / "model.safetensors")
    for data, asked, capacity in ((prose, (), 0.5), (data_dir, ("--capacity", "0.25"), 0.25)):
        done = cli("calibrate", "--model_path", model_dir, "--data_dir", data, *asked)
        assert done.returncode == 0, done.stderr
        new = model_dir.with_name(f"final_model-{data.name}-capacity-{capacity:g}")
        assert f"model: {new}" in done.stdout and contents(model_dir) == before
        # Equal first tokens of documents have equal scores, which no threshold parts.
        assert fractions(new, data) == pytest.approx([capacity] * 2, abs=1e-2)
        assert json.loads((new / "config.json").read_text())["capacity"] == capacity
        changed = load_file(new / "model.safetensors")
        differing = {name for name in weights if not torch.equal(weights[name], changed[name])}
        assert differing == {"model.routing_state.thresholds"} and changed.keys() == weights.keys()
        manifest, old = read_manifest(new), read_manifest(model_dir)
        assert input_folder(new, "model") == model_dir.resolve()
        assert input_folder(new, "calibration_data") == data.resolve()
        assert input_folder(new, "data") == data_dir.resolve()
        assert manifest["config"]["capacity"] == capacity
        assert manifest["run_config"]["calibration.capacity"] == capacity
        assert old["training_flops"] < manifest["training_flops"] < 2 * old["training_flops"]
        loaded = AutoModelForCausalLM.from_pretrained(new, trust_remote_code=True)
        assert loaded.config.capacity == capacity
        # Again: nothing to do. Another γ there: refused, and nothing changes.
        written = contents(new)
        again = cli("calibrate", "--model_path", model_dir, "--data_dir", data, *asked)
        assert again.returncode == 0 and contents(new) == written
        line = refused(
            *("calibrate", "--model_path", model_dir, "--data_dir", data),
            *("--capacity", "0.75", "--output_dir", new),
        )
        assert "holds something else; name another folder with --output_dir" in line
        assert contents(new) == written
    assert fractions(model_dir, prose) != pytest.approx([0.5] * 2, abs=2e-2)  # else nothing was tried


def test_a_recalibrated_model_is_benched_and_not_evaluated(model_of, make_settings, data_dir, tmp_path):
    """Evaluated, it would pass for the model of which it is a variant."""
    model_dir, new = model_of("stt"), tmp_path / "a third"
    (model_dir / "results.json").write_text("{}")
    asked = ("--data_dir", data_dir, "--capacity", "0.3", "--output_dir", new)
    assert cli("calibrate", "--model_path", model_dir, *asked).returncode == 0
    assert not (new / "results.json").exists()
    benched = cli("bench", "--model_path", new, "--tasks", "dt_arithmetic", "--limit", 2)
    assert benched.returncode == 0, benched.stderr
    settings = make_settings("stt", evaluation={"tasks": ["dt_arithmetic"], "limit": 2})
    with pytest.raises(UserError, match=rf"^{new}: is recalibrated; .* `bench` takes recalibrated models$"):
        evaluate(settings, data_dir, model_dir.parent, new, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_of_itself_again(model_of, data_dir, tmp_path):
    for name, source in (("one", model_of("mod")), ("two", tmp_path / "one")):
        asked = ("--data_dir", data_dir, "--capacity", "0.5", "--output_dir", tmp_path / name)
        assert cli("calibrate", "--model_path", source, *asked).returncode == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_data_of_the_model_may_be_gone(model_of, prose, data_dir, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(model_of("sdt"), moved)
    manifest = json.loads((moved / MANIFEST).read_text())
    manifest["inputs"]["data"] |= {"path": "/nowhere", "relative": "nowhere"}
    (moved / MANIFEST).write_text(json.dumps(manifest))
    asked = ("--model_path", moved, "--data_dir", prose, "--output_dir", tmp_path / "new")
    assert cli("calibrate", *asked).returncode == 0
    assert "data" not in read_manifest(tmp_path / "new")["inputs"]
    assert "--data_dir" in refused("bench", "--model_path", tmp_path / "new", "--tasks", "dt_arithmetic")


def test_what_cannot_be_calibrated_is_refused_in_one_line(model_of, make_settings, data_dir, tmp_path):
    def line(model_dir, data=data_dir, *more):
        new = ("--output_dir", tmp_path / "new")
        told = refused("calibrate", "--model_path", model_dir, "--data_dir", data, *new, *more)
        assert not (tmp_path / "new").exists()
        return told

    assert "a qwen2 model routes nothing" in line(model_of("standard"))
    rule = {"selection_rule": "predictor", "predictor_weight": 0.01}
    assert "selection_rule=predictor reads none" in line(model_of("mod", model=rule))
    assert "its targets are no fraction" in line(model_of("stt", model={"stt": {"targets": "threshold"}}))
    other = prepare(make_settings(data={"vocab_size": 290}), tmp_path / "other")
    assert "another tokenizer than the model's" in line(model_of("mod"), other)
    assert "no such folder" in line(tmp_path / "nothing")
    assert "no such folder" in line(model_of("mod"), tmp_path / "nothing")
    assert "is the output of prepare_data, not of export" in line(data_dir)
    model_dir = model_of("mod")
    before = contents(model_dir)
    itself = ("--data_dir", data_dir, "--capacity", "0.5", "--output_dir", model_dir)
    assert "holds something else" in refused("calibrate", "--model_path", model_dir, *itself)
    assert contents(model_dir) == before
    file = tmp_path / "file"
    file.write_text("of somebody")
    onto = ("--data_dir", data_dir, "--output_dir", file)
    assert refused("calibrate", "--model_path", model_dir, *onto).endswith("file: is a file; name a folder")
    assert file.read_text() == "of somebody"
    wrong = cli("calibrate", "--model_path", model_dir, "--data_dir", data_dir, "--capacity", "1.5")
    assert wrong.returncode == 2 and "must be in (0, 1]" in wrong.stderr


@pytest.mark.parametrize("capacity", ["1", "0.00001"])
def test_the_ends_of_capacity(model_of, data_dir, tmp_path, capacity):
    asked = ("--data_dir", data_dir, "--capacity", capacity, "--output_dir", tmp_path / "new")
    done = cli("calibrate", "--model_path", model_of("sdt"), *asked)
    assert done.returncode == 0, done.stderr
    warned = "capacity 1e-05 is less than one token of a block of 32" in done.stdout
    realised = fractions(tmp_path / "new", data_dir)
    told = list(read_manifest(tmp_path / "new")["calibrated_fraction"].values())
    if capacity == "1":
        assert told == realised == [1.0, 1.0] and "computes 1.0000 of the text" in done.stdout
        assert not warned
    else:
        assert max(told) < 1 / 32 and warned


def test_bench_names_the_rules_that_the_model_was_trained_for(model_of):
    bench = ("--model_path", model_of("sdt"), "--tasks", "dt_arithmetic", "--selection_rule")
    for rule in ("calibrated_predictor", "predictor", "nonsense"):
        assert f"--selection_rule={rule}: this model was trained for threshold" in refused(
            "bench", *bench, rule
        )


def test_bench_by_a_rule_tells_weights_that_cannot_be_read(model_of, tmp_path):
    damaged = shutil.copytree(model_of("sdt"), tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    bench = ("--model_path", damaged, "--tasks", "dt_arithmetic", "--selection_rule", "threshold")
    assert "damaged: its weights cannot be read: " in refused("bench", *bench)


def test_bench_refuses_a_rule_whose_threshold_was_never_set(model_of, data_dir, tmp_path):
    model_dir = model_of("sdt", model={"predictor_weight": 0.01})
    bench = ("--tasks", "dt_arithmetic", "--limit", 2, "--selection_rule")
    # Training averages the quantiles of both; a calibration of one for another γ leaves the other unset.
    averaged = cli("bench", "--model_path", model_dir, *bench, "calibrated_predictor")
    assert averaged.returncode == 0, averaged.stderr
    new = tmp_path / "new"
    asked = ("--data_dir", data_dir, "--capacity", "0.25", "--output_dir", new)
    assert cli("calibrate", "--model_path", model_dir, *asked).returncode == 0
    line = refused("bench", "--model_path", new, *bench, "calibrated_predictor")
    assert "--selection_rule=calibrated_predictor: its thresholds were never set" in line
    assert cli("bench", "--model_path", new, *bench, "threshold").returncode == 0
    untrained = shutil.copytree(model_dir, tmp_path / "untrained")
    (untrained / "results.json").unlink()
    tensors = load_file(untrained / "model.safetensors")
    for name in ("thresholds", "weights"):
        tensors[f"model.routing_state.{name}"].zero_()
    save_file(tensors, untrained / "model.safetensors", metadata={"format": "pt"})
    assert "never set" in refused("bench", "--model_path", untrained, *bench, "threshold")
