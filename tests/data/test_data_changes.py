"""When finished data are used, made anew or refused: source files, settings, the hub's commits."""

import json
import logging
import os
import platform
import shutil
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from dynamic_transformers.data import fingerprints as module
from dynamic_transformers.data.fingerprints import fingerprints, first_change
from dynamic_transformers.data.hub import _ask_for_commit
from dynamic_transformers.data.prepare import default_data_dir, prepare
from dynamic_transformers.data.tokenization import train_tokenizer
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "dynamic_transformers")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def notes(tmp_path, monkeypatch, make_texts, write_jsonl):
    """Writes a file of `notes/`; the working folder is the one that holds it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()

    def write(name, seed, count=100):
        write_jsonl(Path("notes") / name, [{"text": text} for text in make_texts(count, seed)])

    write("a.jsonl", 1)
    return write


@pytest.fixture
def settings(notes, make_settings):
    return make_settings([{"name": "notes", "path": "json", "data_files": "notes/*.jsonl"}], block_size=16)


def change(notes, kind):
    """Change the source files; returns what the line must say."""
    if kind == "new":
        notes("b.jsonl", 2)
        return "source notes: notes/b.jsonl is new"
    if kind == "gone":
        notes("c.jsonl", 3)
        Path("notes/a.jsonl").unlink()
        return "source notes: notes/a.jsonl is gone"
    # Another content of the same size.
    file = Path("notes/a.jsonl")
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"token", b"other"))
    assert file.stat().st_size == status.st_size
    return "source notes: notes/a.jsonl has changed"


@pytest.mark.parametrize("kind", ["new", "gone", "changed"])
@pytest.mark.parametrize("named", [False, True])
def test_changed_source_files_are_prepared_anew_and_told(settings, notes, lines, kind, named):
    if named:
        settings = replace(settings, data=replace(settings.data, output_dir="data"))
    first = prepare(settings, default_data_dir(settings))
    before = read_manifest(first)
    assert prepare(settings, default_data_dir(settings)) == first
    assert lines()[-1] == f"data: {first} is finished"
    words = change(notes, kind)
    second = prepare(settings, default_data_dir(settings))
    assert len([line for line in lines() if words in line and "prepared anew" in line]) == 1
    assert (second == first) == named
    assert read_manifest(second)["content_digest"] != before["content_digest"]
    # Runs on the old data keep them.
    assert named or read_manifest(first) == before


def test_a_touched_file_has_not_changed(settings, lines):
    first = prepare(settings, default_data_dir(settings))
    os.utime("notes/a.jsonl", (1, 1))
    assert prepare(settings, default_data_dir(settings)) == first
    assert lines()[-1] == f"data: {first} is finished"


def test_an_old_state_of_the_files_finds_its_data_again(settings, notes):
    first = default_data_dir(settings)
    prepare(settings, first)
    notes("b.jsonl", 2)
    assert prepare(settings, default_data_dir(settings)) != first
    Path("notes/b.jsonl").unlink()
    assert default_data_dir(settings) == first


@pytest.mark.parametrize("named", [False, True])
def test_finished_data_outlive_their_source_files(settings, lines, named):
    if named:
        settings = replace(settings, data=replace(settings.data, output_dir="data"))
    first = prepare(settings, default_data_dir(settings))
    Path("notes/a.jsonl").unlink()
    assert prepare(settings, default_data_dir(settings)) == first
    assert lines()[-1] == f"data: {first} is finished"
    with pytest.raises(UserError, match=r"no file matches 'notes/\*\.jsonl'"):
        prepare(settings, first, force=True)
    assert read_manifest(first)


@pytest.mark.parametrize("gap", ["missing", "empty"])
def test_a_file_that_is_missing_or_empty_hides_no_change_of_another(notes, make_settings, lines, gap):
    notes("b.jsonl", 2)
    files = ["notes/a.jsonl", "notes/b.jsonl"]
    settings = make_settings([{"name": "notes", "path": "json", "data_files": files}], block_size=16)
    first = prepare(settings, default_data_dir(settings))
    Path("notes/b.jsonl").unlink()
    assert prepare(settings, default_data_dir(settings)) == first
    if gap == "empty":
        Path("notes/b.jsonl").touch()
    words = change(notes, "changed")
    with pytest.raises(UserError, match=r"no file matches 'notes/b\.jsonl'|b\.jsonl is empty"):
        prepare(settings, default_data_dir(settings))
    assert [line for line in lines() if words in line]


@pytest.fixture
def server(monkeypatch, make_texts):
    """A server of JSON lines that tells their `version`; it can change `after_reading`, and be `silent`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            while server.silent:
                time.sleep(0.01)
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            if server.version:
                self.send_header("ETag", f'"{server.version}"')
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(server.content)
            server.version += server.after_reading

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = "".join(json.dumps({"text": text}) + "\n" for text in make_texts(100)).encode()
    server.version, server.after_reading, server.silent = 1, 0, False
    server.url = f"http://127.0.0.1:{server.server_port}/a.jsonl"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    yield server
    server.silent = False
    module._silent.clear()
    server.shutdown()
    server.server_close()


@pytest.fixture
def of_server(server, make_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_settings([{"name": "web", "path": "json", "data_files": server.url}], block_size=16)


@pytest.mark.parametrize("what", ["version", "size"])
def test_a_change_on_a_server_means_new_data(of_server, server, lines, what):
    first = prepare(of_server, default_data_dir(of_server))
    assert prepare(of_server, default_data_dir(of_server)) == first
    assert lines()[-1] == f"data: {first} is finished"
    if what == "version":
        server.version = 2
    else:
        server.content += server.content.replace(b"token", b"other")
    second = prepare(of_server, default_data_dir(of_server))
    assert [line for line in lines() if f"source web: {server.url} has changed" in line]
    assert second != first


def test_a_change_on_a_server_is_noticed_while_it_is_read(of_server, server):
    server.after_reading = 1
    with pytest.raises(UserError, match=r"a\.jsonl has changed .* while it was read"):
        prepare(of_server, default_data_dir(of_server))


def test_data_outlive_a_server_that_says_nothing(of_server, server, lines, monkeypatch):
    monkeypatch.setattr(module, "SERVER_SECONDS", 0.5)
    first = prepare(of_server, default_data_dir(of_server))
    known = fingerprints(of_server.data)
    server.silent = True
    (source,) = of_server.data.dataset_configs
    source.data_files = [server.url.replace("a.jsonl", f"{number}.jsonl") for number in range(100)]
    start = time.perf_counter()
    assert set(fingerprints(of_server.data)["web"].values()) == {None}
    assert time.perf_counter() - start < 3  # each one is not waited for
    source.data_files = server.url
    unknown = fingerprints(of_server.data)
    assert unknown == {"web": {server.url: None}}
    assert first_change(known, unknown) is None and first_change(unknown, known) is None
    assert prepare(of_server, default_data_dir(of_server)) == first
    assert lines()[-1] == f"data: {first} is finished"


@pytest.mark.parametrize("part", ["tokenizer.json", "chat_template"])
def test_a_changed_tokenizer_means_new_data(settings, make_texts, lines, part):
    train_tokenizer(make_texts(100), 300).save_pretrained("mine")
    settings = replace(settings, data=replace(settings.data, tokenizer_name="mine"))
    first = prepare(settings, default_data_dir(settings))
    assert prepare(settings, default_data_dir(settings)) == first
    if part == "tokenizer.json":
        train_tokenizer(make_texts(100, 5), 300).save_pretrained("mine")
        words = "tokenizer mine: tokenizer.json has changed"
    else:
        Path("mine/chat_template.jinja").write_text("{{ messages }}")
        words = "tokenizer mine: chat_template.jinja is new"
    second = prepare(settings, default_data_dir(settings))
    assert second != first
    assert len([line for line in lines() if words in line]) == 1
    shutil.rmtree("mine")
    assert prepare(settings, default_data_dir(settings)) == second


def test_data_of_other_settings_are_replaced_by_force_alone(settings, tmp_path):
    folder = prepare(settings, tmp_path / "data")
    made = read_manifest(folder)
    source = replace(settings.data.dataset_configs[0], weight=2)
    other = replace(
        settings,
        run=replace(settings.run, seed=7),
        data=replace(settings.data, block_size=8, dataset_configs=[source]),
    )
    with pytest.raises(UserError) as error:
        prepare(other, folder)
    for words in ("block_size=8 (there 16)", "seed=7 (there 0)", "weight", "--force", "data.output_dir"):
        assert words in str(error.value)
    assert "vocab_size" not in str(error.value) and "\n" not in str(error.value)
    assert read_manifest(folder) == made
    prepare(other, folder, force=True)
    assert read_manifest(folder)["block_size"] == 8


def test_of_sources_only_the_settings_that_differ_are_told(settings, tmp_path):
    folder = prepare(settings, tmp_path / "data")
    (source,) = settings.data.dataset_configs
    for sources, told in (
        (
            (replace(source, text_column="body"),),
            "data.dataset_configs.notes.text_column=body (there text); name",
        ),
        ((source, replace(source, name="b")), "data.dataset_configs=['notes', 'b'] (there ['notes']); name"),
    ):
        other = replace(settings, data=replace(settings.data, dataset_configs=list(sources)))
        with pytest.raises(UserError) as error:
            prepare(other, folder)
        assert f"holds data of other settings: {told}" in str(error.value)


def test_the_content_is_told_from_what_made_it(settings, notes, tmp_path, monkeypatch):
    first = read_manifest(prepare(settings, tmp_path / "1"))
    monkeypatch.setenv("DYNAMIC_TRANSFORMERS_REVISION", "another")
    asked_less = replace(settings, data=replace(settings.data, cloze_examples=3))
    second = read_manifest(prepare(asked_less, tmp_path / "2"))
    assert first["config_digest"] != second["config_digest"] and second["git_revision"] == "another"
    assert first["content_digest"] == second["content_digest"]
    others = [
        replace(settings, run=replace(settings.run, seed=1)),
        replace(settings, data=replace(settings.data, block_size=8)),
        replace(settings, data=replace(settings.data, vocab_size=300)),
    ]
    made = [prepare(other, tmp_path / str(index)) for index, other in enumerate(others, 3)]
    digests = {first["content_digest"], *(read_manifest(folder)["content_digest"] for folder in made)}
    assert len(digests) == 4


def test_another_python_has_other_embedded_documents(make_settings, monkeypatch):
    data = make_settings([{"name": "math", "path": "embedded"}]).data
    made = fingerprints(data)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    told = first_change(made, fingerprints(data))
    assert told == f"source math: Python has changed ({made['math']['Python']} became 3.99.1)"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows one commit of each data set; its `answers` are by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = server.answers.get(self.path, (404, {"error": "not found"}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers = {
        "/api/datasets/team/web": (200, {"id": "team/web", "sha": COMMIT}),
        "/api/datasets/team/web/revision/v2": (200, {"id": "team/web", "sha": COMMIT[::-1]}),
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("dynamic_transformers.data.hub.HfApi", lambda: huggingface_hub.HfApi(address))
    _ask_for_commit.cache_clear()
    yield server
    server.shutdown()
    server.server_close()


def test_a_hub_data_set_is_known_by_its_commit(hub, make_settings):
    def of(**source):
        return fingerprints(make_settings([{"name": "web", "path": "team/web", **source}]).data)["web"]

    assert of() == {"commit": COMMIT}
    assert of(revision="v2") == {"commit": COMMIT[::-1]}
    assert of(revision="v3") is None and of(path="team/other") is None
    hub.answers.clear()
    assert of() == {"commit": COMMIT}  # one process sees one state of the hub
    _ask_for_commit.cache_clear()
    assert of() is None
    assert of(revision=COMMIT) == {"commit": COMMIT}  # nobody needs to be asked
    assert first_change({"web": {"commit": COMMIT}}, {"web": None}) is None
    told = first_change({"web": {"commit": COMMIT}}, {"web": {"commit": COMMIT[::-1]}})
    assert told == "source web: commit has changed (0123456789ab became 76543210fedc)"


def test_without_the_hub_a_commit_is_unknown(make_settings):
    _ask_for_commit.cache_clear()
    data = make_settings([{"name": "web", "path": "team/web"}]).data
    assert fingerprints(data) == {"web": None}
