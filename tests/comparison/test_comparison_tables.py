"""The table as text: formats, intervals, labels, bold, warnings."""

import io

import pytest
from rich.console import Console
from synthetic_evaluations import make_run

from dynamic_transformers.comparison.statistics import Comparison, group_runs, mean_interval
from dynamic_transformers.comparison.tables import (
    LOSS_HEADER,
    TERMINAL_HEADERS,
    TIMED_HEADER,
    bench_table,
    bench_value,
    headline_metric,
    main_table,
    realised_table,
    render_realised_table,
    render_table,
    si,
    with_interval,
)


def of(runs):
    return Comparison.of(runs, "standard")


def said(comparison):
    """All sentences below the table."""
    table = main_table(comparison)
    return " ".join((*table.caption, *table.warnings))


def cell(table, label, header):
    row = next(row for row in table.rows if row.label == label)
    return row.cells[table.headers.index(header) - 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234e13, "12.3 T"), (999.6, "1.00 k"), (1000, "1.00 k"), (17, "17"), (2_468_352, "2.47 M"), (0, "0")],
)
def test_si(value, text):
    assert si(value) == text


def test_seeds_show_mean_and_interval_and_one_seed_shows_the_mean():
    runs = [make_run("standard", seed) for seed in range(3)]
    for run, loss in zip(runs, (4.0, 4.1, 4.2), strict=True):
        run["eval"]["loss"] = loss
    # t(2) · s / √3 = 4.303 · 0.1 / 1.732
    assert cell(main_table(of(runs)), "standard", LOSS_HEADER) == "4.100 ± 0.248"
    assert cell(main_table(of(runs[:1])), "standard", LOSS_HEADER) == "4.000"
    assert with_interval(mean_interval([None]), 3) == "–"


def test_caption_states_single_seeds_and_unequal_work():
    caption = said(of([make_run("standard"), make_run("mod", flops=1.4e13)]))
    assert "1 seed: differences are not significant by themselves" in caption
    assert "13.5 %" in caption and "not an isoFLOP comparison" in caption
    caption = said(of([make_run("standard", 0), make_run("standard", 1)]))
    assert "significant" not in caption and "isoFLOP" not in caption


def test_nulls_are_dashes():
    run = make_run("mod")
    run["efficiency"]["decode_tokens_per_second"] = None
    run["efficiency"]["kv_bytes_per_token"] = None
    table = main_table(of([run]))
    for header in ("decode tok/s", "KV bytes/token", "FLOPs ratio", "prefill tok/s ratio"):
        assert cell(table, "mod", header) == "–"


def test_unigram_is_the_last_row():
    row = main_table(of([make_run("standard")])).rows[-1]
    assert row.label == "unigram" and "5.873" in row.cells


def test_terminal_table_fits_80_columns_and_cuts_nothing():
    runs = [make_run(name, seed) for name in ("standard", "mod", "sdt", "stt") for seed in range(3)]
    runs += [make_run("mod", seed, "topk", variant="mod by topk") for seed in range(3)]
    for seed in range(3):
        runs[3 + seed]["eval"]["loss"] = 3.9 + 0.001 * seed
    console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(render_table(of(runs)))
    text = console.file.getvalue()
    assert "…" not in text
    assert "\x1b[1m 3.901\x1b[0m" in text  # bold: separated
    assert text.index("standard") < text.index("mod") < text.index("sdt") < text.index("stt")
    for part in ("non-causal", "upper bound", "3 seeds", "unigram", "±0.002"):
        assert part in text
    assert set(main_table(of(runs)).headers) - set(TERMINAL_HEADERS) == {
        "variant",
        "seeds",
        "forward FLOPs/token",
    }
    console = Console(width=80, file=io.StringIO())
    console.print(render_realised_table(of(runs[:12])))
    text = console.file.getvalue()
    assert "…" not in text
    assert "test split: math" in text and "(0.013)" in text  # the spread over rows


def test_standard_error_does_not_shrink_with_seeds():
    groups = group_runs([make_run("mod", seed) for seed in range(4)])
    value, error = bench_value(groups[0], "dt_cloze", "acc")
    assert value is not None and value.count == 4
    assert error == pytest.approx(0.058)
    assert bench_value(groups[0], "no_such_task", "acc") == (None, None)


def test_headline_metric():
    assert headline_metric(["word_perplexity", "bits_per_byte"]) == "bits_per_byte"
    assert headline_metric(["acc_norm", "acc"]) == "acc"
    assert headline_metric(["bleu"]) is None


def test_what_is_computed_stands_beside_each_text():
    headers, rows = realised_table(of([make_run("standard"), make_run("sdt")]))
    assert headers == ["text", "standard: FLOPs/token", "sdt: routed (sd)", "sdt: FLOPs/token"]
    found = {text: cells for text, *cells in rows}
    domains = [f"test split: {name}" for name in ("prose", "code", "math")]
    assert list(found) == ["test split", *domains, "dt_cloze"]
    assert found["test split"] == ["5.43 M", "0.500 (0.150)", "4.24 M"]
    assert found["test split: math"][1] == "0.860 (0.050)"
    assert found["dt_cloze"] == ["5.20 M", "0.450 (0.100)", "4.06 M"]
    assert "routed_fraction" not in {metric for _, metric, *_ in bench_table(of([make_run("sdt")]))[1]}
    assert render_realised_table(of([make_run("standard")])) is None


def timed_at(architecture, prefill, decode, target=None):
    """A run whose timed forwards computed these fractions in each routed layer."""
    run = make_run(architecture)
    efficiency = run["efficiency"]
    if target is not None:
        efficiency["mean_routed_fraction"]["mean"] = target
        for layer in efficiency["routed_fraction"].values():
            layer |= {"target": target, "eval": target}
    efficiency["timed_routed_fraction"] = {
        work: dict.fromkeys(efficiency["routed_fraction"], fraction)
        for work, fraction in (("prefill", prefill), ("decode", decode))
    }
    return run


@pytest.mark.parametrize(
    ("fraction", "off"), [(0.0, True), (1.0, True), (0.39, True), (0.41, False), (0.59, False), (0.61, True)]
)
def test_speeds_timed_at_another_fraction_are_marked(fraction, off):
    """STT's capacity, and its fraction of the test split, is 0.5."""
    table = main_table(of([make_run("standard"), timed_at("stt", prefill=0.5, decode=fraction)]))
    assert cell(table, "stt", TIMED_HEADER) == f"0.500 / {fraction:.3f}"
    assert cell(table, "stt", "decode tok/s").endswith(" †") == off
    sentences = [sentence for sentence in table.warnings if sentence.startswith("† stt: timed decoding")]
    assert len(sentences) == off
    assert (
        not off
        or f"computed {fraction:.3f} of the tokens in routed layers, the test split 0.500" in sentences[0]
    )
    assert "†" not in cell(table, "stt", "prefill tok/s ratio") + cell(table, "standard", "decode tok/s")


def test_prefill_is_marked_by_itself_and_full_capacity_is_no_fault():
    table = main_table(of([make_run("standard"), timed_at("stt", prefill=0.1, decode=0.5)]))
    assert cell(table, "stt", "prefill tok/s ratio").endswith(" †")
    assert "†" not in cell(table, "stt", "decode tok/s")
    table = main_table(of([make_run("standard"), timed_at("stt", prefill=1.0, decode=1.0, target=1.0)]))
    assert "†" not in "".join([*table.warnings, *table.rows[1].cells])


@pytest.mark.parametrize(
    ("timed", "split", "off"),
    [(0.0, 0.25, True), (1.0, 0.75, True), (0.0, 0.0, False), (1.0, 1.0, False), (0.01, 0.25, False)],
)
def test_one_layer_at_none_or_all_is_marked_although_the_mean_is_right(timed, split, off):
    run = make_run("stt")
    layers = run["efficiency"]["timed_routed_fraction"]["decode"]
    layers["3"] = timed
    layers |= {layer: (4 * 0.5 - timed) / 3 for layer in layers if layer != "3"}
    run["efficiency"]["routed_fraction"]["3"]["eval"] = split
    table = main_table(of([make_run("standard"), run]))
    assert cell(table, "stt", TIMED_HEADER) == "0.520 / 0.500"
    assert cell(table, "stt", "decode tok/s").endswith(" †") == off
    which = "none" if timed == 0 else "all"
    told = f"† stt: timed decoding computed {which} of the tokens in routed layer 3, the test split {split}:"
    assert any(sentence.startswith(told) for sentence in table.warnings) == off
    assert "†" not in cell(table, "stt", "prefill tok/s ratio")


def test_a_rule_without_a_cache_has_no_timed_fraction_of_decoding():
    runs = [make_run("standard"), make_run("mod", rule="topk")]
    del runs[1]["efficiency"]["timed_routed_fraction"]["decode"]
    table = main_table(of(runs))
    assert [row.cells[table.headers.index(TIMED_HEADER) - 1] for row in table.rows] == ["–", "0.130 / –", "–"]


def test_runs_of_different_precision_are_told():
    runs = [make_run("standard"), make_run("mod")]
    assert "precisions" not in said(of(runs))
    runs[1]["eval"]["dtype"] = "bf16"
    assert "evaluated in different precisions (bf16, fp32)" in said(of(runs))
