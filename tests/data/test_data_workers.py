"""Processes that share work: results, and that none outlives an error, a kill or its parent."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from dynamic_transformers.data.workers import done_by
from dynamic_transformers.settings import UserError

# A function of one argument stands in a module that a new process can import: this one.


def square(number):
    return number * number


def fail_or_wait(seconds):
    """Fails for 0, but lets the others begin."""
    time.sleep(seconds or 0.3)
    if not seconds:
        raise UserError("a: b.jsonl is damaged")


def note_and_wait(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(100)


def workers_that_wait(folder, count):
    """Processes that have noted themselves."""
    patience = time.monotonic() + 60
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < patience
        time.sleep(0.02)
    return [psutil.Process(int(file.name)) for file in folder.iterdir()]


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("processes", [1, 2])
def test_each_job_has_its_result(processes):
    found = list(done_by(processes, square, range(20)))
    assert sorted(found) == [(number, number * number) for number in range(20)]
    assert not multiprocessing.active_children()
    assert list(done_by(processes, square, [])) == []


def test_an_error_ends_the_other_jobs():
    began = time.monotonic()
    with pytest.raises(UserError, match="is damaged"):
        list(done_by(2, fail_or_wait, [100, 0, 100, 100]))
    assert time.monotonic() - began < 60 and not multiprocessing.active_children()


def test_who_needs_no_more_results_leaves_no_process():
    results = done_by(2, square, range(20))
    next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_told_in_one_line(tmp_path):
    def kill():
        os.kill(workers_that_wait(tmp_path, 1)[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match=r"was killed, .*data\.processes") as error:
        list(done_by(2, note_and_wait, [str(tmp_path)] * 2))
    assert "\n" not in str(error.value) and not multiprocessing.active_children()


PARENT = """
import sys
from test_data_workers import note_and_wait
from dynamic_transformers.data.workers import done_by
if __name__ == "__main__":
    list(done_by(2, note_and_wait, [sys.argv[1]] * 3))
"""


def test_workers_die_with_a_killed_parent(tmp_path):
    program, notes = tmp_path / "parent.py", tmp_path / "notes"
    program.write_text(PARENT)
    notes.mkdir()
    places = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, program, notes], env=os.environ | {"PYTHONPATH": places}, stdin=subprocess.DEVNULL
    )
    workers = workers_that_wait(notes, 2)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert {worker.pid for worker in workers} <= {child.pid for child in children}
    parent.kill()
    parent.wait()
    patience = time.monotonic() + 20
    while not all(map(has_ended, children)) and time.monotonic() < patience:
        time.sleep(0.05)
    left = [child for child in children if not has_ended(child)]
    for child in left:
        child.kill()
    assert left == []


def test_a_process_that_reads_files_imports_no_large_library(tmp_path):
    texts = [f"{number} words that are long enough to be kept" for number in range(40)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts[:20]]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[20:]}), tmp_path / "b.parquet")
    code = f"""
import sys
from dynamic_transformers.data.first_pass import sample_all
from dynamic_transformers.settings import DataSettings, SourceSettings
files = {{"json": "a.jsonl", "parquet": "b.parquet"}}
sources = [SourceSettings(name=n, path=n, data_files={str(tmp_path)!r} + "/" + f) for n, f in files.items()]
print(len(sample_all(DataSettings(sources, processes=1), 10**6)) > 20)
print(sorted({{"torch", "transformers", "datasets", "pandas"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n[]\n"
