"""Calibration: its thresholds, its cost, and what is evaluated after it."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rules
from dynamic_transformers.data.loading import batches_of, load_split
from dynamic_transformers.export import load_run
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.models.selection import score_quantile
from dynamic_transformers.models.state import KINDS
from dynamic_transformers.training import calibration
from dynamic_transformers.training.calibration import calibrate, calibration_rows
from dynamic_transformers.training.flops import calibration_flops
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ALL, CASES, ROUTED, calibrated_case, tiny_model, tokens

CALIBRATED = [
    case
    for case, (architecture, options) in CASES.items()
    if architecture in ROUTED
    and options.get("selection_rule", "threshold") in KINDS
    and options.get("targets") != "threshold"  # which are no fixed fraction
]


def packed(rows, length, seed, starts=()):
    """A batch whose rows are documents that begin at `starts` and at 0."""
    positions = torch.arange(length)
    for start in starts:
        positions[start:] = torch.arange(length - start)
    return {"input_ids": tokens(rows, length, seed=seed), "position_ids": positions.expand(rows, -1)}


BATCHES = [packed(4, 32, 7, starts=(9, 20)), packed(3, 24, 8), packed(1, 32, 9, starts=(30,))]


@torch.no_grad()
def naive(model, batches):
    """Thresholds by a whole forward of all batches for each routed layer, from the first on."""
    rule = model.config.selection_rule
    for place, router in enumerate(model.model.routers.values()):
        seen = []
        watched = router if rule == "threshold" else router.predictor
        hook = watched.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append(
                output if torch.is_tensor(output) else output[1].score
            )
        )
        torch.manual_seed(0)
        for batch in batches:
            model.model(**batch, use_cache=False)
        hook.remove()
        scores = torch.cat([each.flatten() for each in seen])
        model.routing_state.set_threshold(rule, place, score_quantile(scores, model.config.capacity, None))
    return model.routing_state.thresholds[KINDS[rule]].clone()


@pytest.mark.parametrize("capacity", [0.3, 1.0])
@pytest.mark.parametrize("case", CALIBRATED)
def test_thresholds_are_those_of_one_forward_for_each_layer(case, capacity):
    model = calibrated_case(case, capacity=capacity, num_hidden_layers=7)
    expected = naive(model, BATCHES)
    model = calibrated_case(case, capacity=capacity, num_hidden_layers=7)
    fractions, _ = calibrate(model, BATCHES)
    kind = KINDS[model.config.selection_rule]
    torch.testing.assert_close(model.routing_state.thresholds[kind], expected, atol=1e-6, rtol=1e-6)
    assert not model.routing_state.weights[kind].any() and not model.training
    size = sum(batch["input_ids"].numel() for batch in BATCHES)
    assert list(fractions) == [1, 3, 5]
    assert all(value == pytest.approx(capacity, abs=1.5 / size) for value in fractions.values())


@pytest.mark.parametrize("case", CALIBRATED)
def test_at_full_capacity_all_is_computed_and_counted(case):
    model = calibrated_case(case, capacity=1.0)
    assert set(calibrate(model, BATCHES)[0].values()) == {1.0}
    for batch in (*BATCHES, packed(2, 32, 9)):
        routing = model(**batch, use_cache=False).routing
        assert all(result.selected.all() for result in routing.values())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mod", {"selection_rule": "predictor", "predictor_weight": 0.01}),
        ("mod", {"selection_rule": "topk"}),
        ("stt", {"targets": "threshold"}),
    ],
)
def test_what_selects_no_fixed_fraction_is_left_alone(architecture, options):
    model = tiny_model(architecture, **options)
    assert calibrate(model, BATCHES) == ({}, {}) and model.routing_state.fresh


@pytest.mark.parametrize("case", CALIBRATED)
def test_each_layer_runs_once_for_each_token(case):
    model = calibrated_case(case, num_hidden_layers=7)
    seen = [0] * 7
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _, inputs, output, layer=layer: seen.__setitem__(
                layer, seen[layer] + inputs[0].shape[0] * inputs[0].shape[1]
            )
        )
    calibrate(model, BATCHES)
    size = sum(batch["input_ids"].numel() for batch in BATCHES)
    assert seen[0] == seen[2] == seen[4] == size and seen[5] == seen[6] == 0
    assert 0 < seen[1] < size and 0 < seen[3] < size


@pytest.mark.parametrize("case", CALIBRATED)
def test_flops_agree_within_one_percent(case):
    architecture, options = CASES[case]
    size = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "num_hidden_layers": 5}
    model = tiny_model(architecture, attention="eager", **size, **options)
    batch = packed(1, 128, 3)  # one row: the widest of several ragged rows would be counted for all
    with FlopCounterMode(display=False) as counter:
        fractions, keys = calibrate(model, [batch])
    expected = calibration_flops(model.config, 128, fractions, keys).total()
    assert expected == pytest.approx(counter.get_total_flops() / 128, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("case", CALIBRATED)
def test_scores_of_uneven_rows_are_charged_row_by_row(case):
    model, batch = calibrated_case(case), packed(8, 32, 7)
    config = model.config
    charged = calibration_flops(config, 32, *calibrate(model, [batch]))["scores"]
    selected = model.model(**batch, use_cache=False).routing[1].selected
    rows = [calibration_flops(config, 32, {1: row.double().mean().item()})["scores"] for row in selected]
    assert len(set(rows)) > 1
    assert charged == pytest.approx(sum(rows) / 8)


def test_the_benchmark_of_the_rules_calibrates_as_a_run_ends(make_settings, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 4 * 32)
    run_dir = train(make_settings("sdt", model={"capacity": 0.5}), data_dir, tmp_path / "run")
    expected = evaluate_heldout(load_run(run_dir), load_split(data_dir, "test"), 4)
    measured = rules.measure(run_dir, data_dir, "threshold", 4, 0)
    assert measured.loss == pytest.approx(expected.loss, rel=1e-6)
    assert measured.fraction == pytest.approx(expected.realised.fraction.mean)


def test_text_is_bounded_and_spread_over_the_split(data_dir, monkeypatch):
    split = load_split(data_dir, "validation")
    assert len(calibration_rows(split, 32)) == len(split) > 8
    monkeypatch.setattr(calibration, "CALIBRATION_TOKENS", 4 * 32)
    rows = calibration_rows(split, 32)
    places = [
        next(i for i in range(len(split)) if (split.input_ids(i) == rows.input_ids(row)).all())
        for row in range(len(rows))
    ]
    assert places == [0, len(split) // 4, 2 * len(split) // 4, 3 * len(split) // 4]


def lines(run):
    return list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("architecture", ALL)
def test_the_last_evaluation_is_that_of_the_finished_model(architecture, make_settings, data_dir, tmp_path):
    settings = make_settings(architecture, training={"eval_every": 3})
    run = train(settings, data_dir, tmp_path / "run")
    told = [line for line in lines(run) if "eval/loss" in line]
    assert [line["step"] for line in told] == [3, 6]
    again = evaluate_heldout(load_run(run), load_split(data_dir, "validation"), settings.data.batch_size)
    assert told[-1]["eval/loss"] == again.loss
    for layer, fraction in again.routed_fraction.items():
        assert told[-1][f"routing/layer_{layer}/eval_fraction"] == fraction


@pytest.mark.parametrize("architecture", ALL)
def test_calibration_is_charged_and_changes_no_number_of_steps(
    architecture, make_settings, data_dir, tmp_path
):
    run = train(make_settings(architecture), data_dir, tmp_path / "run")
    manifest = read_manifest(run)
    trained = [line["training_flops"] for line in lines(run) if "train/loss" in line][-1]
    assert manifest["training_steps"] == 6
    charged = manifest["training_flops"] - trained
    if architecture not in ROUTED:
        assert charged == 0
        return
    model, split = load_run(run), load_split(data_dir, "validation")
    work = calibrate(model, batches_of(split, 4))
    size = 32 * len(split)
    assert charged == pytest.approx(size * calibration_flops(model.config, 32, *work).total(), rel=1e-6)
    assert lines(run)[-1]["training_flops"] == manifest["training_flops"]


def test_equal_flops_budgets_hold_the_calibration(make_settings, data_dir, tmp_path):
    spent, shares = [], []
    for architecture in ALL:
        settings = make_settings(architecture, training={"max_flops": 1.2e10, "log_every": 50})
        run = train(settings, data_dir, tmp_path / architecture)
        spent.append(read_manifest(run)["training_flops"])
        shares.append(
            1 - [line for line in lines(run) if "train/loss" in line][-1]["training_flops"] / spent[-1]
        )
    assert max(spent) / min(spent) < 1.02 and max(shares) > 0.02, shares  # else nothing was tried


def test_a_model_without_routed_layers_has_nothing_to_calibrate():
    assert calibrate(tiny_model("sdt", num_hidden_layers=1), BATCHES) == ({}, {})
