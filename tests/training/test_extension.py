"""A run of another budget: what goes on, and what is refused."""

import pytest
from run_contents import STEPS, numbers, snapshot

from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.trainer import train


def test_a_finished_run_is_extended_as_if_it_had_not_ended(make_settings, data_dir, tmp_path):
    optimizer = {"optimizer": {"min_lr_fraction": 0.1}}
    run = train(make_settings("stt", training=optimizer | {"max_steps": 4}), data_dir, tmp_path / "run")
    longer = make_settings("stt", training=optimizer | {"max_steps": 8})
    train(longer, data_dir, run)
    assert read_manifest(run)["training_steps"] == 8
    rates = [line["train/learning_rate"] for line in numbers(run) if "train/learning_rate" in line]
    assert rates[4:] == pytest.approx([3e-4] * 4)  # where the schedule of 4 steps had ended
    with pytest.raises(UserError, match="has done 8 steps, more than the budget of 4 steps"):
        train(make_settings("stt", training=optimizer | {"max_steps": 4}), data_dir, run)


def test_an_extended_run_gets_a_new_schedule_only_if_that_is_said(run, make_settings, data_dir):
    before = snapshot(run)
    with pytest.raises(UserError, match=r"training\.reschedule=true"):
        train(make_settings("mod", training=STEPS | {"max_steps": 16}), data_dir, run)
    assert snapshot(run) == before
    train(make_settings("mod", training=STEPS | {"max_steps": 16, "reschedule": True}), data_dir, run)
    rates = [line["train/learning_rate"] for line in numbers(run) if "train/learning_rate" in line]
    assert rates[11] < rates[12] > rates[15]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"max_steps": 5}, "has done 12 steps, more than the budget of 5 steps"),
        (
            {"max_steps": None, "max_tokens": 200.0},
            "has done 1536 tokens, more than the budget of 200 tokens",
        ),
        ({"max_steps": 20}, r"learning rate ends at 0 after 12 steps; training\.reschedule=true"),
        ({"max_steps": None, "max_tokens": 1e6}, r"after 12 steps; .* over the 1000000 tokens asked for"),
    ],
)
def test_an_unfinished_run_is_not_taken_for_one_of_another_length(
    budget, message, unfinished, make_settings, data_dir
):
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=message):
        train(make_settings("mod", training=STEPS | budget), data_dir, unfinished)
    assert snapshot(unfinished) == before
