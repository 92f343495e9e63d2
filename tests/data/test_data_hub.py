"""`paper` end to end against the loopback hub, and that this hub is one to the libraries."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data import hub as our_hub
from dynamic_transformers.data.files import local_files
from dynamic_transformers.data.fingerprints import fingerprints
from dynamic_transformers.data.sources import read_shard, shards_of
from dynamic_transformers.data.tokenization import load_pretrained_tokenizer
from dynamic_transformers.settings import PROJECT_ROOT, SourceSettings, UserError
from tests.data.hub_contents import card, parquet, push_model, push_sources
from tests.data.hub_server import Fault, HubServer


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer() as hub:
        yield hub


def test_paper_trains_from_a_slow_hub_that_breaks_off(hub, tmp_path, paper_overrides):
    settings = compose_settings("paper", [])
    push_sources(hub, settings)
    push_model(hub, str(settings.model.pretrained), tmp_path)
    hub.faults = [
        Fault("cdn", "GET", times=2, cut=100),
        Fault("datasets/.*README", times=1, status=429, headers={"Retry-After": "1"}),
        Fault("resolve", "GET", times=1, status=503),
        Fault("cdn", "GET", pause=0.2),
    ]
    place = (f"run.output_dir={tmp_path}", "run.name=run")
    answer = subprocess.run(
        [sys.executable, "train.py", "--config-name", "paper", *paper_overrides, *place],
        cwd=PROJECT_ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert answer.returncode == 0, answer.stderr
    run = tmp_path / "run"
    assert json.loads((run / "final_model" / "config.json").read_text())["model_type"] == "qwen2"
    (manifest,) = tmp_path.glob("data/*/manifest.json")
    made = json.loads(manifest.read_text())
    for source in settings.data.dataset_configs:
        commit = hub.repositories[f"datasets/{source.path}"].refs["main"]
        assert made["config"]["fingerprints"][source.name] == {"commit": commit}
    assert [entry["documents_in"] for entry in made["sources"]] == [400] * len(made["sources"])
    assert not hub.asked("/all/")


ROWS = {"train.parquet": parquet([{"text": f"document {n} of the web is long enough"} for n in range(400)])}
MODEL, WEB = "someone/model", {"name": "web", "path": "someone/web"}


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Points this process at a hub, with a cache of its own, as if it had asked nobody yet."""

    def point(url):
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which keeps the first address
        our_hub._ask_for_commit.cache_clear()
        our_hub.tokenizer_folder.cache_clear()

    yield point
    our_hub._ask_for_commit.cache_clear()
    our_hub.tokenizer_folder.cache_clear()
    our_hub._silent.clear()


@pytest.fixture(params=["closed", "silent"])
def unreachable(request, monkeypatch):
    """Address where nobody listens, or where nobody answers."""
    monkeypatch.setattr(our_hub, "HUB_SECONDS", 2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "silent":
            listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_that_cannot_be_reached_is_asked_once(hub, at, unreachable, make_settings, tmp_path, cached):
    data = make_settings([WEB], tokenizer_name=MODEL).data
    (source,) = data.dataset_configs
    if cached:
        hub.push("datasets", "someone/web", {"README.md": b"# web\n", ".gitattributes": b"", **ROWS})
        (tmp_path / "model").mkdir()
        push_model(hub, MODEL, tmp_path / "model")
        at(hub.url)
        before = fingerprints(data)
        shards = shards_of(source)
        assert len(list(read_shard(source, shards[0]))) == 400  # it is here then
        load_pretrained_tokenizer(MODEL)
    at(unreachable)
    start = time.perf_counter()
    found = fingerprints(data)
    if cached:
        assert found == before and None not in found.values()
        assert shards_of(source) == shards and len(load_pretrained_tokenizer(MODEL)) == 320
    else:
        assert set(found.values()) == {None}
        with pytest.raises(UserError, match="'someone/web': the hub cannot be reached from this machine"):
            shards_of(source)
        with pytest.raises(UserError, match=f"{MODEL}: no tokenizer in that folder or on the hub"):
            load_pretrained_tokenizer(MODEL)
    assert time.perf_counter() - start < 10  # each further question to it takes 23 s or more


def test_a_tokenizer_is_that_of_its_fingerprint_though_the_hub_moves_on(hub, at, make_settings, tmp_path):
    (tmp_path / "model").mkdir()
    push_model(hub, MODEL, tmp_path / "model")
    at(hub.url)
    data = make_settings([WEB], tokenizer_name=MODEL).data
    before = fingerprints(data)
    (files,) = hub.repositories[f"models/{MODEL}"].commits.values()
    hub.push("models", MODEL, {**files, "tokenizer.json": b"{}"})
    assert len(load_pretrained_tokenizer(MODEL)) == 320 and fingerprints(data) == before
    at(hub.url)
    assert fingerprints(data) != before


@pytest.mark.parametrize(
    ("readme", "line"),
    [
        (
            card({"a": {"train": "a.jsonl"}, "b": {"train": "b.jsonl"}}),
            "mine.config is missing: there are a, b",
        ),
        (b"---\nlicense: mit\nconfigs: [a\n- : :\n---\n", "/README.md: its YAML is damaged in line 4"),
        (b"---\nconfigs:\n\t- a\n---\n", "/README.md: its YAML is damaged in line 3"),
    ],
)
def test_what_a_card_leaves_open_or_breaks_is_told_in_one_line(tmp_path, readme, line):
    (tmp_path / "README.md").write_bytes(readme)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(UserError) as error:
        local_files(SourceSettings(name="mine", path=str(tmp_path)))
    assert str(error.value).endswith(line)


FILES = {f"{folder}/{n}.parquet": parquet([{"text": f"{folder} {n}"}]) for folder in "ab" for n in range(4)}


def test_trees_of_many_pages_and_revisions(hub, tmp_path):
    first = hub.push("datasets", "o/d", {"README.md": b"# d\n", **FILES}, tag="v1")
    second = hub.push("datasets", "o/d", {"README.md": b"# d, again\n"})
    api = HfApi(endpoint=hub.url)
    assert sorted(api.list_repo_files("o/d", repo_type="dataset", revision="v1")) == ["README.md", *FILES]
    assert api.list_repo_files("o/d", repo_type="dataset") == ["README.md"]
    assert [api.dataset_info("o/d", revision=name).sha for name in ("v1", "main", first)] == [
        first,
        second,
        first,
    ]
    # Its instances are cached by their arguments.
    files = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    assert files.glob("datasets/o/d@v1/**/*.parquet") == [f"datasets/o/d@v1/{name}" for name in FILES]
    found = api.get_paths_info("o/d", ["a/1.parquet", "none"], repo_type="dataset", revision="v1")
    assert [(info.path, vars(info)["size"]) for info in found] == [("a/1.parquet", len(FILES["a/1.parquet"]))]
    for name in ("README.md", "a/1.parquet"):
        path = api.hf_hub_download("o/d", name, repo_type="dataset", revision="v1", cache_dir=tmp_path)
        assert Path(path).read_bytes() == {"README.md": b"# d\n", **FILES}[name]
        assert first in path


def test_what_is_not_there_or_not_for_everybody(hub, tmp_path):
    hub.push("models", "o/m", {"config.json": b"{}"})
    hub.gate("models", "o/m", "right")
    for repo, file, revision, token, error in (
        ("o/none", "config.json", "main", None, RepositoryNotFoundError),
        ("o/m", "config.json", "main", None, GatedRepoError),
        ("o/m", "config.json", "main", "wrong", GatedRepoError),
        ("o/m", "none.json", "main", "right", RemoteEntryNotFoundError),
        ("o/m", "config.json", "v9", "right", RevisionNotFoundError),
    ):
        api = HfApi(endpoint=hub.url, token=token)
        with pytest.raises(error):
            api.hf_hub_download(repo, file, revision=revision, cache_dir=tmp_path)
    path = HfApi(endpoint=hub.url, token="right").hf_hub_download("o/m", "config.json", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"{}"
