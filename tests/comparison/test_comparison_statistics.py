"""Intervals against hand-computed values, grouping of seeds, and the sceptic's checks."""

import math

import pytest
from synthetic_evaluations import make_run

from dynamic_transformers.comparison.statistics import (
    baseline_of,
    best_group,
    flops_spread,
    group_runs,
    mean_interval,
    ratio_to,
    warnings,
)

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


def test_groups_come_in_fixed_order_with_variants_named():
    runs = [
        make_run("stt"),
        make_run("mod", 0, "topk"),
        make_run("mod", 1),
        make_run("standard"),
        make_run("mod"),
        make_run("sdt", rule="even"),  # a control says so even where nothing else is of its architecture
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups] == [
        "Standard",
        "MoD (threshold)",
        "MoD (topk) – non-causal upper bound",
        "SDT (even)",
        "STT",
    ]
    assert [[run["seed"] for run in group.runs] for group in groups] == [[0], [0, 1], [0], [0], [0]]


def test_another_training_rule_is_another_group_and_named():
    runs = [make_run("mod", training_rule="threshold"), make_run("mod"), make_run("stt", rule="random")]
    runs.append(make_run("sdt", training_rule="threshold"))
    assert [group.label for group in group_runs(runs)] == [
        "MoD (threshold)",
        "MoD (threshold, trained by threshold)",
        "SDT (trained by threshold)",
        "STT (random)",
    ]


def test_best_needs_separated_intervals():
    apart = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    apart += [with_loss("mod", s, 4.10 + 0.001 * s) for s in range(3)]
    best = best_group(group_runs(apart))
    assert best is not None and best.architecture == "mod"

    touching = [with_loss("standard", s, 4.20 + 0.05 * s) for s in range(3)]
    touching += [with_loss("mod", s, 4.19 + 0.05 * s) for s in range(3)]
    assert best_group(group_runs(touching)) is None

    one_seed_each = [with_loss("standard", 0, 4.2), with_loss("mod", 0, 3.9)]
    assert best_group(group_runs(one_seed_each)) is None


def test_non_causal_is_never_best_and_does_not_stand_in_the_way():
    runs = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    runs += [with_loss("mod", s, 4.10 + 0.001 * s) for s in range(3)]
    runs += [with_loss("stt", s, 3.50 + 0.001 * s, rule="topk") for s in range(3)]
    best = best_group(group_runs(runs))
    assert best is not None and best.architecture == "mod"


def test_no_best_without_equal_work():
    runs = [with_loss("standard", s, 4.20 + 0.001 * s) for s in range(3)]
    runs += [with_loss("mod", s, 4.10 + 0.001 * s, flops=1.3e13) for s in range(3)]
    assert best_group(group_runs(runs)) is None


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.019, False), (1.021, True), (0.9, True)])
def test_warning_at_two_per_cent_of_training_flops(factor, warned):
    runs = [make_run("standard", flops=1e13), make_run("mod", flops=factor * 1e13)]
    assert flops_spread(runs) == pytest.approx(max(factor, 1 / factor) - 1)
    assert any("not an isoFLOP comparison" in warning for warning in warnings(runs)) is warned


def test_warning_when_test_splits_differ():
    runs = [make_run("standard"), make_run("mod")]
    assert not any("same split" in warning for warning in warnings(runs))
    runs[1]["reference"]["test_sha256"] = "b" * 64
    assert any("same split" in warning for warning in warnings(runs))


def test_warning_when_a_layer_misses_its_target():
    run = make_run("mod")
    assert not any("misses" in warning for warning in warnings([run]))
    run["efficiency"]["routed_fraction"]["5"]["eval"] = 0.31
    assert any("layer 5 routes 0.310" in warning for warning in warnings([run]))


def test_ratios_pair_the_seeds():
    runs = [make_run(architecture, seed) for architecture in ("standard", "mod") for seed in range(2)]
    for run, speed in zip(runs, (100.0, 200.0, 150.0, 300.0), strict=True):
        run["efficiency"]["prefill_tokens_per_second"] = speed
    groups = group_runs(runs)
    key = "efficiency.prefill_tokens_per_second"
    ratio = ratio_to(groups[1], baseline_of(groups), key)
    inverse = ratio_to(groups[1], baseline_of(groups), key, inverse=True)
    assert ratio is not None and inverse is not None
    # Paired, both seeds say 1.5: no spread, although the speeds differ by a factor of two.
    assert (ratio.mean, ratio.half_width) == (1.5, 0.0)
    assert inverse.mean == pytest.approx(1 / 1.5)
    assert ratio_to(groups[1], None, key) is None
