"""docs/data.md: its files are written, its commands run, and what they print is what the page shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import AddedToken

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.data import arithmetic
from dynamic_transformers.data.tokenization import train_tokenizer
from dynamic_transformers.settings import PROJECT_ROOT, DataSettings, SourceSettings
from tests.data.hub_contents import push_sources
from tests.data.hub_server import HubServer
from tests.pages import BLOCK, run_commands, write_files

PAGE = (PROJECT_ROOT / "docs" / "data.md").read_text()
TOKENIZERS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct")
CHAT_TEMPLATE = (  # what Qwen2.5's makes of conversations without tools
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def push_tokenizers(hub: HubServer, folder: Path) -> None:
    """A small tokenizer with Qwen2.5's special tokens and template, in place of Qwen2.5's."""
    texts = [*islice(arithmetic.documents(), 99), "The capital of Peru is Lima. What is the capital of it?"]
    tokenizer = train_tokenizer(texts, 400)
    marks = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    for name in TOKENIZERS:
        hub.push("models", name, {file.name: file.read_bytes() for file in folder.iterdir()})


@contextmanager
def stand_ins(folder: Path) -> Iterator[HubServer]:
    """A hub with small data sets and tokenizers under the names that the page's configurations name."""
    with HubServer() as hub:
        push_tokenizers(hub, folder / "tokenizer")
        push_sources(hub, compose_settings("mixture", []))
        yield hub


def environment_of(hub: HubServer, folder: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the files of the page; the working folder."""
    folder = tmp_path_factory.mktemp("page")
    write_files(PAGE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def test_the_page_does_what_it_says(folder):
    assert len(BLOCK.findall(PAGE)) * 2 == PAGE.count("```")
    start, *sections = PAGE.split("\n## ")
    examples, others = sections[:5], sections[5:]
    with stand_ins(folder) as hub:
        run = partial(run_commands, folder=folder, environment=environment_of(hub, folder))
        run(start)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, examples))
    run("\n".join(others))


def test_the_originals_list_is_taken(folder):
    sources = compose_settings("original", []).data.dataset_configs
    assert [(source.name, source.type, source.path, source.config) for source in sources] == [
        ("fineweb-edu-sample-10BT", "pretrain", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("ultrachat_200k", "finetune", "HuggingFaceH4/ultrachat_200k", None),
    ]


def test_the_page_names_all_settings_of_data_and_no_others():
    section = PAGE.partition("\n## What the settings mean\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    of_mixture, of_source = ({field.name for field in fields(cls)} for cls in (DataSettings, SourceSettings))
    assert listed <= of_mixture | of_source
    elsewhere = {"batch_size", "cloze_examples", "arithmetic_examples"}  # not of what is trained on
    assert of_mixture | of_source <= elsewhere | set(re.findall(r"\w+", PAGE))
