"""Data prepared in groups of shards are those that one process prepares."""

import gzip
import json
import shutil
from itertools import chain

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamic_transformers.data import fan_out, first_pass, rows, tables
from dynamic_transformers.data.fan_out import dealt, merge_groups, plan_shards, tokenize_group
from dynamic_transformers.data.first_pass import all_shards
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def groups_of(settings, plan, count):
    """What each of so many steps writes, each by itself."""
    groups = [plan.with_name(f"group-{number}-of-{count}") for number in range(1, count + 1)]
    for number, group in enumerate(groups, 1):
        tokenize_group(settings, plan, number, count, group)
    return groups


@pytest.fixture
def corpus(tmp_path, make_texts, make_source, make_settings, monkeypatch):
    """Settings of sources in several formats, some in several shards, with broken and with equal records."""
    monkeypatch.setattr(rows, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(tables, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(first_pass, "BYTES_TOGETHER", 20_000)
    folder = tmp_path / "corpus"
    folder.mkdir()
    shared = make_texts(30, seed=9)
    broken = [{"text": text} for text in make_texts(200, seed=1) + shared] + [{"text": 3}]
    for name in ("a", "b"):  # equal files, whose broken records are told apart
        make_source(f"corpus/{name}", records=broken)
    make_source("corpus/e", records=[{"text": text} for text in make_texts(100, seed=6)])
    datasets.Dataset.from_dict({"meta": [{"text": text} for text in make_texts(200, 2) + shared]}).to_parquet(
        folder / "c.parquet"
    )
    for number, text in enumerate(make_texts(60, seed=3)):
        (folder / f"{number}.txt").write_text(text)
    with gzip.open(folder / "d.csv.gz", "wt") as file:
        file.write("text\n" + "".join(f"{text}\n" for text in make_texts(100, seed=4)))
    chats = [{"prompt": text[:40], "response": text[40:]} for text in make_texts(100, seed=5, low=20)]
    make_source("corpus/chats", records=chats)
    sources = [
        {"name": "lines", "path": "json", "data_files": "[ab].jsonl", "weight": 2.0},
        {"name": "again", "path": "json", "data_files": "[ae].jsonl", "weight": 0.5},
        {"name": "table", "path": "parquet", "data_files": "*.parquet", "text_column": "meta.text"},
        {"name": "texts", "path": "text", "data_files": "*.txt", "sample_by": "document"},
        {"name": "csv", "path": "csv", "data_files": "d.csv.gz"},
        {"name": "chats", "path": "json", "data_files": "chats.jsonl", "type": "finetune"},
    ]
    for source in sources:
        source["data_files"] = str(folder / source["data_files"])
    return make_settings([*sources, {"name": "math", "path": "embedded", "max_documents": 200}])


def test_groups_of_any_number_give_the_bytes_of_one_process(corpus, tmp_path):
    expected = files_of(prepare(corpus, tmp_path / "alone"))
    plan = tmp_path / "plan"
    plan_shards(corpus, plan)
    names = [shard["folder"] for shard in read_manifest(plan)["shards"]]
    assert len(set(names)) == len(names) and 12 < len(names) < 100
    groups = {count: groups_of(corpus, plan, count) for count in (1, 3, 100)}
    shutil.rmtree(tmp_path / "corpus")  # what merges has no need of the sources
    for count, folders in groups.items():
        kept = [json.loads((folder / "shards.json").read_text()) for folder in folders]
        assert sorted(chain(*kept)) == sorted(names)
        merge_groups(corpus, plan, folders[::-1], tmp_path / f"merged-{count}")
        found = files_of(tmp_path / f"merged-{count}")
        assert found.keys() == expected.keys() and "tokenizer/tokenizer.json" in found
        assert [name for name in found if found[name] != expected[name]] == []
    assert not list(tmp_path.glob(".*"))


def test_groups_that_are_missing_are_told(corpus, tmp_path):
    plan = tmp_path / "plan"
    plan_shards(corpus, plan)
    group, other = groups_of(corpus, plan, 2)
    missing, of = (len(json.loads((path / "shards.json").read_text())) for path in (other, group))
    with pytest.raises(UserError, match=f"^{missing} of {missing + of} folders of shards are missing: give "):
        merge_groups(corpus, plan, [group], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_is_finished_is_not_done_again_and_what_is_not_of_the_group_is_removed(corpus, tmp_path):
    plan = tmp_path / "plan"
    plan_shards(corpus, plan)
    group, _ = groups_of(corpus, plan, 2)
    made = read_manifest(plan)["digest"], (plan / "manifest.json").stat().st_mtime_ns
    names = json.loads((group / "shards.json").read_text())
    times = {name: (group / name).stat().st_ctime_ns for name in names}
    shutil.rmtree(group / names[0])
    (group / "stale").mkdir()
    (group / f".{names[1]}.new-0").mkdir()
    plan_shards(corpus, plan)
    assert made == (read_manifest(plan)["digest"], (plan / "manifest.json").stat().st_mtime_ns)
    tokenize_group(corpus, plan, 1, 2, group)
    assert {path.name for path in group.iterdir()} == {*names, "shards.json"}
    again = {name: (group / name).stat().st_ctime_ns for name in names}
    assert [name for name in names if again[name] != times[name]] == names[:1]


def test_a_source_that_has_changed_since_the_plan_is_named(corpus, tmp_path):
    plan_shards(corpus, tmp_path / "plan")
    file = tmp_path / "corpus" / "d.csv.gz"
    with gzip.open(file, "at") as appended:
        appended.write("one more\n")
    with pytest.raises(UserError) as error:
        tokenize_group(corpus, tmp_path / "plan", 1, 1, tmp_path / "group")
    assert str(error.value) == (
        f"data.dataset_configs.csv: {file} has changed since plan_data: run that again"
    )
    assert not (tmp_path / "group").exists()
    plan_shards(corpus, tmp_path / "plan")
    tokenize_group(corpus, tmp_path / "plan", 1, 1, tmp_path / "group")


def test_a_source_that_changes_while_it_is_planned_is_named(corpus, tmp_path, monkeypatch):
    file = tmp_path / "corpus" / "a.jsonl"

    def shards_and_more(data):
        found = all_shards(data)
        with file.open("a") as appended:
            appended.write('{"text": "one more"}\n')
        return found

    monkeypatch.setattr(fan_out, "all_shards", shards_and_more)
    with pytest.raises(UserError, match=r"source lines: .*a\.jsonl has changed .* while it was read"):
        plan_shards(corpus, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 9))
def test_each_shard_is_dealt_once_and_no_group_has_much_more_than_its_part(sizes, count):
    entries = [{"folder": str(number), "size": size} for number, size in enumerate(sizes)]
    groups = dealt(entries, count)
    assert len(groups) == count
    assert sorted(chain(*groups), key=lambda entry: int(entry["folder"])) == entries
    sums = [sum(entry["size"] for entry in group) for group in groups]
    assert max(sums) - min(sums) <= max(sizes, default=0)
    if len(set(sizes)) == 1:  # also where nobody knows sizes
        counts = [len(group) for group in groups]
        assert max(counts) - min(counts) <= 1


def test_the_largest_shards_are_dealt_first():
    entries = [{"size": size} for size in (1, 1, 2)]
    assert [len(group) for group in dealt(entries, 2)] == [1, 2]
