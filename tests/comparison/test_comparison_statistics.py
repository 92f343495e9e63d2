"""Intervals against hand-computed values, grouping of seeds, and the sceptic's checks."""

import math

import pytest
from synthetic_evaluations import make_run

from dynamic_transformers.comparison.statistics import (
    Comparison,
    group_runs,
    mean_interval,
    ratio_to,
    warnings,
)
from dynamic_transformers.comparison.tables import differences

# 97.5 % quantiles of Student's t by number of seeds, from a printed table.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def with_loss(architecture, seed, loss, **keywords):
    run = make_run(architecture, seed, **keywords)
    run["eval"]["loss"] = loss
    return run


@pytest.mark.parametrize("count", T_QUANTILES)
def test_interval_follows_the_table_of_students_t(count):
    values = [float(value) for value in range(count)]
    interval = mean_interval(values)
    assert interval is not None and interval.half_width is not None
    # The sample variance of 0..n−1 is n(n+1)/12.
    expected = T_QUANTILES[count] * math.sqrt((count + 1) / 12)
    assert interval.mean == pytest.approx((count - 1) / 2)
    assert interval.half_width == pytest.approx(expected, rel=3e-4)


def test_one_seed_has_no_interval_and_nulls_are_left_out():
    single = mean_interval([None, 3.0, None])
    assert single is not None
    assert (single.mean, single.half_width, single.count) == (3.0, None, 1)
    assert mean_interval([None]) is None


def test_groups_stand_in_the_order_of_their_first_runs():
    runs = [
        make_run("stt"),
        make_run("mod", 0, "topk", variant="bound"),
        make_run("mod", 1),
        make_run("standard"),
        make_run("mod"),
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups] == ["stt", "bound – non-causal upper bound", "mod", "standard"]
    assert [[run["seed"] for run in group.runs] for group in groups] == [[0], [0], [0, 1], [0]]
    assert [group.place for group in groups] == [0, 1, 2, 3]


def test_points_of_the_grid_are_groups_of_their_own_beside_their_own_baseline():
    runs = [
        make_run(name, seed, point={"model.size": size})
        for size in ("tiny", "small")
        for name in ("standard", "mod")
        for seed in range(2)
    ]
    comparison = Comparison.of(runs, "standard")
    labels = ["standard, size tiny", "mod, size tiny", "standard, size small", "mod, size small"]
    assert [group.label for group in comparison.groups] == labels
    assert [(group.place, group.line) for group in comparison.groups] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    baselines = [comparison.baseline_of(group) for group in comparison.groups]
    assert [other and other.label for other in baselines] == [None, labels[0], None, labels[2]]


def test_equal_work_is_asked_of_the_runs_of_one_point():
    runs = [
        make_run(name, flops=flops, point={"training.max_flops": flops})
        for flops in (1e12, 2e12)
        for name in ("standard", "mod")
    ]
    assert Comparison.of(runs, "standard").equal_work
    runs[3]["training_flops"] *= 1.03
    assert not Comparison.of(runs, "standard").equal_work


def test_the_dense_model_of_equal_cost_is_the_nearest_in_forward_flops():
    runs = [make_run("standard"), make_run("mod"), make_run("sdt")]  # cost 1, 0.6, 0.78
    assert Comparison.of(runs, "standard").equal_cost_of(group_runs(runs)[1]) is None  # the baseline alone
    for variant, ratio in (("shallow", 0.5), ("medium", 0.8)):
        runs.append(make_run("standard", variant=variant))
        runs[-1]["efficiency"]["forward_flops_per_token"] *= ratio
    comparison = Comparison.of(runs, "standard")
    nearest = [comparison.equal_cost_of(group) for group in comparison.groups]
    assert [other and other.label for other in nearest] == [None, "shallow", "medium", None, None]


def best(runs):
    comparison = Comparison.of(runs, "standard")
    return [group.label for group in comparison.groups if comparison.is_best(group)]


def test_best_needs_separated_intervals():
    apart = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    apart += [with_loss("mod", s, 4.10 + 0.001 * s) for s in range(3)]
    assert best(apart) == ["mod"]

    touching = [with_loss("standard", s, 4.20 + 0.05 * s) for s in range(3)]
    touching += [with_loss("mod", s, 4.19 + 0.05 * s) for s in range(3)]
    assert best(touching) == []

    one_seed_each = [with_loss("standard", 0, 4.2), with_loss("mod", 0, 3.9)]
    assert best(one_seed_each) == []
    assert best(apart[:3]) == []  # nothing beside it


def test_non_causal_is_never_best_and_does_not_stand_in_the_way():
    runs = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    runs += [with_loss("mod", s, 4.10 + 0.001 * s) for s in range(3)]
    runs += [with_loss("stt", s, 3.50 + 0.001 * s, rule="topk") for s in range(3)]
    assert best(runs) == ["mod"]


def test_no_best_without_equal_work():
    runs = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    runs += [with_loss("mod", s, 4.10 + 0.001 * s, flops=1.3e13) for s in range(3)]
    assert best(runs) == []


def test_differences_are_paired_over_the_seeds_that_both_have():
    runs = [with_loss("standard", seed, 4.0 + 0.1 * seed) for seed in range(4)]
    runs += [with_loss("mod", seed, 3.9 + 0.1 * seed) for seed in (1, 2, 3, 7)]
    found = {entry["metric"]: entry for entry in differences(Comparison.of(runs, "standard"))}
    loss = found["eval.loss"]
    assert (loss["variant"], loss["point"], loss["pairs"]) == ("mod", {}, 3)
    assert loss["mean"] == pytest.approx(-0.1)
    # The seeds differ by 0.1 among themselves; the pairs by nothing.
    assert loss["interval"] == pytest.approx([-0.1, -0.1])
    assert {"eval.bits_per_byte", "bench.dt_cloze.acc"} < set(found)
    single = differences(Comparison.of([runs[1], runs[4]], "standard"))
    assert single[0]["interval"] is None and single[0]["pairs"] == 1
    assert differences(Comparison.of(runs, None)) == []


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.019, False), (1.021, True), (0.9, True)])
def test_warning_at_two_per_cent_of_training_flops(factor, warned):
    runs = [make_run("standard", flops=1e13), make_run("mod", flops=factor * 1e13)]
    assert Comparison.of(runs, "standard").flops_spread == pytest.approx(max(factor, 1 / factor) - 1)
    assert (
        any("not an isoFLOP comparison" in warning for warning in warnings(Comparison.of(runs, None)))
        is warned
    )


def test_warning_when_test_splits_differ():
    runs = [make_run("standard"), make_run("mod")]
    assert not any("same split" in warning for warning in warnings(Comparison.of(runs, None)))
    runs[1]["reference"]["test_sha256"] = "b" * 64
    assert any("same split" in warning for warning in warnings(Comparison.of(runs, None)))


@pytest.mark.parametrize(
    ("key", "words"),
    [("tokenizer_sha256", "different tokenizers"), ("data_digest", "trained on different data")],
)
def test_warning_when_tokenizers_or_data_differ(key, words):
    runs = [make_run("standard"), make_run("mod"), make_run("mod", 1)]
    told = [sentence for sentence in warnings(Comparison.of(runs, None)) if words in sentence]
    assert told == []
    runs[1]["reference"][key] = "b" * 64
    assert any(words in sentence for sentence in warnings(Comparison.of(runs, None)))


def test_another_seed_may_have_data_of_its_own():
    runs = [make_run(name, seed) for name in ("standard", "mod") for seed in range(2)]
    for run in runs:
        run["reference"]["data_digest"] = str(run["seed"]) * 64
    assert not any("different data" in sentence for sentence in warnings(Comparison.of(runs, None)))


def test_warning_when_a_layer_misses_its_target():
    run = make_run("mod")
    assert not any("misses" in warning for warning in warnings(Comparison.of([run], None)))
    run["efficiency"]["routed_fraction"]["5"]["eval"] = 0.31
    assert any("layer 5 routes 0.310" in warning for warning in warnings(Comparison.of([run], None)))


def test_ratios_pair_the_seeds():
    runs = [make_run(architecture, seed) for architecture in ("standard", "mod") for seed in range(2)]
    for run, speed in zip(runs, (100.0, 200.0, 150.0, 300.0), strict=True):
        run["efficiency"]["prefill_tokens_per_second"] = speed
    baseline, group = group_runs(runs)
    key = "efficiency.prefill_tokens_per_second"
    ratio = ratio_to(group, baseline, key)
    inverse = ratio_to(group, baseline, key, inverse=True)
    assert ratio is not None and inverse is not None
    # Paired, both seeds say 1.5: no spread, although the speeds differ by a factor of two.
    assert (ratio.mean, ratio.half_width) == (1.5, 0.0)
    assert inverse.mean == pytest.approx(1 / 1.5)
    assert ratio_to(group, None, key) is None
