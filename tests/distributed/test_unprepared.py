"""Several processes that train on data which are not there yet: one prepares, the others wait for it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamic_transformers.folders import sole_writer
from dynamic_transformers.launch.one_process import RANKS, by_one_process
from dynamic_transformers.settings import PROJECT_ROOT

TIME_OUT = 10  # seconds
TRAIN = """
# train.py, in whose process group nobody waits longer than TIME_OUT for another.
import datetime, functools, runpy, sys
import torch
torch.distributed.init_process_group = functools.partial(
    torch.distributed.init_process_group, timeout=datetime.timedelta(seconds=TIME_OUT)
)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
""".replace("TIME_OUT", str(TIME_OUT))
RANK = """
# A rank that makes something once all are there, and then forms the process group.
import argparse, logging, os, sys, time
from pathlib import Path
import torch
from dynamic_transformers.command_line import run_command
from dynamic_transformers.launch.one_process import by_one_process

def make():
    print("makes it", flush=True)
    while len(list(started.parent.glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.1)
    time.sleep(3)
    if "fails" in sys.argv:
        os._exit(3)
    return Path(f"made by {os.environ['RANK']}")

def work(args):
    started.touch()
    print(by_one_process(make, "it"))
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()

started = Path(__file__).with_name(f"started-{os.environ['RANK']}")
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
run_command(work, argparse.ArgumentParser(), [])
"""
STANDALONE = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def start(tmp_path, micro_overrides):
    """Starts a training on unprepared data; its lines are those of all processes."""
    (tmp_path / "train.py").write_text(TRAIN)
    started = []

    def launch(*launcher, overrides=(), **environment):
        arguments = [f"run.output_dir={tmp_path}", "run.name=run", f"data.output_dir={tmp_path / 'data'}"]
        arguments += ["tracking.mlflow=false", "system.device=cpu", "training.max_steps=2", *micro_overrides]
        process = subprocess.Popen(
            [*map(str, launcher), str(tmp_path / "train.py"), *arguments, *overrides],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_data_that_take_longer_than_the_groups_time_out(start, tmp_path):
    """They take as long as this process keeps their folder."""
    with sole_writer(tmp_path / "data"):
        process = start(*STANDALONE, "2")
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "which writes" in line:
                break
        time.sleep(TIME_OUT + 5)
        assert process.poll() is None
    lines += process.stdout.readlines()
    output = "".join(lines)
    assert process.wait() == 0, output
    assert output.count(f"waiting for process {os.getpid()} on") == 1
    assert output.count("waiting for rank 0, which makes the data") == 1
    assert output.count("data: written to") == 1 and "is finished" not in output
    assert (tmp_path / "run" / "final_model" / "model.safetensors").is_file()


def test_a_source_that_cannot_be_had_ends_all_with_one_line(start, tmp_path):
    source = f"{{name: own, path: json, data_files: {tmp_path / 'none.jsonl'}}}"
    process = start(*STANDALONE, "3", overrides=[f"data.dataset_configs=[{source}]"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "data_files: no file matches" in errors[0]
    assert output.count("waiting for rank 0, which makes the data") <= 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def ranks(tmp_path):
    """Output of the processes of nodes without torchrun: rank 0 serves the store."""
    (tmp_path / "rank.py").write_text(RANK)

    def run(nodes, processes, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        size = nodes * processes
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = [
            subprocess.Popen(
                [sys.executable, tmp_path / "rank.py", *(arguments if rank == 0 else ())],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank % processes)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        outputs = [process.communicate(timeout=120) for process in started]
        codes = [process.returncode for process in started]
        return codes, [out for out, _ in outputs], [err.splitlines() for _, err in outputs]

    return run


def test_the_first_of_each_node_makes_it_after_rank_0(ranks):
    codes, outputs, _ = ranks(2, 3)
    assert codes == [0] * 6
    assert outputs[0] == "makes it\nmade by 0\n"
    assert outputs[3] == "waiting for rank 0, which makes it\nmakes it\nmade by 3\n"
    assert outputs[1] == "waiting for rank 0, which makes it\nmade by 0\n" and outputs[2] == "made by 0\n"
    assert outputs[4] == "waiting for rank 3, which makes it\nmade by 3\n" and outputs[5] == "made by 3\n"


def test_the_others_end_where_rank_0_is_lost(ranks):
    codes, outputs, errors = ranks(2, 2, "fails")
    assert codes == [3, 2, 2, 2] and "made" not in "".join(outputs)
    for rank in (1, 2, 3):
        assert (
            errors[rank][-1]
            == f"error: rank {rank}: rank 0, which makes it, has ended: its own lines say why"
        )
    assert not any("Traceback" in line for lines in errors for line in lines)


def test_a_process_that_nobody_has_numbered_waits_for_nobody(monkeypatch):
    for name in RANKS[1:]:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(RANKS[0], raising=False)
    assert by_one_process(lambda: Path("x"), "it") == Path("x")
