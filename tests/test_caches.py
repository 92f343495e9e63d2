"""A home that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamic_transformers.caches import CACHES, use_writable_caches

UNWRITABLE = "/proc/nowhere"  # for root, too


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    for variable in (*CACHES, "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize("variable", ["HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_without_a_writable_home_the_caches_lie_elsewhere(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, UNWRITABLE)
    use_writable_caches()
    folders = [Path(os.environ[name]) for name in CACHES]
    assert len({folder.parent for folder in folders}) == 1 and folders[0].parent.parent == tmp_path
    assert folders[0].parent.stat().st_mode & 0o777 == 0o700


def test_the_libraries_work_without_a_writable_home(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    code = "import dynamic_transformers, datasets; datasets.load_dataset('json', data_files='a.jsonl')"
    clean = {name: value for name, value in os.environ.items() if name not in CACHES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**clean, "HF_HOME": UNWRITABLE, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-500:]


def test_what_can_be_written_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", f"{UNWRITABLE}/datasets")
    use_writable_caches()
    assert {name for name in CACHES if os.environ[name]} == {"HF_DATASETS_CACHE"}


def test_a_hub_cache_that_can_only_be_read_is_kept(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/proc/self")
    use_writable_caches()
    assert os.environ["HF_HUB_CACHE"] == "/proc/self"


@pytest.mark.parametrize("writable", [True, False])
def test_the_old_name_of_the_hub_cache_counts(monkeypatch, tmp_path, writable):
    monkeypatch.setenv("HF_HOME", UNWRITABLE)
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "old") if writable else f"{UNWRITABLE}/old")
    use_writable_caches()
    assert os.environ["HF_HUB_CACHE"] == "" if writable else os.environ["HF_HUB_CACHE"].endswith("/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "new"))
    use_writable_caches()
    assert os.environ["HF_HUB_CACHE"] == str(tmp_path / "new")


def test_a_variable_in_a_cache_s_place_is_filled_in_as_the_libraries_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", "$PLACE/hub")
    use_writable_caches()
    assert (tmp_path / "hub").is_dir() and not Path("$PLACE").exists()
