"""Many small files are tokenized into few folders, and give what one file gives."""

import json

import pytest

from dynamic_transformers.data import first_pass
from dynamic_transformers.data.first_pass import together
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.data.sources import Shard


def shards(*sizes, split="train"):
    return [
        Shard("a", number, f"{number}.txt", "text", None, split, size) for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([4, 6, 1], [(4, 6), (1,)]),
        ([11, 1, 12, 3, 3, 3, 3], [(11,), (1,), (12,), (3, 3, 3), (3,)]),
        ([0, 0, 5], [(0,), (0, 5)]),  # 0: not known
        ([], []),
    ],
)
def test_files_are_read_together_up_to_a_size(sizes, groups, monkeypatch):
    monkeypatch.setattr(first_pass, "BYTES_TOGETHER", 10)
    found = list(together(shards(*sizes)))
    assert [tuple(shard.size for shard in group) for group in found] == groups
    assert [shard for group in found for shard in group] == shards(*sizes)


def test_splits_stay_apart():
    mixed = [*shards(1, 1), *shards(1, split="validation")]
    assert list(map(len, together(mixed))) == [2, 1]


def test_small_files_give_what_one_file_gives(tmp_path, make_texts, write_jsonl, make_settings, monkeypatch):
    records = [{"text": text} for text in make_texts(120)]
    records[7] = {"text": 5}
    for number in range(0, 120, 3):
        write_jsonl(tmp_path / f"{number:03}.jsonl", records[number : number + 3])
    write_jsonl(tmp_path / "all.json", records)
    written = []
    monkeypatch.setattr(
        first_pass,
        "write_shards",
        lambda *given, do=first_pass.write_shards: written.append(given) or do(*given),
    )
    made = []
    for name in ("*.jsonl", "all.json"):
        source = {"name": "a", "path": "json", "data_files": str(tmp_path / name)}
        folder = prepare(make_settings([source]), tmp_path / f"made from {name[-4:]}")
        manifest = json.loads((folder / "manifest.json").read_text())
        made.append([manifest["content_digest"], manifest["sources"]])
        (broken,) = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
        assert broken["row"] == (2 if name == "*.jsonl" else 8)
    assert made[0] == made[1]
    assert len(written) == 2
