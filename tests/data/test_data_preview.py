"""The look before training: its figures are those of the data, and its texts those that are trained on."""

import argparse
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer

from dynamic_transformers.cli import COMMANDS
from dynamic_transformers.data import preview as preview_module
from dynamic_transformers.data.loading import load_split
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.data.preview import PAGE, Preview, read_preview
from dynamic_transformers.data.preview_text import print_preview
from dynamic_transformers.manifest import read_manifest

ESCAPE = "\x1b[31m"


@pytest.fixture
def texts(tmp_path, make_settings, make_source, make_texts):
    """Two sources, one of which has broken records, is read many times, and has long documents."""
    records = [{"text": f"{ESCAPE} <b> {text}"} for text in make_texts(60, seed=3, low=30, high=90)]
    sources = [
        make_source("web", 400),
        make_source("wiki", records=[*records, {"text": 5}, {"text": None}, records[0]]),
    ]
    settings = make_settings(sources, exhausted="repeat", max_epochs=2.0, max_broken_fraction=0.1)
    return prepare(settings, tmp_path / "texts")


@pytest.fixture
def chat(tmp_path, make_settings, make_source, make_texts):
    """A source of texts and one of conversations, packed by best fit."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Say {n}!"},
                {"role": "assistant", "content": f"No, {n}."},
            ]
        }
        for n in range(200)
    ]
    sources = [make_source("web", 100), make_source("talk", records=talks, type="finetune")]
    return prepare(make_settings(sources, block_size=64), tmp_path / "chat")


def table(preview, title):
    """Cells of a table, by row and header, numbers as such."""
    (found,) = [table for table in preview.tables if table.title == title]
    assert {len(row) for row in found.rows} == {len(found.headers)}
    return {
        row[0]: {key: cell.replace(",", "") for key, cell in zip(found.headers[1:], row[1:], strict=True)}
        for row in found.rows
    }


def printed(preview, **options):
    file = io.StringIO()
    print_preview(preview, Console(file=file, width=80, **options))
    return file.getvalue()


def test_the_tables_say_what_the_manifest_says(texts):
    preview, manifest = read_preview(texts), read_manifest(texts)
    documents, tokens, splits = (table(preview, title) for title in ("Documents", "Tokens", "Splits"))
    for source in manifest["sources"]:
        row = documents[source["name"]]
        assert int(row["in"]) == source["documents_in"] == sum(map(int, row.values())) - int(row["in"])
        assert int(row["quarantined"]) == source["quarantined"]
        assert int(tokens[source["name"]]["in the mixture"]) == source["tokens"]
        assert tokens[source["name"]]["epochs"] == f"{source['epochs']:.2f}"
    assert documents["wiki"]["quarantined"] == "2" and documents["wiki"]["duplicates"] == "1"
    assert int(documents["all"]["in"]) == sum(source["documents_in"] for source in manifest["sources"])
    for split, facts in manifest["splits"].items():
        assert int(splits[split]["targets"]) == facts["target_tokens"]
        packed = facts["tokens"] + facts["dropped_tokens"]
        assert splits[split]["behind a cut"] == f"{100 * facts['cut_tokens'] / packed:.1f} %"
    assert preview.digest == manifest["content_digest"]
    assert any("source wiki: read" in warning and "max_epochs=2" in warning for warning in preview.warnings)


def test_lengths_are_those_of_the_documents(texts, monkeypatch):
    monkeypatch.setattr(preview_module, "SURVEYED", 7)
    ends = np.fromfile(texts / "train" / "ends.bin", "<i8")
    lengths, sources = np.diff(ends, prepend=0), np.fromfile(texts / "train" / "sources.bin", "<u2")
    for number, (name, row) in enumerate(table(read_preview(texts), "Lengths").items()):
        own = lengths[sources == number]
        expected = [np.quantile(own, part, method="inverted_cdf") for part in (0.05, 0.5, 0.95, 1)]
        assert [int(cell) for cell in row.values()] == [len(own), *expected], name


def check_excerpts(folder, preview):
    """Texts, losses and borders against the blocks."""
    blocks, tokenizer = load_split(folder, "train"), Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    ends = np.fromfile(folder / "train" / "ends.bin", "<i8")
    assert preview.excerpts
    for excerpt in preview.excerpts:
        shown = slice(excerpt.first, excerpt.last + 1)
        ids, targets = blocks.input_ids(excerpt.block)[shown], blocks.targets(excerpt.block)[shown]
        offset = excerpt.block * blocks.block_size
        first, behind = offset + excerpt.first, offset + excerpt.last + 1
        inside = ends[(ends > first) & (ends < behind)]
        assert len(excerpt.pieces) == 1 + len(inside)
        for piece, start, stop in zip(excerpt.pieces, [first, *inside], [*inside, behind], strict=True):
            assert (piece.begins, piece.ends) == (start == 0 or start in ends, stop in ends)
            if piece.source is None:
                continue
            loss = "".join(part.text for part in piece.parts if part.loss)
            own = slice(start - first, stop - first)
            expected = tokenizer.decode(ids[own][targets[own]].tolist(), skip_special_tokens=False)
            assert loss == expected.replace("\x1b", "␛") or "�" in loss


def test_excerpts_show_each_source_as_it_is_trained_on(texts):
    preview = read_preview(texts)
    check_excerpts(texts, preview)
    assert {piece.source for excerpt in preview.excerpts for piece in excerpt.pieces} == {"web", "wiki"}
    assert len(preview.excerpts) >= 3


def test_of_a_large_block_the_beginning_of_a_document_is_shown(
    tmp_path, make_settings, make_source, monkeypatch
):
    monkeypatch.setattr(preview_module, "SHOWN_TOKENS", 12)
    monkeypatch.setattr(preview_module, "BEFORE", 4)
    sources = [make_source(name, seed=seed) for seed, name in enumerate(("web", "wiki", "news", "code"))]
    folder = prepare(make_settings(sources, block_size=1024), tmp_path / "data")
    preview = read_preview(folder)
    check_excerpts(folder, preview)
    assert {excerpt.last - excerpt.first for excerpt in preview.excerpts} == {11}
    begun = [piece.source for excerpt in preview.excerpts for piece in excerpt.pieces if piece.begins]
    assert {"web", "wiki", "news", "code"} == set(begun)
    assert sorted(excerpt.first for excerpt in preview.excerpts)[1] > 12


def test_in_conversations_only_the_answers_have_a_loss(chat):
    preview = read_preview(chat)
    check_excerpts(chat, preview)
    pieces = [piece for excerpt in preview.excerpts for piece in excerpt.pieces]
    talks = [piece for piece in pieces if piece.source == "talk" and piece.begins and piece.ends]
    assert talks
    for talk in talks:
        read, answered = ("".join(p.text for p in talk.parts if p.loss is loss) for loss in (False, True))
        assert "Say" in read and "No" not in read and answered.startswith("No, ")
    assert any(piece.source is None and "padding" in piece.parts[0].text for piece in pieces)


def test_the_page_is_whole_and_shows_what_a_browser_would_take_for_html(texts):
    page = (texts / PAGE).read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert sources == ["data:,"] and not re.search(r"https?://|@import|url\(|<script|<iframe", page)
    assert "&lt;b&gt;" in page and "<b> " not in page and "\x1b" not in page and "␛[31m" in page
    assert "row 61" in page and "int instead of str" in page and "read" in page


def test_the_page_is_a_function_of_the_data(tmp_path, make_settings, make_source):
    settings = make_settings([make_source("a")])
    first, second = (prepare(settings, tmp_path / name / "data") / PAGE for name in ("1", "2"))
    assert first.read_bytes() == second.read_bytes()


def test_it_survives_json(texts):
    preview = read_preview(texts)
    assert Preview.from_dict(json.loads(json.dumps(preview.to_dict()))) == preview
    with pytest.raises(KeyError):
        Preview.from_dict({"digest": ""})


def test_plain_text_has_brackets_and_a_terminal_dims(texts, chat):
    plain, coloured = printed(read_preview(chat)), printed(read_preview(chat), force_terminal=True)
    assert "⟦<|endoftext|>user" in plain and "\x1b" not in plain
    assert "⟦" not in coloured and "\x1b[2" in coloured and "▶ talk" in coloured
    plain = printed(read_preview(texts))
    assert "\x1b" not in plain and "! source wiki: read" in plain and "wiki.jsonl, row 61: int" in plain
    tables = plain[: plain.index("! source")].splitlines()
    assert max(map(len, tables)) <= 80 and "quaran-" in plain


def test_prepare_prints_it_for_finished_data_too(tmp_path, capsys):
    command, add_arguments, _ = COMMANDS["prepare"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    source = "{name: math, path: embedded, max_documents: 300}"
    place = [f"data.output_dir={tmp_path}/data", f"data.dataset_configs=[{source}]", "data.vocab_size=300"]
    for _ in range(2):
        command(
            parser.parse_args(["--preview", "--config-dir", str(tmp_path), *place, "data.cloze_examples=0"])
        )
        out = capsys.readouterr().out
        assert "Training blocks, decoded" in out and f"data: {tmp_path}/data" in out
    command(parser.parse_args(["--config-dir", str(tmp_path), *place, "data.cloze_examples=0"]))
    assert "Training blocks" not in capsys.readouterr().out
