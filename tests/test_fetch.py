"""`fetch` against a loopback hub: what it brings and says, how it goes on, and work from its folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from safetensors.torch import load_file, save_file

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.refusals import reason_of
from dynamic_transformers.settings import PROJECT_ROOT
from tests.data.hub_contents import card, parquet, push_model, push_sources, push_tasks
from tests.data.hub_server import Fault, HubServer

MODEL = "Qwen/Qwen2.5-0.5B"
SUITES = ("--tasks", "general,math,code", "--confirm_run_unsafe_code")
OFFLINE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}  # a port where nobody answers
NAMES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "HF_TOKEN_PATH")


def run(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, "HF_EVALUATE_OFFLINE")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT_ROOT,
        env=kept | {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0"} | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def fetch(hub, folder, *arguments, **environment):
    command = ("-m", "dynamic_transformers.cli", "fetch", "--output_dir", folder, *arguments)
    return run(*command, **{"HF_ENDPOINT": hub.url} | environment)


def items(folder):
    return json.loads((folder / "fetched.json").read_text())["items"]


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def paper_hub(model_dir):
    with HubServer() as hub:
        push_tasks(hub)
        push_sources(hub, compose_settings("paper", []))
        push_model(hub, MODEL, model_dir)
        yield hub


@pytest.fixture(scope="module")
def fetched(paper_hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fetched") / "hub %20 #ü"
    answer = fetch(paper_hub, folder, "--config-name", "paper", *SUITES)
    assert answer.returncode == 0, answer.stderr
    assert (
        f"offline: HF_HOME='{folder}' HF_HUB_OFFLINE=1 python train.py --config-name=paper" in answer.stdout
    )
    return folder


def test_what_is_needed_is_brought_and_nothing_else(fetched, paper_hub):
    found = items(fetched)
    kinds = [item["kind"] for item in found]
    sources = compose_settings("paper", []).data.dataset_configs
    assert kinds == ["tokenizer", "weights", *["source"] * len(sources), *["task"] * 14]
    for item in found:
        kind = "models" if item["kind"] in ("tokenizer", "weights") else "datasets"
        if item["kind"] != "task" or "/" in item["repository"]:
            assert item["commit"] == paper_hub.repositories[f"{kind}/{item['repository']}"].refs["main"]
        assert item["bytes"] == sum((fetched / file).stat().st_size for file in item["files"]) > 0
    assert not paper_hub.asked("original/consolidated|LICENSE|/all/")
    names = {Path(file).name for item in found[:2] for file in item["files"]}
    assert {"tokenizer.json", "vocab.json", "merges.txt", "config.json", "model.safetensors"} <= names
    assert len(paper_hub.asked("spaces/evaluate-metric/code_eval", "GET")) > 0


def test_a_second_fetch_asks_the_hub_for_nothing_but_what_is_missing(fetched, paper_hub, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(fetched, folder, symlinks=True)
    before = items(folder)
    lost = next(file for item in before if item["kind"] == "weights" for file in item["files"])
    (folder / lost).resolve().unlink()
    paper_hub.requests.clear()
    answer = fetch(paper_hub, folder, "--config-name", "paper", *SUITES)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("here already") == len(before) - 1
    assert {item["for"]: item for item in items(folder)} == {item["for"]: item for item in before}
    assert paper_hub.asked(MODEL) and not paper_hub.asked("datasets|spaces")


def test_the_suites_run_offline_from_the_folder(fetched, model_dir, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    weights = load_file(model / "model.safetensors")  # without which it ends every text at once
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, model / "model.safetensors")
    command = ("bench.py", "--model_path", model, *SUITES, "--limit", 1, "--batch_size", 8)
    answer = run(*command, HF_HOME=str(fetched), **OFFLINE)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((model / "results.json").read_text())["results"]
    assert {"arc_easy", "lambada_openai", "gsm8k", "mathqa", "humaneval", "mbpp"} <= results.keys()
    assert len(results) == 14


LOAD = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
print(len(AutoTokenizer.from_pretrained("{MODEL}")))
print(AutoModelForCausalLM.from_pretrained("{MODEL}").config.vocab_size)
"""


def test_models_are_found_offline(fetched):
    answer = run("-c", LOAD, HF_HOME=str(fetched), **OFFLINE)
    assert answer.returncode == 0, answer.stderr
    size, vocabulary = answer.stdout.splitlines()
    assert size == vocabulary


def test_a_fetched_folder_needs_no_hub_to_train(fetched, tmp_path, paper_overrides):
    place = f"run.output_dir={tmp_path}"
    arguments = ("train.py", "--config-name", "paper", *paper_overrides, place, "run.name=run")
    answer = run(*arguments, HF_HOME=str(fetched), **OFFLINE)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "run" / "final_model" / "config.json").is_file()


SETS = {"README.md": card({"all": {"train": "all/*"}, "small": {"train": "small/*", "test": "held/*"}})}
SETS |= {
    f"{name}/{i}.parquet": parquet([{"text": f"{name} {n}"} for n in range(100)])
    for i in range(4)
    for name in ("all", "small", "held")
}
SOURCE = "name: web, path: someone/web, config: small"


def test_the_files_of_a_source_are_those_of_its_configuration_split_and_revision(hub, tmp_path):
    first = hub.push("datasets", "someone/web", SETS, tag="v1")
    second = hub.push("datasets", "someone/web", {**SETS, "small/9.parquet": SETS["all/0.parquet"]})
    for more, commit, names in (
        ("revision: v1", first, ["small/0", "small/1", "small/2", "small/3"]),
        ("max_documents: 150", second, ["small/0", "small/1"]),
        ("split: 'test[:10%]'", second, ["held/0"]),
    ):
        folder = tmp_path / names[0][:4] / commit
        answer = fetch(hub, folder, f"data.dataset_configs=[{{{SOURCE}, {more}}}]")
        assert answer.returncode == 0, answer.stderr
        (item,) = items(folder)
        start = f"hub/datasets--someone--web/snapshots/{commit}/"
        assert [*item["files"]] == [f"{start}README.md", *(f"{start}{name}.parquet" for name in names)]


def test_what_is_there_stays_of_its_commit_though_the_hub_moves_on(hub, tmp_path):
    commit = hub.push("datasets", "someone/web", SETS)
    arguments = (tmp_path / "folder", f"data.dataset_configs=[{{{SOURCE}}}]")
    assert fetch(hub, *arguments).returncode == 0
    hub.push("datasets", "someone/web", {**SETS, "small/9.parquet": SETS["all/0.parquet"]})
    assert fetch(hub, *arguments).returncode == 0
    assert [item["commit"] for item in items(tmp_path / "folder")] == [commit]


@pytest.fixture(scope="module")
def model_files(paper_hub):
    (files,) = paper_hub.repositories[f"models/{MODEL}"].commits.values()
    return files


TOKENIZER = ("data.tokenizer_name=someone/model",)
REACHED = [("link",), ("..", "folder"), ("folder",)]


@pytest.mark.parametrize("way", REACHED, ids="/".join)
def test_the_folder_may_be_reached_by_a_link_or_by_dots_and_have_links_in_it(hub, model_files, tmp_path, way):
    commit = hub.push("models", "someone/model", model_files)
    hub.push("datasets", "someone/web", SETS)
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "folder").mkdir()
    (inner / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "large").mkdir()
    if way == ("folder",):
        (inner / "folder").mkdir()
        (inner / "folder" / "hub").symlink_to(tmp_path / "large")
    for told in ("commit", "here already, commit"):
        answer = fetch(hub, inner.joinpath(*way), *TOKENIZER, f"data.dataset_configs=[{{{SOURCE}}}]")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.count(f" {told}") == 2
    folder = inner.joinpath(*way).resolve()
    for item in items(folder):
        assert all((folder / file).is_file() for file in item["files"]) and item["files"]
    assert items(folder)[0]["commit"] == commit


def test_a_tokenizer_without_a_config_is_found_offline(hub, model_files, tmp_path):
    files = {name: data for name, data in model_files.items() if name != "config.json"}
    hub.push("models", "someone/model", files)
    folder = tmp_path / "folder"
    answer = fetch(hub, folder, *TOKENIZER)
    assert answer.returncode == 0, answer.stderr
    code = "from dynamic_transformers.data.tokenization import load_pretrained_tokenizer as load"
    answer = run("-c", f"{code}; print(len(load('someone/model')))", HF_HOME=str(folder), **OFFLINE)
    assert (answer.returncode, answer.stdout) == (0, "320\n"), answer.stderr


def test_a_tokenizer_that_transformers_cannot_make_is_refused(hub, model_files, tmp_path):
    files = {name: data for name, data in model_files.items() if not name.startswith(("token", "vocab"))}
    hub.push("models", "someone/model", files)
    answer = fetch(hub, tmp_path / "folder", *TOKENIZER)
    assert answer.returncode == 2 and not (tmp_path / "folder" / "fetched.json").exists()
    assert answer.stderr.splitlines()[-1].startswith("error: data.tokenizer_name: someone/model: ")


REFUSED = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Fault("someone", status=401, headers=REFUSED), "the server does not take your token (401): log in"),
        (Fault("resolve", status=403), "the server forbids it (403): your account"),
        (
            Fault("api/models", status=429, headers={"Retry-After": "7"}),
            "asks to wait 7 s (429): start again",
        ),
        (Fault("api/models", status=503), "the server has a fault of its own (503): start again later"),
        ("private", "no such repository, or a private one: check its name"),
        ("gated", "it is gated: accept its terms on its page of the hub, then log in with `hf auth login`"),
        ("no network", "the hub cannot be reached from this machine: check network"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(hub, model_files, tmp_path, fault, line):
    environment = {}
    if fault != "private":
        hub.push("models", "someone/model", model_files)
    if fault == "gated":
        hub.gate("models", "someone/model", "hf_right")
    elif fault == "no network":
        environment = {"HF_ENDPOINT": OFFLINE["HF_ENDPOINT"]}
    elif isinstance(fault, Fault):
        hub.faults.append(fault)
    answer = fetch(hub, tmp_path / "folder", *TOKENIZER, **environment)
    told = answer.stderr.splitlines()[-1]
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    assert told.startswith("error: data.tokenizer_name: someone/model: ") and line in told


def test_the_login_of_the_usual_home_opens_gated_repositories(hub, model_files, tmp_path):
    hub.push("models", "someone/model", model_files)
    hub.gate("models", "someone/model", "hf_right")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_right")
    answer = fetch(hub, tmp_path / "folder", *TOKENIZER, HF_HOME=str(tmp_path / "home"))
    assert answer.returncode == 0, answer.stderr
    assert not list((tmp_path / "folder").rglob("token"))


def test_a_download_that_broke_off_goes_on(hub, model_files, tmp_path):
    weights = os.urandom(2 * DOWNLOAD_CHUNK_SIZE)
    commit = hub.push("models", "someone/model", {**model_files, "model.safetensors": weights})
    # In the middle, after which the libraries go on by themselves; then for good.
    middle, end = Fault("cdn", "GET", times=1, cut=DOWNLOAD_CHUNK_SIZE + 9), Fault("cdn", "GET", cut=0)
    hub.faults = [middle, end]
    mode = ("training.mode=pretrained", "model.size=null")
    folder = tmp_path / "folder"
    arguments = (folder, *mode, *TOKENIZER, "model.pretrained=someone/model")
    answer = fetch(hub, *arguments)
    assert answer.returncode == 2
    assert "the hub broke off: start again; whole files are kept" in answer.stderr.splitlines()[-1]
    assert [item["kind"] for item in items(folder)] == ["tokenizer"]
    assert {request.range for request in hub.asked("cdn", "GET")} == {None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"}
    (folder / "hub" / "models--someone--model" / "blobs" / "a.b.incomplete").touch()  # as a kill leaves
    hub.faults = [Fault("cdn", "GET", times=1, cut=0), Fault("cdn", "GET", pause=0.01)]  # slow
    hub.requests.clear()
    assert fetch(hub, *arguments).returncode == 0
    assert not hub.asked("tokenizer.json") and not hub.asked("/config.json", "GET")
    file = folder / "hub" / "models--someone--model" / "snapshots" / commit / "model.safetensors"
    assert file.read_bytes() == weights
    assert not list(folder.rglob("*.incomplete"))


def test_what_cannot_work_is_refused_before_anything_is_made(hub, tmp_path):
    for arguments, environment, line in (
        ((), {"HF_HUB_OFFLINE": "1"}, "error: HF_HUB_OFFLINE is set, but fetch needs the hub: unset it"),
        (("--tasks", "code"), {}, "error: humaneval, mbpp: runs code that the model writes"),
        (("data.tokenizer=x",), {}, "error: data.tokenizer: no such key"),
        (("--output_dir", tmp_path / "a[1]"), {}, f"error: --output_dir {tmp_path}/a[1]: `datasets` finds"),
    ):
        answer = fetch(hub, tmp_path / "folder", *arguments, **environment)
        assert answer.returncode == 2
        assert answer.stderr.splitlines()[-1].startswith(line)
    assert not list(tmp_path.iterdir()) and not hub.requests


def test_wrong_names_in_a_source_are_told(hub, tmp_path):
    hub.push("datasets", "someone/web", SETS)
    for change, line in (
        (
            "config: tiny",
            "cannot read 'someone/web': BuilderConfig 'tiny' not found. Available: ['all', 'small']",
        ),
        (
            "config: small, split: dev",
            "data.dataset_configs.web.split=dev: no such split; there are train, test",
        ),
        ("revision: v9", "no such revision: give a branch"),
    ):
        source = f"{{name: web, path: someone/web, {change}}}"
        answer = fetch(hub, tmp_path / "folder", f"data.dataset_configs=[{source}]")
        assert answer.returncode == 2
        assert line in answer.stderr.splitlines()[-1]


def test_other_errors_are_told_by_their_first_line():
    assert reason_of(ValueError("a\nb")) == "a"
    assert reason_of(KeyError()) == "KeyError"
