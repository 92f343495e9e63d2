"""The one training loop, for all four architectures, on one process or many (accelerate)."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from dynamic_transformers.data.loading import batches_of, collate, load_split, load_tokenizer
from dynamic_transformers.manifest import digest, finished, read_manifest, write_manifest
from dynamic_transformers.models import RoutedForCausalLM
from dynamic_transformers.models.selection import RoutingResult
from dynamic_transformers.settings import Settings, UserError
from dynamic_transformers.tracking import RunTracker
from dynamic_transformers.training.batches import BlockOrder, MicroBatches
from dynamic_transformers.training.budget import Budget, Progress
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint
from dynamic_transformers.training.display import TrainingDisplay
from dynamic_transformers.training.flops import target_fraction, training_flops
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from dynamic_transformers.training.run_folder import claim_run_dir, resume_point

logger = logging.getLogger("dynamic_transformers")


def train(settings: Settings, data_dir: Path, run_dir: Path, force: bool = False) -> Path:
    """Train one model.

    Writes `config.yaml`, `metrics.jsonl`, `checkpoints/step-…/` and, last, `manifest.json` into `run_dir`.
    A finished run with the same settings and data is returned as it is; an unfinished one goes on from its
    last checkpoint (`training.resume=auto`).

    Args:
        data_dir: folder that `prepare` wrote.
        force: begin anew, whatever `run_dir` holds.

    Raises:
        UserError: unfit data folder, checkpoint of other settings, no such device.
    """
    config = training_config(settings, data_dir)
    accelerator = make_accelerator(settings)
    if not force and finished(run_dir, "train", config):
        logger.info("train: %s is finished, nothing to do", run_dir)
        return run_dir
    main = accelerator.is_main_process
    with accelerator.main_process_first():
        if main:
            claim_run_dir(run_dir, settings, force)
    run = TrainingRun(settings, data_dir, run_dir, accelerator, config)
    facts = run.fit()
    if main:
        write_manifest(run_dir, "train", config, {"data": data_dir}, **facts)
    accelerator.wait_for_everyone()
    return run_dir


class Interval:
    """Means of the losses, and the speed, since the last log line."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.steps = self.tokens = 0
        self.sums: dict[str, float] = {}

    def add(self, tokens: int, losses: dict[str, float]) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.tokens += tokens
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return time.perf_counter() - self.start

    def means(self) -> dict[str, float]:
        """Mean of each loss, and tokens per second."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        return means | {"train/tokens_per_second": self.tokens / self.seconds}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the body."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start


class TrainingRun:
    """State of one run: model, optimizer, order of the blocks, work done."""

    def __init__(
        self,
        settings: Settings,
        data_dir: Path,
        run_dir: Path,
        accelerator: Accelerator,
        config: dict,
    ):
        self.settings, self.run_dir, self.accelerator = settings, run_dir, accelerator
        self.training = settings.training
        self.manifest = read_manifest(data_dir)
        self.validation = load_split(data_dir, "validation")
        self.identity = digest(identity(config))
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(data_dir)
        set_seed(settings.run.seed)
        eos = self.tokenizer.eos_token_id
        model = build_model(settings, len(self.tokenizer), eos if isinstance(eos, int) else None)
        if self.training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = build_optimizer(model, self.training.optimizer)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = self.resume()
        self.tracker = RunTracker(
            run_dir,
            settings.tracking,
            settings.run.output_dir,
            name=f"{settings.model.type}-seed{settings.run.seed}",
            params=settings.to_dict(),
            tags={"architecture": settings.model.type, "seed": str(settings.run.seed)},
            enabled=accelerator.is_main_process,
        )
        self.tracker.log_data(data_dir, self.manifest)
        self.micro_batches = self.loader(data_dir)

    @property
    def plain_model(self) -> PreTrainedModel:
        """The model without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        data = self.settings.data
        blocks = data.batch_size * self.training.gradient_accumulation_steps * self.accelerator.num_processes
        return blocks * self.manifest["block_size"]

    def resume(self) -> Progress:
        """State of the checkpoint that `training.resume` names, or a fresh start."""
        checkpoint = resume_point(self.run_dir, self.training.resume)
        if checkpoint is None:
            return Progress()
        progress = load_checkpoint(checkpoint, self.plain_model, self.optimizer, self.identity)
        logger.info("train: going on from %s", checkpoint)
        return progress

    def loader(self, data_dir: Path):
        """Endless micro-batches of this rank, from the next step onwards."""
        blocks = load_split(data_dir, "train")
        sampler = MicroBatches(
            BlockOrder(len(blocks), self.settings.run.seed),
            self.settings.data.batch_size,
            self.training.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.progress.step,
        )
        loader = DataLoader(
            blocks,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=self.settings.system.num_workers,
        )
        return iter(loader)

    def fit(self) -> dict:
        """Run to the end of the budget; returns the facts for the manifest."""
        budget = Budget.from_settings(self.training)
        model_config = self.plain_model.config
        assert isinstance(model_config, Qwen2Config)
        length = self.manifest["block_size"]
        expected_flops = self.step_tokens * training_flops(model_config, length).total()
        total = budget.total_steps(self.progress, self.step_tokens, expected_flops)
        main = self.accelerator.is_main_process
        display = TrainingDisplay(self.tracker.state["name"], self.progress.step, main)
        interval = Interval()
        self.model.train()
        try:
            while self.progress.step < total:
                factor = learning_rate_factor(self.training.optimizer, self.progress.step, total)
                start = time.perf_counter()
                losses, routing = self.optimizer_step(self.progress.step, total, factor)
                self.progress.seconds += time.perf_counter() - start
                computed = {layer: measured["computed"] for layer, measured in routing.items()}
                step_flops = self.step_tokens * training_flops(model_config, length, computed).total()
                self.progress.step += 1
                self.progress.tokens += self.step_tokens
                self.progress.flops += step_flops
                for layer, measured in routing.items():
                    selected = self.progress.selected_tokens.get(str(layer), 0.0)
                    self.progress.selected_tokens[str(layer)] = (
                        selected + measured["fraction"] * self.step_tokens
                    )
                interval.add(self.step_tokens, losses)
                if target_fraction(model_config) is None:
                    expected_flops = self.progress.flops / self.progress.step
                total = budget.total_steps(self.progress, self.step_tokens, expected_flops)
                last = self.progress.step >= total
                if self.progress.step % self.training.log_every == 0 or last:
                    metrics = interval.means() | {"train/learning_rate": self.training.optimizer.lr * factor}
                    for layer, measured in routing.items():
                        metrics |= {f"routing/layer_{layer}/{key}": value for key, value in measured.items()}
                    self.log(metrics)
                    speed = metrics["train/tokens_per_second"]
                    display.update(self.progress.step, total, speed, metrics["train/loss"])
                    interval = Interval()
                every = self.training.checkpoint_every
                if last or (every and self.progress.step % every == 0):
                    with interval.paused():
                        self.checkpoint()
                if last or (self.training.eval_every and self.progress.step % self.training.eval_every == 0):
                    with interval.paused():
                        self.evaluate()
        finally:
            display.close()
            self.tracker.close(finished=False)
        self.calibrate()
        checkpoint = self.checkpoint()
        return {
            "seed": self.settings.run.seed,
            "architecture": self.settings.model.type,
            "parameters": self.parameters,
            "training_steps": self.progress.step,
            "training_tokens": self.progress.tokens,
            "training_flops": self.progress.flops,
            "training_seconds": self.progress.seconds,
            "train_routed_fraction": {
                layer: tokens / self.progress.tokens
                for layer, tokens in self.progress.selected_tokens.items()
            },
            "checkpoint": str(checkpoint.relative_to(self.run_dir)),
            "mlflow_run_id": self.tracker.run_id,
            "model_config": model_config.to_dict(),
        }

    def optimizer_step(
        self, step: int, total_steps: int, lr_factor: float
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """One update from `gradient_accumulation_steps` micro-batches on every rank.

        The loss is the sum over all targets of the step divided by their number, so it does not depend on
        how the step is cut into micro-batches and ranks.

        Returns:
            Losses by metric name; of each routed layer what `routing_measures` names.

        Raises:
            UserError: a loss or the gradient's norm is not finite; nothing is updated then.
        """
        accelerator, accumulation = self.accelerator, self.training.gradient_accumulation_steps
        plain = self.plain_model
        routed = isinstance(plain, RoutedForCausalLM)
        if routed:
            plain.set_progress(step, total_steps, accumulation)
        batches = [next(self.micro_batches) for _ in range(accumulation)]
        counts = torch.tensor([sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)])
        targets = accelerator.reduce(counts.to(accelerator.device), "sum")[0]
        set_learning_rate(self.optimizer, lr_factor)
        share = 1 / (accumulation * accelerator.num_processes)
        losses: dict[str, torch.Tensor] = {}
        routing: dict[tuple[int, str], torch.Tensor] = {}
        for index, batch in enumerate(batches):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            scale = {"num_tokens_in_batch": self.step_tokens} if routed else {}
            syncs = index == accumulation - 1
            with contextlib.nullcontext() if syncs else accelerator.no_sync(self.model):
                outputs = self.model(**batch, num_items_in_batch=targets, use_cache=False, **scale)
                # DDP averages over ranks; the loss is already a share of the whole step.
                accelerator.backward(outputs.loss * accelerator.num_processes)
            add(losses, "train/total_loss", outputs.loss.detach())
            if not routed:
                add(losses, "train/loss", outputs.loss.detach())
                continue
            add(losses, "train/loss", outputs.language_model_loss.detach())
            for name, value in outputs.auxiliary_losses.items():
                add(losses, f"train/{name}_loss", value.detach() * share)
            for layer, result in outputs.routing.items():
                for name, value in routing_measures(result).items():
                    add(routing, (layer, name), value * share)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.training.optimizer.max_grad_norm)
        reduced = accelerator.reduce(torch.stack([*losses.values(), *routing.values()]).float(), "sum")
        assert isinstance(reduced, torch.Tensor) and norm is not None
        values = reduced.tolist()
        means = dict(zip(losses, values, strict=False)) | {"train/grad_norm": float(norm)}
        if not all(map(math.isfinite, means.values())):
            wrong = ", ".join(f"{name}={value}" for name, value in means.items() if not math.isfinite(value))
            raise UserError(f"training diverged at step {step} ({wrong}): lower training.optimizer.lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        measured: dict[int, dict[str, float]] = {}
        for (layer, name), value in zip(routing, values[len(losses) :], strict=True):
            measured.setdefault(layer, {})[name] = value
        return means, measured

    def calibrate(self) -> None:
        """Set the thresholds by the validation split, on every rank alike."""
        if not isinstance(self.plain_model, RoutedForCausalLM):
            return
        calibrate(self.plain_model, batches_of(self.validation, self.settings.data.batch_size))
        self.model.train()

    def evaluate(self) -> None:
        """Held-out loss on the validation split, on every rank alike, logged by rank 0."""
        result = evaluate_heldout(self.plain_model, self.validation, self.settings.data.batch_size)
        metrics = {"eval/loss": result.loss, "eval/bits_per_byte": result.bits_per_byte}
        for layer, fraction in result.routed_fraction.items():
            metrics[f"routing/layer_{layer}/eval_fraction"] = fraction
            metrics[f"routing/layer_{layer}/gate_mean"] = result.gate_mean[layer]
            metrics[f"routing/layer_{layer}/gate_std"] = result.gate_std[layer]
        self.log(metrics)
        logger.info("validation loss %.4f nats/token, %.4f bits/byte", result.loss, result.bits_per_byte)

    def checkpoint(self) -> Path:
        """Save the state, by rank 0; returns the checkpoint's folder."""
        folder = checkpoint_folder(self.run_dir, self.progress.step)
        if self.accelerator.is_main_process:
            save_checkpoint(folder, self.plain_model, self.optimizer, self.progress, self.identity)
        self.accelerator.wait_for_everyone()
        return folder

    def log(self, metrics: dict[str, float]) -> None:
        """Write metrics with the work done so far."""
        if self.accelerator.is_main_process:
            done = {"tokens": self.progress.tokens, "training_flops": self.progress.flops}
            self.tracker.log(self.progress.step, done | metrics)


def make_accelerator(settings: Settings) -> Accelerator:
    """Accelerator for `system.device` and `system.precision`.

    Raises:
        UserError: CUDA is asked for and absent.
    """
    device = settings.system.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("system.device=cuda: no CUDA device is available; use system.device=cpu or auto")
    mixed = {"fp32": "no", "bf16": "bf16"}[settings.system.precision]
    return Accelerator(mixed_precision=mixed, cpu=on_cpu(settings))


def on_cpu(settings: Settings) -> bool:
    """Whether training runs on the CPU: also where there is a GPU that is not CUDA's.

    Apple's has no fp64, in which moving averages and held-out losses are summed.
    """
    return settings.system.device == "cpu" or not torch.cuda.is_available()


def training_config(settings: Settings, data_dir: Path) -> dict:
    """What a finished run depends on, without places and names."""
    values = settings.to_dict()
    config = {key: values[key] for key in ("model", "training", "system")}
    config["training"] = {key: value for key, value in config["training"].items() if key != "resume"}
    batch_size = settings.data.batch_size
    return config | {
        "seed": settings.run.seed,
        "batch_size": batch_size,
        "data_digest": read_manifest(data_dir)["digest"],
    }


def identity(config: dict) -> dict:
    """What must agree for a run to go on from a checkpoint: all but when to stop, log, evaluate and save."""
    free = ("max_steps", "max_tokens", "max_flops", "log_every", "eval_every", "checkpoint_every")
    training = {key: value for key, value in config["training"].items() if key not in free}
    return config | {"training": training, "system": {"precision": config["system"]["precision"]}}


def routing_measures(result: RoutingResult) -> dict[str, torch.Tensor]:
    """Means over a batch of what one routed layer did.

    `fraction` of the tokens selected; `computed`: places that the block ran on, more where rows differ in
    what they select; of STT's teacher the mean of g, and of g².
    """
    fraction = result.selected.float().mean()
    measures = {"fraction": fraction, "computed": torch.full_like(fraction, result.computed)}
    if result.surprise_gate is not None:
        gate = result.surprise_gate.float()
        measures |= {"teacher_gate": gate.mean(), "teacher_gate_squared": gate.square().mean()}
    return measures


def add(sums: dict, key, value: torch.Tensor) -> None:
    """sums[key] += value."""
    sums[key] = sums[key] + value if key in sums else value
