"""`system.compile`: the loop trains with compiled forwards and says the same."""

import json
import shutil

import pytest

from dynamic_transformers.preflight import preflight
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.trainer import train

STEPS = {"max_steps": 4, "log_every": 1, "eval_every": 2, "checkpoint_every": 2, "keep_checkpoints": None}


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in line if name.endswith("loss")}


def test_a_compiled_run_learns_the_same_and_goes_on(make_settings, data_dir, tmp_path):
    runs = {}
    for compiled in (False, True):
        settings = make_settings("sdt", training=STEPS, system={"compile": compiled})
        runs[compiled] = train(settings, data_dir, tmp_path / str(compiled))
    expected, got = losses(runs[False]), losses(runs[True])
    assert got == pytest.approx(expected, rel=1e-4) and len(got) > 8
    assert got != expected  # else nothing was compiled
    part = shutil.copytree(runs[True], tmp_path / "part")
    (part / "manifest.json").unlink()
    shutil.rmtree(part / "checkpoints" / "step-00000004")
    assert losses(train(settings, data_dir, part)) == got


def test_without_a_compiler_it_is_refused(make_settings, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"system\.compile=true: needs g\+\+"):
        preflight(make_settings("mod", system={"compile": True}))
