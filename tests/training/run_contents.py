"""What a run folder holds, to be compared; and harm to its files."""

import json
import os

import torch
from safetensors.torch import load_file

STEPS = {"max_steps": 12, "checkpoint_every": 4}  # of the fixture `finished`


def snapshot(folder):
    """Contents and time of every file."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def numbers(run_dir):
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in ("time", "train/tokens_per_second")}
        for line in lines
    ]


def weights(run_dir):
    return load_file(run_dir / "weights" / "model.safetensors")


def assert_equal_ends(one, two):
    assert numbers(one) == numbers(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[-4000:] = bytes(255 - value for value in contents[-4000:])
    path.write_bytes(contents)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()
