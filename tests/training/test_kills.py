"""Runs killed at random moments end as those that nobody disturbed, in every configuration."""

import multiprocessing
import random
import signal
import time

import pytest
import torch
from run_contents import assert_equal_ends
from safetensors.torch import load_file

from dynamic_transformers.training.checkpoint import checkpoints
from dynamic_transformers.training.trainer import train

# Forked: imports are done, and a kill hits nothing but the training.
FORK = multiprocessing.get_context("fork")
KILLS = 4

STEPS = {"max_steps": 14}
TOKENS = {"max_tokens": 14 * 128.0}
FLOPS = {"max_flops": 5e9}
CONFIGURATIONS = {
    "standard, steps": ("standard", {}, STEPS),
    "standard, tokens, long warm-up": ("standard", {}, TOKENS | {"optimizer": {"warmup_fraction": 0.3}}),
    "mod, predictor, falling capacity, FLOPs": (
        "mod",
        {"predictor_weight": 0.01, "selection_rule": "predictor", "capacity_warmup_steps": 9},
        FLOPS,
    ),
    "mod, random routing, steps": ("mod", {"selection_rule": "random"}, STEPS),
    "mod, aux rule, accumulation": (
        "mod",
        {"selection_rule": "aux", "mod": {"aux_weight": 0.01}},
        STEPS | {"gradient_accumulation_steps": 3},
    ),
    "sdt, calibrated predictor, cosine β, FLOPs": (
        "sdt",
        {
            "predictor_weight": 0.01,
            "selection_rule": "calibrated_predictor",
            "surprise": {"beta_schedule": "cosine", "beta_warmup_steps": 3},
        },
        FLOPS,
    ),
    "sdt, trained by the threshold, FLOPs": ("sdt", {"training_rule": "threshold"}, FLOPS),
    "stt, top-k targets, tokens": ("stt", {}, TOKENS),
    "stt, threshold targets, FLOPs, long warm-up": (
        "stt",
        {"stt": {"targets": "threshold", "target_threshold": 0.7}},
        {"max_flops": 8e9, "optimizer": {"warmup_fraction": 0.3}},
    ),
}


def started(settings, data_dir, run_dir):
    process = FORK.Process(target=train, args=(settings, data_dir, run_dir), daemon=True)
    process.start()
    return process


def lines_of(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(name, make_settings, data_dir, tmp_path):
    architecture, model, training = CONFIGURATIONS[name]
    often = {"log_every": 2, "eval_every": 4, "checkpoint_every": 3}
    settings = make_settings(architecture, model=model, training=training | often)
    undisturbed = started(settings, data_dir, tmp_path / "straight")
    undisturbed.join()
    assert undisturbed.exitcode == 0

    killed = tmp_path / "killed"
    chance = random.Random(name)
    for lines in sorted(chance.choices(range(lines_of(tmp_path / "straight")), k=KILLS)):
        process = started(settings, data_dir, killed)
        while lines_of(killed) < lines:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # else nothing was tried
    process = started(settings, data_dir, killed)
    process.join()
    assert process.exitcode == 0

    assert_equal_ends(killed, tmp_path / "straight")
    one, two = (
        load_file(checkpoints(tmp_path / run)[-1] / "optimizer.safetensors") for run in ("straight", "killed")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert not [path for path in tmp_path.rglob("*") if ".new-" in path.name]
