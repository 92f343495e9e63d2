"""What torchrun starts for every rank: `python -m dynamic_transformers.launch.worker JOB.json`."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import record

from dynamic_transformers.command_line import run_command
from dynamic_transformers.configure import settings_from_dict
from dynamic_transformers.manifest import write_json
from dynamic_transformers.settings import Settings
from dynamic_transformers.training.display import configure_logging
from dynamic_transformers.training.trainer import on_cpu, train

WORKER = "dynamic_transformers.launch.worker"


def write_job(path: Path, settings: Settings, data_dir: Path, run_dir: Path) -> None:
    """Write down what the workers are to do. Settings hold no secret."""
    write_json(path, {"settings": settings.to_dict(), "data_dir": str(data_dir), "run_dir": str(run_dir)})


@record  # so that torchrun, and the file that it names, tell the first exception of all ranks
def work(args: argparse.Namespace) -> None:
    """Train as one of the ranks that torchrun has started."""
    job = json.loads(args.job.read_text())
    settings = settings_from_dict(job["settings"])
    configure_logging()
    # Without this, accelerate makes every rank of a machine without CUDA a training of its own.
    state = PartialState(cpu=on_cpu(settings))
    assert state.num_processes == int(os.environ["WORLD_SIZE"])
    if not state.is_main_process:
        logging.getLogger("dynamic_transformers").setLevel(logging.WARNING)
    train(settings, Path(job["data_dir"]), Path(job["run_dir"]))
    state.destroy_process_group()


def main() -> None:
    """Entry of a worker."""
    parser = argparse.ArgumentParser(prog=WORKER, description=__doc__)
    parser.add_argument("job", type=Path, help="file that write_job has written")
    run_command(work, parser)


if __name__ == "__main__":
    main()
