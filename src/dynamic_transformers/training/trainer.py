"""The train step: all that can be refused is refused, then the run folder is claimed, then the loop runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
)
from safetensors.torch import save_model

from dynamic_transformers.data.blocks import Blocks
from dynamic_transformers.data.loading import batches_of, load_split, verify_split
from dynamic_transformers.data.preview import PAGE
from dynamic_transformers.folders import sole_writer
from dynamic_transformers.interruption import Interrupted, Interruption, leave
from dynamic_transformers.manifest import finished, fresh_folder, read_manifest, write_manifest
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.settings import SEED_KEY, Settings, UserError
from dynamic_transformers.tracking import RunTracker, description, send_rest
from dynamic_transformers.training.batches import training_batches
from dynamic_transformers.training.budget import Budget, Horizon, Progress
from dynamic_transformers.training.calibration import calibrate, calibration_cost, calibration_rows
from dynamic_transformers.training.checkpoint import WEIGHTS, checkpoint_folder, last_good, prune
from dynamic_transformers.training.heldout import HeldoutResult, evaluate_heldout
from dynamic_transformers.training.loop import DivergedError, fit
from dynamic_transformers.training.observers import Checkpoints, Display, Evaluation, Log, Observers
from dynamic_transformers.training.run_folder import (
    Start,
    claim,
    plan_start,
    refuse_a_full_disk,
    run_identity,
    training_config,
)
from dynamic_transformers.training.state import TrainingState, fresh_state
from dynamic_transformers.training.step import OptimizerStep

logger = logging.getLogger("dynamic_transformers")

END = "weights"  # of a finished run: the weights, with thresholds set by the validation split


def train(settings: Settings, data_dir: Path, run_dir: Path, force: bool = False) -> Path:
    """Train one model.

    Writes `config.yaml`, `metrics.jsonl`, `checkpoints/step-…/`, `weights/` and, last, `manifest.json` into
    `run_dir`. A finished run with the same settings and data is returned as it is, one with a smaller budget
    is extended; an unfinished one goes on from its last checkpoint (`training.resume=auto`). Nothing in
    `run_dir` changes before all checks are done.

    Args:
        data_dir: folder that `prepare` wrote.
        force: begin anew; a run that is in `run_dir` is renamed.

    Raises:
        UserError: unfit data folder, run or checkpoint of other settings, no such device, another process
            that trains there, too many steps in a row that were not finite.
        Interrupted: SIGTERM or SIGINT came; the checkpoint is written.
    """
    run_dir = run_dir.resolve()  # a link is followed
    accelerator = make_accelerator(settings)
    identity = run_identity(settings, data_dir, accelerator.num_processes)
    config = training_config(identity, settings)
    main = accelerator.is_main_process
    with sole_writer(run_dir) if main else nullcontext():
        anew = force or settings.training.resume == "none"
        if not anew and finished(run_dir, "train", config):
            logger.info("train: %s is finished, nothing to do", run_dir)
            if main:
                send_rest(settings, run_dir)
            return run_dir
        if main:
            for split in ("train", "validation"):
                verify_split(data_dir, split)
        state = fresh_state(settings, data_dir, identity, accelerator)
        start = plan_on_rank_0(run_dir, state, settings, force, accelerator)
        if start.checkpoint is not None:
            state.load(start.checkpoint, settings.training.reschedule)
        accelerator.wait_for_everyone()  # a rank may still read what is renamed now
        if main:
            claim(run_dir, start, identity, settings)
        accelerator.wait_for_everyone()
        try:
            facts = run(state, settings, data_dir, run_dir, accelerator)
        except Interrupted:
            logger.info(
                "interrupted after step %d; without --force, a run goes on there", state.progress.step
            )
            raise
        if main:
            write_manifest(run_dir, "train", config, {"data": data_dir}, **facts)
        accelerator.wait_for_everyone()
    return run_dir


def plan_on_rank_0(
    run_dir: Path, state: TrainingState, settings: Settings, force: bool, accelerator: Accelerator
) -> Start:
    """What rank 0 finds in the run folder, on every rank.

    Raises:
        UserError: as `plan_start`, or the disk is too full.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        refuse_a_full_disk(run_dir, state.plain.num_parameters())
        found = [plan_start(run_dir, state.identity, settings, force)]
    return broadcast_object_list(found)[0]


def run(
    state: TrainingState, settings: Settings, data_dir: Path, run_dir: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Train to the end of the budget, calibrate, evaluate, write the end; returns the manifest's facts."""
    training = settings.training
    block_size = read_manifest(data_dir)["block_size"]
    step_tokens = state.identity["global_batch"] * block_size
    validation = load_split(data_dir, "validation")
    rows = calibration_rows(validation, block_size)
    horizon = Horizon(
        Budget.from_settings(training),
        state.schedule,
        state.config,
        step_tokens,
        block_size,
        final_flops=calibration_cost(state.config, rows, block_size),
    )
    step = OptimizerStep(
        accelerator,
        state.model,
        state.optimizer,
        training_batches(settings, data_dir, accelerator, state.progress.step),
        training.optimizer,
        training.gradient_accumulation_steps,
        settings.run.seed,
    )
    with Interruption() as interruption:
        with (
            tracked(settings, data_dir, run_dir, accelerator.is_main_process) as tracker,
            closing(observers_of(state, settings, validation, run_dir, tracker, accelerator)) as observers,
        ):
            with interruption.at_once():
                observers.catch_up(state.progress, horizon.total_steps(state.progress))
            try:
                spent = fit(
                    state.progress, step, horizon, observers, interruption, training.max_skipped_steps
                )
            except DivergedError as error:
                good = last_good(run_dir) or "none"
                raise UserError(f"{error}; the last good checkpoint is {good}") from error
            if not spent:
                leave(interruption.number or SIGTERM)  # another process of the run may have got the signal
            with interruption.at_once():
                if isinstance(state.plain, RoutedForCausalLM):
                    fractions, keys = calibrate(state.plain, batches_of(rows, settings.data.batch_size))
                    # All ranks calibrate, so that all have the thresholds; the work is charged once.
                    state.progress.flops += calibration_cost(state.config, rows, block_size, fractions, keys)
                observers.evaluation.evaluate(state.progress)
                if accelerator.is_main_process:
                    write_end(run_dir, state)
        interruption.obey()
    return facts_of(state, settings, tracker.run_id)


@contextmanager
def tracked(settings: Settings, data_dir: Path, run_dir: Path, enabled: bool) -> Iterator[RunTracker]:
    """A run's tracker, which is told how the body ends, however it does."""
    tracker = RunTracker(
        run_dir, settings.tracking, settings.run.output_dir, **description(settings), enabled=enabled
    )
    status = "FAILED"
    try:
        tracker.log_data(data_dir, read_manifest(data_dir))
        tracker.log_artifacts(data_dir / PAGE, "data")
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


def observers_of(
    state: TrainingState,
    settings: Settings,
    validation: Blocks,
    run_dir: Path,
    tracker: RunTracker,
    accelerator: Accelerator,
) -> Observers:
    """What watches a run: rank 0 writes, all evaluate."""
    training, main = settings.training, accelerator.is_main_process

    def write(progress: Progress, line: dict[str, float]) -> None:
        if main:
            done = {"tokens": progress.tokens, "training_flops": progress.flops}
            tracker.log(progress.step, done | line)

    def measure() -> HeldoutResult:
        with accelerator.autocast():
            return evaluate_heldout(state.plain, validation, settings.data.batch_size)

    def save() -> None:
        if main:
            folder = checkpoint_folder(run_dir, state.progress.step)
            state.save(folder)
            tracker.log_checkpoint(folder)
            prune(run_dir, training.keep_checkpoints)
        accelerator.wait_for_everyone()

    return Observers(
        Log(write, training.log_every),
        Display(settings.run.name, state.progress.step) if main else None,
        Evaluation(measure, write, training.eval_every),
        Checkpoints(save, training.checkpoint_every, training.checkpoint_minutes),
    )


def facts_of(state: TrainingState, settings: Settings, mlflow_run_id: str | None) -> dict[str, Any]:
    """What the manifest says of a finished run."""
    progress = state.progress
    study = settings.study
    return {
        "variant": study.variant,
        "point": {key: value for key, value in study.point.items() if key != SEED_KEY},
        "overrides": study.overrides,
        "seed": settings.run.seed,
        "architecture": settings.model.type,
        "parameters": state.plain.num_parameters(),
        "training_steps": progress.step,
        "training_tokens": progress.tokens,
        "training_flops": progress.flops,
        "training_seconds": progress.seconds,
        "skipped_steps": progress.skipped,
        "train_routed_fraction": {
            layer: tokens / progress.tokens for layer, tokens in progress.selected_tokens.items()
        },
        "checkpoint": END,
        "mlflow_run_id": mlflow_run_id,
        "model_config": state.config.to_dict(),
    }


def write_end(run_dir: Path, state: TrainingState) -> None:
    """Write the finished model's weights, and how it generates.

    The last checkpoint, from which a run can be extended, stays.
    """
    with fresh_folder(run_dir / END) as folder:
        save_model(state.plain, str(folder / WEIGHTS))
        state.plain.generation_config.save_pretrained(folder)


def make_accelerator(settings: Settings) -> Accelerator:
    """Accelerator for `system.device` and `system.precision`.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    device = settings.system.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("system.device=cuda: no CUDA device is available; use system.device=cpu or auto")
    mixed = {"fp32": "no", "bf16": "bf16"}[settings.system.precision]
    # Without the plugin the environment's number of accumulation steps would divide each loss.
    return Accelerator(
        mixed_precision=mixed,
        cpu=on_cpu(settings),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Thresholds and β are equal on all ranks without DDP's exchange of buffers before each forward.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def on_cpu(settings: Settings) -> bool:
    """Whether training runs on the CPU: also where there is a GPU that is not CUDA's.

    Apple's has no fp64, in which moving averages and held-out losses are summed.
    """
    return settings.system.device == "cpu" or not torch.cuda.is_available()
