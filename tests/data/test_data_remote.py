"""Files behind URLs, by list and by pattern, kept and streamed, and servers that refuse or break off."""

import bz2
import gzip
import json
import lzma
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import huggingface_hub.constants
import pyarrow
import pytest

from dynamic_transformers.data.fingerprints import shard_identity
from dynamic_transformers.data.sources import read_shard, shards_of
from dynamic_transformers.refusals import reason_of
from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records

TEXTS = [f"document {index} é" for index in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, and parts of them.

    `/refused/429/…` answers with that status, `/cut/…` ends in the middle, `/whole/…` knows no parts.
    """

    def do_GET(self):
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "refused":
            self.send_error(int(rest.partition("/")[0]))
            return
        file = Path(self.directory) / (rest or kind)
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        asked = self.headers.get("Range") if kind != "whole" else None
        first, last = asked.removeprefix("bytes=").split("-") if asked else (0, "")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if kind == "cut" else part)
        self.close_connection = True

    def do_HEAD(self):
        if self.path.startswith("/refused/"):
            self.send_error(int(self.path.split("/")[2]))
        else:
            self.path = self.path.removeprefix("/cut").removeprefix("/whole")
            super().do_HEAD()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    compressions = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    for ending, compress in compressions.items():
        (folder / f"a.jsonl{ending}").write_bytes(compress(LINES))
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(LINES)
    (folder / "a.jsonl.zst").write_bytes(buffer.getvalue().to_pybytes())
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=100)
    for name, kind in {"file.arrow": pyarrow.ipc.new_file, "stream.arrow": pyarrow.ipc.new_stream}.items():
        with kind(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    (folder / "a.tsv").write_text("n\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS))
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "list.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(folder):
    """The same files in fsspec's memory, which can be listed as s3 can."""
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/bucket/{file.name}", file.read_bytes())
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


BUILDERS = {"jsonl": "json", "json": "json", "tsv": "csv", "txt": "text"}
NAMES = [
    *(f"a.jsonl{ending}" for ending in ("", ".gz", ".bz2", ".xz", ".zst")),
    *("a.parquet", "file.arrow", "stream.arrow", "a.tsv", "a.txt", "list.json"),
]


def source(url, **settings):
    kind = url.rpartition("/")[2].split(".")[1]
    return SourceSettings(name="mine", path=BUILDERS.get(kind, kind), data_files=url, **settings)


def values(given):
    return [row.value for row in read_records(given)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_read_from_a_server(server, name, streaming):
    given = source(f"{server}/{name}", streaming=streaming)
    assert values(given) == TEXTS
    (shard,) = shards_of(given)
    assert shard.file == f"{server}/{name}" and shard.size > 0
    assert {row.file for row in read_shard(given, shard)} == {shard.file}
    given.max_documents = 7
    assert values(given) == TEXTS[:7]
    given.max_documents, given.split = None, "train[100:203]"
    assert values(given) == TEXTS[100:203]


@pytest.mark.parametrize("name", NAMES)
def test_files_are_found_by_pattern_where_they_can_be_listed(bucket, name):
    given = source(f"{bucket}/{name}", streaming=True)
    given.data_files = [f"{bucket}/{name[:-1]}?"]
    assert values(given) == TEXTS
    two = {"train": [f"{bucket}/{name}"], "test": [f"{bucket}/{name}", f"{bucket}/{name}"]}
    given.data_files, given.split = two, "train+test"
    assert values(given) == TEXTS * 3
    assert [shard.number for shard in shards_of(given)] == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{server}/none.jsonl", "none.jsonl"),
        ("{server}/refused/401/a.jsonl", "take your token (401): log in"),
        ("{server}/refused/404/a.jsonl", "a.jsonl"),
        ("{server}/refused/429/a.jsonl", "asks to wait (429)"),
        ("{server}/refused/503/a.jsonl", "a fault of its own (503): start again later"),
        ("{server}/cut/a.jsonl", "cannot read {server}/cut/a.jsonl"),
        ("{server}/none.parquet", "none.parquet"),
        ("memory://bucket/z*.jsonl", "no file matches 'memory://bucket/z*.jsonl'"),
        ("s3://bucket/a.jsonl", "Install s3fs to access S3"),
        ("nonsense://bucket/a.jsonl", "Protocol not known: nonsense"),
        ("http://127.0.0.1:9/a.jsonl", "'http://127.0.0.1:9/a.jsonl': the server cannot be reached"),
    ],
)
def test_what_a_server_does_not_give_is_told_in_one_line(server, bucket, address, words, streaming):
    with pytest.raises(UserError) as error:
        values(source(address.replace("{server}", server), streaming=streaming))
    assert words.replace("{server}", server) in str(error.value)
    assert str(error.value).startswith("data.dataset_configs.mine") and "\n" not in str(error.value)


def test_a_server_that_gives_only_whole_files_does_unless_they_are_streamed(server):
    assert values(source(f"{server}/whole/file.arrow")) == TEXTS
    with pytest.raises(UserError, match="gives files as a whole only: set streaming: false"):
        values(source(f"{server}/whole/file.arrow", streaming=True))


def test_a_file_behind_a_url_is_known_by_what_its_server_says_of_it(bucket):
    given = source(f"{bucket}/a.jsonl", streaming=True)
    (shard,) = shards_of(given)
    first = shard_identity(given, shard)
    assert shard_identity(given, shard) == first
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", LINES * 2)
    assert shard_identity(given, shard) != first


def test_the_reason_of_an_error_is_found_in_those_it_came_from():
    class RefusedError(Exception):
        status = 403

    try:
        try:
            raise RefusedError
        except RefusedError as cause:
            raise FileNotFoundError("no such file") from cause
    except FileNotFoundError as error:
        assert reason_of(error).startswith("the server forbids it (403)")
    assert reason_of(ValueError("one\ntwo")) == "one"
