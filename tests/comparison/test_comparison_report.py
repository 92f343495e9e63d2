"""compare() end to end: files, contract, self-contained HTML, labels, and what it refuses."""

import json
import re

import pytest
from synthetic_evaluations import make_run, write_run, write_runs

from dynamic_transformers.comparison.compare import compare, print_comparison
from dynamic_transformers.comparison.plots import smoothed
from dynamic_transformers.comparison.report import summary
from dynamic_transformers.comparison.statistics import Comparison
from dynamic_transformers.comparison.tables import bench_table
from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data.preview import Excerpt, Part, Piece, Preview
from dynamic_transformers.data.preview_tables import Table
from dynamic_transformers.evaluation.evaluate import DATA
from dynamic_transformers.manifest import digest, read_manifest, write_json
from dynamic_transformers.settings import UserError
from dynamic_transformers.study import common, study_runs

PLOTS = ("loss_vs_flops", "bench", "efficiency", "routed_fraction")


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Report of the four architectures, one of them non-causal."""
    parent = tmp_path_factory.mktemp("four")
    runs = [make_run("standard"), make_run("mod"), make_run("sdt"), make_run("stt", 0, "topk")]
    return compare(write_runs(parent / "in", runs), parent / "report")


def test_writes_every_file_and_a_manifest(four):
    assert sorted(path.name for path in four.iterdir()) == sorted(
        [
            *(f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")),
            "comparison.json",
            "manifest.json",
            "report.html",
        ]
    )
    for name in PLOTS:
        assert (four / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (four / f"{name}.svg").read_text()
    manifest = read_manifest(four)
    assert manifest["step"] == "compare"
    assert list(manifest["inputs"]) == [f"{name}, seed 0" for name in ("standard", "mod", "sdt", "stt")]


def test_comparison_json_keeps_the_contract(four):
    comparison = json.loads((four / "comparison.json").read_text())
    assert set(comparison) == {"schema_version", "baseline", "runs", "differences"}
    assert (comparison["schema_version"], comparison["baseline"]) == (2, "standard")
    assert {entry["variant"] for entry in comparison["differences"]} == {"mod", "sdt", "stt"}
    assert [run["architecture"] for run in comparison["runs"]] == ["standard", "mod", "sdt", "stt"]
    expected = make_run("mod")
    del expected["schema_version"]
    expected["config_digest"] = digest(expected.pop("settings"))
    assert comparison["runs"][1] == expected


def test_printed_table_names_the_report(four, capsys):
    print_comparison(four)
    out = capsys.readouterr().out
    assert "standard" in out and "4.234" in out
    assert str(four / "report.html") in out


def test_html_fetches_nothing(four):
    html = (four / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html)
    assert len(sources) == 1 + len(PLOTS)
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<iframe", html)


def test_non_causal_is_labelled_wherever_it_appears(four):
    html = (four / "report.html").read_text()
    text = re.sub(r"<[^>]+>", " ", html[html.index("<body>") :])
    named = re.findall(r"\bstt\b(?! seed)(.{0,40}?upper bound)", text)
    assert len(named) >= 4  # summary, table, rules, lineage
    assert all(rest.strip().startswith("– non-causal upper bound") for rest in named)


def test_report_says_how_and_from_what(four):
    html = (four / "report.html").read_text()
    run = make_run("mod")
    for part in ("How these numbers were made", "multiply-add is 2 FLOPs", "dense teacher", "test split"):
        assert part in html
    for part in (run["model_dir"], digest(run["settings"]), run["mlflow_run_id"], "transformers 5"):
        assert part in html


def test_second_call_returns_the_finished_report(four, tmp_path):
    runs = [make_run("standard"), make_run("mod")]
    folders = write_runs(tmp_path / "in", runs)
    report = compare(folders, tmp_path / "report")
    made = (report / "report.html").stat().st_mtime_ns
    compare(folders, tmp_path / "report")
    assert (report / "report.html").stat().st_mtime_ns == made
    compare(folders, tmp_path / "report", force=True)
    assert (report / "report.html").stat().st_mtime_ns > made

    # An evaluation measured again has the same manifest digest, yet must reach the report.
    runs[1]["eval"]["loss"] = 4.011
    write_json(folders[1] / "evaluation.json", runs[1])
    assert "4.011" in (compare(folders, tmp_path / "report") / "report.html").read_text()


def test_a_speed_at_another_fraction_is_marked_and_told(tmp_path):
    run = make_run("stt")
    for work in run["efficiency"]["timed_routed_fraction"].values():
        work |= dict.fromkeys(work, 0.0)
    folders = write_runs(tmp_path / "in", [make_run("standard"), run])
    html = (compare(folders, tmp_path / "report") / "report.html").read_text()
    assert html.count("† stt: timed decoding computed 0.000 of the tokens") == 1
    assert "test split: math" in html and "dt_cloze" in html


def test_number_and_length_of_the_timed_prompts_are_told(tmp_path):
    runs = [make_run("standard"), make_run("mod"), make_run("mod", 1), make_run("stt")]
    for run in runs[:3]:
        run["efficiency"]["timed_prompts"] = {"number": 7, "prefill": 1984.0, "decode": 16.0}
    runs[3]["efficiency"]["timed_prompts"] = {"number": 7, "prefill": 1700.5}
    report = compare(write_runs(tmp_path / "in", runs), tmp_path / "report")
    html = " ".join((report / "report.html").read_text().split())
    told = (
        "standard, mod: 7 blocks of the test split, of each 1984 tokens at once (prefill), then 16 one at a "
        "time (decode); stt: 7 blocks of the test split, of each 1700.5 tokens at once (prefill)"
    )
    assert html.count(told) == 2  # below the picture, and how speed was measured


def test_unequal_work_is_said_plainly(tmp_path):
    folders = write_runs(tmp_path / "in", [make_run("standard"), make_run("mod", flops=1.4e13)])
    html = (compare(folders, tmp_path / "report") / "report.html").read_text()
    assert html.count("this is not an isoFLOP comparison") == 2  # summary, limits


def test_bare_evaluations_still_make_a_report(tmp_path):
    """One architecture, no benchmark, no decode, no history."""
    run = make_run("standard")
    run["bench"], run["bench_stderr"], run["history"] = {}, {}, []
    run["efficiency"] |= {"decode_tokens_per_second": None, "kv_bytes_per_token": None}
    run["mlflow_run_id"] = None
    report = compare([write_run(tmp_path / "in", run)], tmp_path / "report")
    assert all((report / f"{name}.png").stat().st_size > 1000 for name in PLOTS)
    assert "Every benchmark score" not in (report / "report.html").read_text()


def test_many_seeds_and_partly_missing_values(tmp_path):
    runs = [make_run(name, seed) for name in ("standard", "mod") for seed in range(5)]
    runs[7]["efficiency"]["decode_tokens_per_second"] = None
    runs[7]["bench"], runs[7]["bench_stderr"] = {}, {}
    for run in runs[:5]:
        del run["bench"]["dt_cloze"], run["bench"]["dt_perplexity_code"]
        run["efficiency"]["decode_tokens_per_second"] = None
    for fraction in runs[7]["efficiency"]["routed_fraction"].values():
        fraction |= {"train": None, "eval": None, "target": None}
    report = compare(write_runs(tmp_path / "in", runs), tmp_path / "report")
    assert "(seed 0, 1, 2, 3, 4)" in (report / "report.html").read_text()


def test_the_caption_says_by_which_rule_each_model_trained(tmp_path):
    runs = [make_run("standard"), make_run("mod")]
    runs.append(make_run("mod", training_rule="threshold", variant="by threshold"))
    runs += [make_run("sdt", rule="even"), make_run("stt")]
    report = compare(write_runs(tmp_path / "in", runs), tmp_path / "report")
    html = " ".join((report / "report.html").read_text().split())
    assert "mod, stt: topk, which is not causal" in html
    assert "by threshold: topk at first, then threshold, which is causal" in html
    assert "sdt: even, as in evaluation" in html


def test_without_a_routed_model_no_training_rule_is_named(tmp_path):
    report = compare(write_runs(tmp_path / "in", [make_run("standard")]), tmp_path / "report")
    assert "which is not causal" not in (report / "report.html").read_text()


def test_title_is_escaped(tmp_path):
    folder = write_run(tmp_path / "in", make_run("standard"))
    html = (compare([folder], tmp_path / "report", title="<b>a & b</b>") / "report.html").read_text()
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in html


def test_summary_states_the_difference():
    runs = [make_run("standard"), make_run("mod")]
    runs[0]["eval"]["loss"], runs[1]["eval"]["loss"] = 4.24, 4.21
    text = " ".join(summary(Comparison.of(runs, "standard")))
    assert "standard, the baseline, has a test loss of 4.240 nats per token." in text
    assert "mod takes 0.60 times the forward FLOPs of standard. Its test loss is 0.030 lower than" in text
    assert "trained with the same FLOPs" in text and "no difference is claimed" in text
    assert "dense model" not in text  # there is no other than the baseline


def test_summary_holds_a_routed_model_against_the_dense_one_of_equal_cost():
    runs = [make_run(name, seed) for seed in range(3) for name in ("standard", "mod")]
    runs += [make_run("standard", seed, variant="shallow") for seed in range(3)]
    for run in runs:
        loss = {"standard": 4.3, "mod": 4.25, "shallow": 4.2}[run["variant"]]
        run["eval"]["loss"] = loss + 0.1 * run["seed"] + 0.001 * (run["seed"] == 2)
        if run["variant"] == "shallow":
            run["efficiency"]["forward_flops_per_token"] *= 0.57
            run["eval"]["loss"] += 0.002 * (run["seed"] == 1)
    text = " ".join(summary(Comparison.of(runs, "standard")))
    assert "The dense model of equal cost is shallow, with 0.95 times the FLOPs of mod." in text
    # Paired: the difference is 0.05 but for 0.002 with one seed, though seeds lie 0.1 apart.
    told = "Its test loss is 0.049 higher than that of shallow (95 % interval over 3 seeds: 0.046 to 0.052)."
    assert told in text
    runs[-1]["eval"]["loss"] += 0.5
    assert "shallow, which 3 seeds do not tell from no difference" in " ".join(
        summary(Comparison.of(runs, "standard"))
    )
    assert "no difference is claimed" not in text


def test_summary_says_where_no_dense_model_costs_as_much():
    runs = [make_run("standard"), make_run("mod"), make_run("standard", variant="shallow")]
    runs[2]["overrides"] = ["model.type=standard", "model.depth_factor=0.25"]
    runs[2]["efficiency"]["forward_flops_per_token"] *= 0.3
    text = " ".join(summary(Comparison.of(runs, "standard")))
    assert "shallow (model.depth_factor=0.25) takes 0.30 times" in text
    assert "No dense model here costs as much" in text and "the nearest is standard, with 1.67 times" in text
    # Where the baseline is the dense model of equal cost, the comparison stands there once.
    text = " ".join(
        summary(Comparison.of([*runs[:2], runs[2] | {"efficiency": runs[1]["efficiency"]}], "shallow"))
    )
    assert "The dense model of equal cost is shallow, with 1.00 times" in text
    assert (
        text.count("than that of shallow") + text.count("is that of shallow") == 2
    )  # of standard and of mod


def test_smoothing_is_centred_and_keeps_the_length():
    assert smoothed([0.0, 0.0, 5.0, 0.0, 0.0], 5) == [5 / 3, 1.25, 1.0, 1.25, 5 / 3]


def put(run, key, value):
    *parents, last = key.split(".")
    for part in parents:
        run = run[part]
    run[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 1, "schema_version is 1, must be 2"),
        ("architecture", "rnn", "architecture is rnn"),
        ("eval.loss", float("nan"), "eval.loss is nan"),
        ("eval", {}, "has no key eval.loss"),
        ("eval.causal", True, "looks at later tokens"),
    ],
)
def test_malformed_evaluations_are_refused(tmp_path, key, value, message):
    run = make_run("mod", 0, "topk")
    put(run, key, value)
    with pytest.raises(UserError, match=message):
        compare([write_run(tmp_path / "in", run)], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_wrong_sets_of_evaluations_are_refused(tmp_path):
    with pytest.raises(UserError, match="no evaluation given"):
        compare([], tmp_path / "report")
    with pytest.raises(UserError, match="no such folder"):
        compare([tmp_path / "nowhere"], tmp_path / "report")
    twice = write_runs(tmp_path / "twice", [make_run("mod"), make_run("mod")])
    with pytest.raises(UserError, match="2 evaluations of mod, seed 0"):
        compare(twice, tmp_path / "report")


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    folder = write_run(tmp_path / "in", make_run("standard"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="name an empty or new folder"):
        compare([folder], tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_a_study_can_be_made_again_from_its_report(tmp_path):
    settings = compose_settings("quickstart", ["run.output_dir=elsewhere"])
    study = study_runs(
        compose_settings("quickstart", ["study.grid={run.seed: [0, 3], model.size: [micro, tiny]}"])
    )
    runs = []
    for run in study:
        point = {key: value for key, value in run.point.items() if key != "run.seed"}
        made = make_run(run.settings.model.type, run.settings.run.seed, variant=run.variant, point=point)
        runs.append(made | {"overrides": run.settings.study.overrides})
    report = compare(write_runs(tmp_path / "in", runs), tmp_path / "report", settings=common(settings))
    again = compose_settings("study", config_dir=report)
    assert sorted(run.name for run in study_runs(again)) == sorted(run.name for run in study)
    assert {run.name: run.settings.model for run in study_runs(again)} == {
        run.name: run.settings.model for run in study
    }
    assert "--config-dir . --config-name study" in (report / "report.html").read_text()


def test_a_score_that_guessing_reaches_is_marked():
    runs = [make_run("standard"), make_run("mod")]
    for run, score in zip(runs, (0.30, 0.45), strict=True):
        run["bench"]["dt_arithmetic"]["acc"] = score  # standard error 0.055
    rows = {row[0]: row[2:] for row in bench_table(Comparison.of(runs, None))[1] if row[1] == "acc"}
    assert rows["dt_arithmetic"] == ["0.300 (0.055) ≈ chance", "0.450 (0.055)"]


def write_data(folder, digest):
    """Write the preview of data as `evaluate` does."""
    piece = Piece("web", True, False, [Part("<|endoftext|>", False), Part("a <b> & c", True)])
    table = Table("Documents", ["source", "in"], [["web", "1,234"]], "what they mean")
    record = {"source": "web", "file": "a.jsonl", "row": 7, "reason": "int instead of str", "record": "5"}
    preview = Preview(digest, ["source web: read 9 times"], [table], 1, [record], [Excerpt(0, 0, 9, [piece])])
    write_json(folder / DATA, preview.to_dict())


def test_the_report_shows_each_data_once_with_its_runs(tmp_path):
    runs = [make_run(name, seed) for name in ("standard", "mod") for seed in (0, 1)]
    folders = write_runs(tmp_path / "in", runs)
    for folder, run in zip(folders, runs, strict=True):
        write_data(folder, f"{run['seed']}" * 64)
    html = (compare(folders, tmp_path / "report") / "report.html").read_text()
    assert [line for line in html.splitlines() if line.startswith("<summary>") and "seed" in line] == [
        f"<summary>standard, seed {seed}; mod, seed {seed}: <code>{f'{seed}' * 12}</code></summary>"
        for seed in (0, 1)
    ]
    for told in (
        "1,234",
        "source web: read 9 times",
        "a.jsonl, row 7",
        "<s>&lt;|endoftext|&gt;</s>a &lt;b&gt;",
    ):
        assert html.count(told) == 2
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html)
    assert all(source.startswith("data:") for source in sources) and "<script" not in html


def test_evaluations_of_an_older_version_have_no_data_to_show(four):
    assert "<h2>Data</h2>" not in (four / "report.html").read_text()


def test_a_damaged_preview_is_refused(tmp_path):
    folder = write_run(tmp_path / "in", make_run("standard"))
    (folder / DATA).write_text('{"digest": "d"}')
    with pytest.raises(UserError, match=r"data.json: damaged, or of another version"):
        compare([folder], tmp_path / "report")
