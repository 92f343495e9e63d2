"""The loop: budgets, resume, accumulation, what a run leaves behind."""

import json
import logging
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynamic_transformers.data.loading import load_split, load_tokenizer
from dynamic_transformers.export import load_run
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import UserError
from dynamic_transformers.training import state, trainer
from dynamic_transformers.training.batches import BlockOrder, MicroBatches
from dynamic_transformers.training.budget import Budget
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.checkpoint import checkpoints
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ROUTED, SURPRISE


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [line["train/loss"] for line in metrics(run_dir) if "train/loss" in line]


def weights(run_dir):
    return load_file(run_dir / read_manifest(run_dir)["checkpoint"] / "model.safetensors")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_learns_and_says_what_it_did(architecture, make_settings, data_dir, tmp_path):
    settings = make_settings(architecture, training={"max_steps": 30, "log_every": 5})
    run_dir = train(settings, data_dir, tmp_path / "run")
    manifest = read_manifest(run_dir)
    assert manifest["training_steps"] == 30
    assert manifest["training_tokens"] == 30 * 4 * 32
    assert manifest["training_flops"] == pytest.approx(metrics(run_dir)[-1]["training_flops"])
    assert yaml.safe_load((run_dir / "config.yaml").read_text()) == json.loads(settings.to_json())
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.3
    last = metrics(run_dir)[-1]
    assert last["eval/loss"] > 0 and last["eval/bits_per_byte"] > 0
    layers = ["1", "3"] if architecture in ROUTED else []
    assert list(manifest["train_routed_fraction"]) == layers
    if architecture in SURPRISE:
        assert weights(run_dir)["model.routing_state.beta"] == 100
    for layer in layers:
        capacity = ARCHITECTURES[architecture].config_class().capacity
        assert manifest["train_routed_fraction"][layer] == pytest.approx(capacity)
        assert 0 <= last[f"routing/layer_{layer}/eval_fraction"] <= 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twelve_steps_equal_four_and_four_and_four(architecture, make_settings, data_dir, tmp_path):
    settings = make_settings(architecture, training={"max_steps": 12, "checkpoint_every": 4})
    straight = train(settings, data_dir, tmp_path / "straight")
    resumed = tmp_path / "resumed"
    for step in (4, 8):
        # What an interruption between two checkpoints leaves: no manifest, lines of steps that are lost.
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(straight, resumed)
        (resumed / "manifest.json").unlink()
        for later in (resumed / "checkpoints").glob("step-*"):
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        shutil.rmtree(resumed / "weights")
        train(settings, data_dir, resumed)
        assert losses(resumed) == losses(straight)
        for name, value in weights(straight).items():
            assert torch.equal(value, weights(resumed)[name]), name
    one, two = (
        load_file(folder / "checkpoints" / "step-00000012" / "optimizer.safetensors")
        for folder in (straight, resumed)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accumulation_does_not_change_the_step(architecture, make_settings, data_dir, tmp_path):
    # Router thresholds see micro-batches, but nothing of training depends on them.
    whole = make_settings(architecture, data={"batch_size": 8})
    parts = make_settings(architecture, data={"batch_size": 2}, training={"gradient_accumulation_steps": 4})
    one = train(whole, data_dir, tmp_path / "one")
    four = train(parts, data_dir, tmp_path / "four")
    assert losses(one) == pytest.approx(losses(four), abs=2e-4)
    for name, value in weights(one).items():
        if "threshold" not in name:
            torch.testing.assert_close(weights(four)[name], value, atol=2e-3, rtol=1e-2)


def test_equal_flops_budgets_end_within_two_percent(make_settings, data_dir, tmp_path):
    spent = []
    for architecture in ARCHITECTURES:
        settings = make_settings(architecture, training={"max_flops": 2e10, "log_every": 50})
        spent.append(read_manifest(train(settings, data_dir, tmp_path / architecture))["training_flops"])
    assert max(spent) / min(spent) < 1.02
    assert spent[0] == pytest.approx(2e10, rel=0.01)


def test_token_budget(make_settings, data_dir, tmp_path):
    settings = make_settings("mod", training={"max_tokens": 1000.0})
    assert read_manifest(train(settings, data_dir, tmp_path / "run"))["training_tokens"] == 1024


@pytest.mark.parametrize("long", [0.0, 600.0])
def test_a_long_run_logs_what_it_takes_of_the_machine(make_settings, data_dir, tmp_path, monkeypatch, long):
    monkeypatch.setattr("dynamic_transformers.training.observers.LONG", long)
    run_dir = train(make_settings(training={"max_steps": 2, "log_every": 1}), data_dir, tmp_path / "run")
    memory = [line.get("system/system_memory_usage_percentage") for line in metrics(run_dir)]
    assert any(value and 0 < value < 100 for value in memory) == (long == 0)


def test_a_finished_run_is_returned(make_settings, data_dir, tmp_path):
    run_dir = train(make_settings("mod"), data_dir, tmp_path / "run")
    before = (run_dir / "manifest.json").stat().st_mtime_ns
    # What changes no number does not make it another run.
    same = {"log_every": 5, "eval_every": 2, "checkpoint_every": 3, "keep_checkpoints": None}
    train(make_settings("mod", training=same), data_dir, run_dir)
    assert (run_dir / "manifest.json").stat().st_mtime_ns == before


def test_clipped_gradients_do_not_move_the_weights(make_settings, data_dir, tmp_path):
    # Below AdamW's eps of 1e-8 the size of a gradient matters; without clipping it does not get there.
    optimizer = {"max_grad_norm": 1e-13, "weight_decay": 0.0}
    settings = make_settings("standard", training={"max_steps": 3, "optimizer": optimizer})
    clipped = train(settings, data_dir, tmp_path / "clipped")
    initial = build_model(settings, len(load_tokenizer(data_dir))).state_dict()
    for name, value in weights(clipped).items():
        torch.testing.assert_close(value, initial[name], atol=1e-5, rtol=0)


def test_order_is_a_permutation_each_epoch_and_does_not_depend_on_ranks():
    order = BlockOrder(10, seed=0)
    first, second = [order[i] for i in range(10)], [order[i] for i in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second

    def batches(batch_size, accumulation, world_size, first_step=0, steps=5):
        ranks = [
            iter(MicroBatches(order, batch_size, accumulation, rank, world_size, first_step))
            for rank in range(world_size)
        ]
        return [
            sorted(block for _ in range(accumulation) for rank in ranks for block in next(rank))
            for _ in range(steps)
        ]

    assert batches(4, 1, 1) == batches(2, 2, 1) == batches(2, 1, 2) == batches(1, 2, 2)
    assert batches(4, 1, 1)[2:] == batches(4, 1, 1, first_step=2, steps=3)


@pytest.fixture
def endless_gradients(monkeypatch):
    """Makes the gradients of chosen steps infinite; returns the models that were built."""

    def choose(steps):
        models = []

        def build(*args):
            model = build_model(*args)
            calls = iter(range(10**6))
            model.model.norm.weight.register_hook(lambda g: g * math.inf if next(calls) in steps else g)
            models.append((model, {name: value.clone() for name, value in model.state_dict().items()}))
            return model

        monkeypatch.setattr(state, "build_model", build)
        return models

    return choose


def test_a_run_that_diverges_ends_and_names_its_last_good_checkpoint(
    make_settings, data_dir, tmp_path, endless_gradients
):
    models = endless_gradients(range(3, 100))
    settings = make_settings(training={"max_steps": 9, "checkpoint_every": 1, "max_skipped_steps": 2})
    with pytest.raises(UserError, match=r"3 steps in a row up to step 6 .*norm=(inf|nan).*step-00000003"):
        train(settings, data_dir, tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-0000000{i}" for i in (1, 2, 3)]
    saved = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    ((model, _),) = models
    assert all(torch.equal(value, saved[name]) for name, value in model.named_parameters() if name in saved)


def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(
    make_settings, data_dir, tmp_path, endless_gradients, caplog, monkeypatch
):
    models = endless_gradients({0, 1})
    settings = make_settings("stt", training={"max_steps": 2})
    monkeypatch.setattr(trainer, "calibrate", lambda *_: ({}, {}))  # which sets thresholds anew
    train(settings, data_dir, tmp_path / "one")
    ((model, before),) = models
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert all(name.endswith(".beta") for name in moved), moved  # a schedule, which goes by steps
    endless_gradients({1, 4})
    caplog.set_level(logging.INFO, logger="dynamic_transformers")
    run = train(make_settings(training={"max_steps": 6}), data_dir, tmp_path / "run")
    assert read_manifest(run)["skipped_steps"] == 2 and "2 steps skipped" in caplog.text
    assert [line.get("train/skipped_steps", 0) for line in metrics(run) if "train/learning_rate" in line] == [
        0, 1, 1, 1, 2, 2
    ]  # fmt: skip
    assert all(math.isfinite(value) for line in metrics(run) for value in line.values())


def test_steps_to_come_are_expected_to_cost_what_the_schedule_says(
    make_settings, data_dir, tmp_path, monkeypatch
):
    totals = []
    honest = Budget.total_steps

    def noted(budget, *args):
        totals.append(honest(budget, *args))
        return totals[-1]

    monkeypatch.setattr(Budget, "total_steps", noted)
    for name, (architecture, model) in {
        "falling capacity": ("mod", {"capacity_warmup_steps": 4}),
        "threshold": ("stt", {"stt": {"targets": "threshold"}}),
        "trained by the threshold": ("mod", {"capacity": 0.5, "training_rule": "threshold"}),
    }.items():
        totals.clear()
        settings = make_settings(architecture, model=model, training={"max_flops": 3e9})
        run = train(settings, data_dir, tmp_path / name)
        done = read_manifest(run)
        assert done["training_flops"] == pytest.approx(3e9, rel=0.05)
        assert totals[-1] == done["training_steps"] and max(totals[1:]) - min(totals[1:]) <= 2


def test_evaluation_of_random_routing_repeats_and_leaves_the_random_state(make_settings, data_dir):
    settings = make_settings("mod", model={"selection_rule": "random"})
    model = build_model(settings, read_manifest(data_dir)["vocab_size"], None)
    split = load_split(data_dir, "validation")
    before = torch.get_rng_state()
    first = evaluate_heldout(model, split, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert evaluate_heldout(model, split, 4).loss == first.loss


CALIBRATED = {
    "mod": {"capacity": 0.25},
    "sdt": {"selection_rule": "calibrated_predictor", "predictor_weight": 0.01},
}


@pytest.mark.parametrize("architecture", ROUTED)
def test_thresholds_are_set_by_the_validation_split_at_the_end(
    architecture, make_settings, data_dir, tmp_path
):
    settings = make_settings(architecture, model=CALIBRATED.get(architecture, {}))
    run = train(settings, data_dir, tmp_path / "run")
    split = load_split(data_dir, "validation")
    trained = load_run(run)
    fractions = evaluate_heldout(trained, split, 4).routed_fraction
    assert fractions and all(
        value == pytest.approx(trained.config.capacity, abs=2e-3) for value in fractions.values()
    )


def test_a_run_that_has_nothing_left_to_do_is_calibrated_too(make_settings, data_dir, tmp_path):
    run = train(
        make_settings("sdt", training={"max_steps": 8, "checkpoint_every": 4}), data_dir, tmp_path / "run"
    )
    # As if it had been killed after its first checkpoint.
    shutil.rmtree(checkpoints(run)[-1])
    (run / "manifest.json").unlink()
    train(make_settings("sdt", training={"max_steps": 4, "checkpoint_every": 4}), data_dir, run)
    fractions = evaluate_heldout(load_run(run), load_split(data_dir, "validation"), 4).routed_fraction
    assert list(fractions.values()) == pytest.approx([0.5] * len(fractions), abs=2e-3)


def test_calibration_leaves_the_random_state(make_settings, data_dir):
    settings = make_settings("mod", model={"selection_rule": "random"})
    model = build_model(settings, read_manifest(data_dir)["vocab_size"], None)
    batch = load_split(data_dir, "validation").batch([0, 1])
    before = torch.get_rng_state()
    calibrate(model, [batch])
    assert torch.equal(torch.get_rng_state(), before)
    fractions = [r.selected.float().mean().item() for r in model(**batch, use_cache=False).routing.values()]
    assert fractions != [0.0] * len(fractions)
