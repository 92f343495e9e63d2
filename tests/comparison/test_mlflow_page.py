"""The page that `make mlflow-ui` links to, as a browser draws it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlflow
import psutil
import pytest
from synthetic_evaluations import make_run, write_run

from dynamic_transformers.comparison.compare import compare
from dynamic_transformers.comparison.plots import COLOURS
from dynamic_transformers.comparison.tracked import track_report
from dynamic_transformers.settings import Settings, TrackingSettings
from dynamic_transformers.tracking import RunTracker, view_of
from dynamic_transformers.tracking.inputs import USED, WHAT_IS_READ

VARIANTS = {"standard": "standard", "routed twelfth": "mod", "sdt": "sdt", "students": "stt"}
POINTS = ({"training.max_flops": 1e13}, {"training.max_flops": 2e13})
MANIFEST = {
    "splits": {},
    "sources": [{"name": "web", **dict.fromkeys(USED, 1)}],
    "config": {
        "dataset_configs": [{"name": "web", **dict.fromkeys(WHAT_IS_READ), "path": "json"}],
        "fingerprints": {"web": None},
    },
}
NAMES = [f"{variant}, max_flops {point}" for point in ("1e+13", "2e+13") for variant in VARIANTS]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, module_settings):
    """An output folder with a comparison of four variants at two points, tracked as the pipeline does it."""
    folder = tmp_path_factory.mktemp("page") / "outputs"
    settings = module_settings
    settings.run.output_dir, settings.run.name = str(folder), "study"
    settings.tracking = TrackingSettings()
    evaluations = []
    for point in POINTS:
        for variant, architecture in VARIANTS.items():
            run = make_run(architecture, variant=variant, point=point, flops=point["training.max_flops"])
            run_dir = folder / f"run{len(evaluations)}"
            run_dir.mkdir(parents=True)
            tracker = RunTracker(run_dir, settings.tracking, folder, f"study-{len(evaluations)}")
            for row in run["history"]:
                tracker.log(row["step"], {key: value for key, value in row.items() if key != "step"})
            figures = {"test/loss": run["eval"]["loss"], "test/bits_per_byte": run["eval"]["bits_per_byte"]}
            for task, metrics in run["bench"].items():
                figures |= {f"bench/{task}/{name}": value for name, value in metrics.items()}
            tracker.log_data(Path("data"), MANIFEST | {"content_digest": run["reference"]["data_digest"]})
            tracker.log_final(run["training_tokens"], figures)
            (run_dir / "model").mkdir()
            (run_dir / "model" / "weights").write_text(variant)
            tracker.log_artifacts(run_dir / "model", "model")
            assert tracker.close("FINISHED")
            evaluations.append(write_run(run_dir / "evaluation", run | {"mlflow_run_id": tracker.run_id}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamic_transformers.comparison.compare.measure", lambda *arguments: None)
        report = compare(evaluations, folder / "study" / "report")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name(settings.tracking.experiment).experiment_id
    runs = client.search_runs([experiment])
    # KFP hangs the runs that it gives to tasks under one of its own: the page shows them all the same.
    above = client.create_run(experiment).info.run_id
    for run in runs:
        client.set_tag(run.info.run_id, "mlflow.parentRunId", above)
    track_report(settings, "study", report)
    return folder


@pytest.fixture(scope="module")
def module_settings():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        yield Settings()


@pytest.fixture(scope="module")
def page(outputs):
    """Process of `make mlflow-ui`, and the link that it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "dynamic_transformers.tracking.ui", "--port", str(port)],
        cwd=outputs.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"DISPLAY": "", "WAYLAND_DISPLAY": ""},
    )
    assert server.stdout
    line = server.stdout.readline()
    yield server, re.search(rf"http://127.0.0.1:{port}/#\S+", line)[0]
    server.send_signal(signal.SIGINT)
    server.wait(timeout=30)


def drawn(link, folder, *options):
    """The document of a page once its scripts have drawn it."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder}", "--window-size=1900,6000", "--virtual-time-budget=60000"),
        *options,
    ]
    return subprocess.run([*command, "--dump-dom", link], capture_output=True, text=True, timeout=240).stdout


def cards_of(document):
    """Of each card: its metric and section, names and colours of its legend, drawn lines and bars."""
    for section in document.split('data-testid="experiment-view-compare-runs-section-header"')[1:]:
        heading, *cards = section.split('data-testid="experiment-view-compare-runs-card"')
        title = re.search(r">([^<>]*[^<>\s])(?: |<[^>]*>)*\(\d+\)", heading)
        for card in cards:
            metric = re.search(r">([a-z]+/[^<> (]+)<", card)
            legend = re.findall(
                r"stroke: rgb\((\d+), (\d+), (\d+)\);\"></path></svg><span[^>]*>([^<]*)", card
            )
            colours = {name: "#" + "".join(f"{int(part):02x}" for part in rgb) for *rgb, name in legend}
            lines, bars = (
                re.findall(r'js-line" d="M([^"]*)"', card),
                len(re.findall(r'<g class="point"', card)),
            )
            yield title and title[1], metric and metric[1], colours, lines, bars


def test_every_variant_is_a_line_and_a_bar_in_its_colour(outputs, page, tmp_path):
    document = drawn(page[1], tmp_path, f"--screenshot={outputs.parent}/page.png")
    cards = {(section, metric): shown for section, metric, *shown in cards_of(document)}
    colours = {name: COLOURS[index % 4] for index, name in enumerate(NAMES)}
    for loss in ("eval/loss", "train/loss"):
        for axis in ("training FLOPs", "tokens (step)"):
            legend, lines, _ = cards[f"Loss against {axis}", loss]
            assert legend == {f"{name} ({loss})": colour for name, colour in colours.items()}
            assert len(set(lines)) == len(NAMES)
            assert all(len(x) > 1 and x == sorted(x) for x in map(abscissas, lines))
    for metric in ("test/loss", "bench/dt_cloze/acc"):
        legend, _, bars = cards["Test and benchmarks", metric]
        assert legend == colours and bars == len(NAMES)
    legend, _, bars = cards["Efficiency", "efficiency/prefill_tokens_per_second"]
    assert legend == colours and bars == len(NAMES)


def abscissas(line):
    """Of the points of an SVG path that holds no curves."""
    return [float(point.split(",")[0]) for point in line.split("L")]


def test_the_link_is_that_of_the_report_and_no_idle_workers_run(outputs, page):
    server, link = page
    fragment = link.partition("/#")[2]
    assert view_of(TrackingSettings(), outputs) == f"#{fragment}"
    names = [" ".join(child.cmdline()) for child in psutil.Process(server.pid).children(recursive=True)]
    assert len(names) <= 4 and not any("huey" in name or "job" in name for name in names), names


def test_models_are_registered_with_their_figures_and_the_best_is_called_so(outputs):
    report = json.loads((outputs / "study" / "report" / "comparison.json").read_text())
    best = min(report["runs"], key=lambda run: run["eval"]["loss"])
    client = mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    version = client.get_model_version_by_alias("study", "best")
    assert version.run_id == best["mlflow_run_id"] and version.tags["digest"] == best["model_digest"]
    assert version.tags["variant"] == best["variant"] and version.tags["seed"] == "0"
    assert version.tags["point"] == f"max_flops {best['point']['training.max_flops']:g}"
    files = mlflow.artifacts.download_artifacts(
        client.get_model_version_download_uri("study", version.version)
    )
    assert (Path(files) / "weights").read_text() == best["variant"]
    model = client.get_logged_model(version.tags["logged_model"])
    assert str(model.status) == "READY" and model.source_run_id == version.run_id
    figures = {metric.key: metric.value for metric in model.metrics}
    assert figures["test/loss"] == best["eval"]["loss"]
    assert figures["efficiency/kv_bytes_per_token"] == best["efficiency"]["kv_bytes_per_token"]
    assert {metric.dataset_digest for metric in model.metrics} == {"c" * 36}  # not that of a source
    # Nothing twice: neither in the run, nor by a second comparison.
    assert len(client.get_metric_history(version.run_id, "test/loss")) == 1
    assert len(client.search_model_versions("name = 'study'")) == len(NAMES)


def test_a_second_comparison_makes_no_model_again(outputs, module_settings):
    client = mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    track_report(module_settings, "study", outputs / "study" / "report")
    models = client.search_logged_models(["1"])
    assert len(models) == len(client.search_model_versions("name = 'study'")) == len(NAMES)
    run = client.get_run(models[0].source_run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [models[0].model_id]
