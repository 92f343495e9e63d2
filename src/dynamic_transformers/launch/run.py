"""Starts a training on as many processes and nodes as are asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from dynamic_transformers.interruption import Interrupted, Interruption
from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.launch.worker import WORKER, write_job
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.training.checkpoint import checkpoints
from dynamic_transformers.training.trainer import train

logger = logging.getLogger("dynamic_transformers")

SECONDS_TO_END = 600  # that workers get for a step and a checkpoint; torchrun's own are 30
MISTAKE = "error: "  # how a worker begins the line of a user's mistake
TIME = re.compile(r"^\d\d:\d\d:\d\d ")  # which our logger would put there again


def launch_training(settings: Settings, data_dir: Path, run_dir: Path, launch: Launch) -> Path:
    """`trainer.train` in this process, in several of this machine, or in a TrainJob.

    Raises:
        UserError: a mistake in settings or launch, or a cluster that refuses the job.
        RuntimeError: the processes, or the job, failed. Called again, training goes on from its last
            checkpoint.
    """
    if launch.claim:
        # The Kubernetes client, which no other training needs, takes most of a second to import.
        from dynamic_transformers.launch.train_job import train_on_nodes

        return train_on_nodes(settings, data_dir, run_dir, launch)
    if launch.processes > 1:
        return train_in_processes(settings, data_dir, run_dir, launch.processes)
    return train(settings, data_dir, run_dir)


def train_in_processes(settings: Settings, data_dir: Path, run_dir: Path, processes: int) -> Path:
    """Train in several processes of this machine, and log what they print as it comes.

    A signal is passed on to them; they end their step and write a checkpoint.

    Raises:
        UserError: more processes than GPUs, where there are any; or what a worker refuses.
        RuntimeError: a process failed.
        Interrupted: SIGTERM or SIGINT came.
    """
    devices = torch.cuda.device_count()
    if settings.system.device != "cpu" and 0 < devices < processes:
        raise UserError(f"launch.processes={processes}: this node has {devices} GPU(s)")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        write_job(job, settings, data_dir.resolve(), run_dir.resolve())
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(processes), "-m", WORKER, str(job)]
        with (
            Interruption() as interruption,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SECONDS_TO_END)},
                start_new_session=True,  # a terminal's Ctrl-C comes once, through this process
            ) as child,
        ):
            interruption.then = child.send_signal
            if interruption.number is not None:
                child.send_signal(interruption.number)
            mistake = ""
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith(MISTAKE):
                        mistake = line.removeprefix(MISTAKE).rstrip()
                    # torchrun answers a signal with tracebacks of its own.
                    elif interruption.number is None or TIME.match(line):
                        logger.info(TIME.sub("", line.rstrip()))
                child.wait()
            except BaseException:  # a second Ctrl-C, say
                kill_family(child.pid)
                raise
    if mistake:
        raise UserError(mistake)
    if interruption.number is not None:
        newest = max(checkpoints(run_dir), default=None)
        logger.info("interrupted; the newest checkpoint is %s", newest or "none")
        raise Interrupted(interruption.number)
    if child.returncode:
        raise RuntimeError(
            f"training in {processes} processes failed with exit code {child.returncode}; "
            "what they printed is above"
        )
    return run_dir


def kill_family(pid: int) -> None:
    """Kill a process and all below it, whatever sessions they are in."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
