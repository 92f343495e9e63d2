"""Starts a training on as many processes and nodes as are asked for."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dynamic_transformers.launch.settings import Launch
from dynamic_transformers.launch.worker import WORKER, write_job
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.training.trainer import train

logger = logging.getLogger("dynamic_transformers")

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

    Raises:
        UserError: more processes than GPUs, where there are any.
        RuntimeError: a process failed.
    """
    devices = torch.cuda.device_count()
    if settings.system.device != "cpu" and 0 < devices < processes:
        raise UserError(f"launch.processes={processes}: this node has {devices} GPU(s)")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        write_job(job, settings, data_dir.resolve(), run_dir.resolve())
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(processes), "-m", WORKER, str(job)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    logger.info(TIME.sub("", line.rstrip()))
            except BaseException:
                child.terminate()
                raise
    if child.returncode:
        raise RuntimeError(
            f"training in {processes} processes failed with exit code {child.returncode}; "
            "what they printed is above"
        )
    return run_dir
