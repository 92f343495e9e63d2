"""The commands of the README, as a user types them."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dynamic_transformers.cli import COMMANDS, read_text
from dynamic_transformers.command_line import run_command
from dynamic_transformers.settings import PROJECT_ROOT, UserError
from dynamic_transformers.step_log import step_log


def python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=PROJECT_ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("config_name", ["default", "my_experiment"])
def test_train_and_bench(config_name, tmp_path, micro_overrides):
    arguments = [] if config_name == "default" else [f"--config-name={config_name}"]
    place = (f"run.output_dir={tmp_path}", "run.name=run", "tracking.mlflow=false")
    trained = python("train.py", *arguments, *place, "training.max_steps=3", *micro_overrides)
    assert trained.returncode == 0, trained.stderr
    model = tmp_path / "run" / "final_model"
    assert f"model: {model}" in trained.stdout
    if config_name == "my_experiment":
        assert json.loads((model / "config.json").read_text())["capacity"] == 0.25
        command = ("bench.py", "--model_path", model, "--tasks", "quick_test", "--batch_size", 8)
        benched = python(*command)
        assert benched.returncode == 0, benched.stderr
        results = json.loads((model / "results.json").read_text())
        assert results["config"]["causal"] is True
        assert "dt_arithmetic" in results["results"] and "dt_arithmetic" in benched.stdout
        report = tmp_path / "report"
        command = ("-m", "dynamic_transformers.cli", "compare", tmp_path / "run", "--output_dir", report)
        compared = python(*command)
        assert compared.returncode == 0, compared.stderr
        assert str(report / "report.html") in compared.stdout and "mod" in compared.stdout


HEAVY = {"torch", "transformers", "datasets", "mlflow", "accelerate", "lm_eval", "matplotlib", "scipy", "kfp"}
SHOW_IMPORTS = """
import runpy, sys
try:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted(set(sys.modules) & HEAVY), file=sys.stderr)
""".replace("HEAVY", repr(HEAVY))
CLI = "src/dynamic_transformers/cli.py"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([CLI, "--help"], 0, ""),
        ([CLI, "trian"], 2, "error: trian: not a command"),
        (["train.py", "--help"], 0, ""),
        (["bench.py", "--help"], 0, ""),
        (["train.py", "model.tpye=mod"], 2, "error: model.tpye: no such key; did you mean model.type?"),
        (["train.py", "--config-name=nothing"], 2, "error: no configuration 'nothing'"),
        (["train.py", "training.resume=nonsense"], 2, "error: training.resume=nonsense: no such folder"),
        (
            ["train.py", "evaluation.tasks=[code]"],
            2,
            "error: humaneval, mbpp: runs code that the model writes",
        ),
        (
            ["train.py", "model.capacity=0.5"],
            2,
            "error: model.capacity=0.5: a standard model routes nothing",
        ),
        ([CLI, "prepare", "run.seed=-1"], 2, "error: run.seed=-1: must be in [0, 4294967295]"),
        ([CLI, "prepare", "run.output_dir=/etc/passwd"], 2, "error: run.output_dir: /etc/passwd is a file"),
        ([CLI, "routing", "--model_path=x", "--text=a"], 2, "error: x: no exported model"),
        ([CLI, "calibrate", "--model_path=x", "--data_dir=y"], 2, "error: x: no such folder"),
    ],
)
def test_help_and_mistakes_come_at_once(arguments, code, message):
    """In one line, and before anything is imported that takes seconds."""
    result = python("-c", SHOW_IMPORTS, *arguments)
    *lines, imported = result.stderr.splitlines()
    assert (result.returncode, imported) == (code, "[]")
    usage = (2 + len(COMMANDS)) * message.endswith("not a command")
    assert len(lines) <= 1 + usage and "".join(lines).startswith(message)


PRINTING = """
import argparse, logging, sys
from dynamic_transformers.command_line import run_command
def command(args):
    logging.basicConfig(stream=sys.stdout)
    logging.getLogger().warning("größe → γ")
    print("größe → γ")
run_command(command, argparse.ArgumentParser(), [])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_on_a_terminal_of_any_encoding_ends_no_command(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", PRINTING], env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert [line.removeprefix(b"WARNING:root:")[:2] for line in result.stdout.splitlines()] == [b"gr", b"gr"]


def test_commands_end_in_one_line_and_their_exit_code(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    def mistaken(args):
        raise UserError("a file name with\na line break: no such file")

    for command, code, line in (
        (interrupted, 130, "error: interrupted"),
        (mistaken, 2, "error: a file name with a line break: no such file"),
        (lambda args: None, 0, ""),
        (lambda args: 3, 3, ""),
    ):
        with pytest.raises(SystemExit) as end:
            run_command(command, argparse.ArgumentParser(), [])
        told = capsys.readouterr().err.strip()
        assert end.value.code == code and told.startswith(line) and bool(told) == bool(line)
        assert "\n" not in told
        if line:
            with pytest.raises((KeyboardInterrupt, UserError)):
                run_command(command, argparse.ArgumentParser(), ["--debug"])


def test_a_full_disk_or_a_folder_that_moved_is_told_in_one_line(capsys, tmp_path):
    def full(args):
        with Path("/dev/full").open("w") as file:  # a device on which nothing fits
            file.write("a")

    def full_to_a_library(args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full_beneath(args):
        try:
            full(args)
        except OSError as error:
            raise RuntimeError("cannot save") from error

    def moved(args):
        (tmp_path / "moved" / "metrics.jsonl").open("a")

    def wrong(args):
        (tmp_path / "metrics.jsonl").read_text()

    gone = f"{tmp_path}/moved/metrics.jsonl: its folder was moved or removed while the command ran"
    for command, line in (
        (full, "No space left on device"),
        (full_to_a_library, "No space left on device"),
        (full_beneath, "No space left on device"),
        (moved, gone),
    ):
        with pytest.raises(SystemExit) as end:
            run_command(command, argparse.ArgumentParser(), [])
        (told,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 1 and told.startswith("error: ") and line in told
        with pytest.raises((OSError, RuntimeError, SafetensorError)):
            run_command(command, argparse.ArgumentParser(), ["--debug"])
        with pytest.raises(SystemExit, match="1"), step_log(tmp_path / "step"):
            command(None)
        log = (tmp_path / "step.log").read_text()
        assert line in log and "Traceback" not in log
    with pytest.raises(FileNotFoundError):  # a fault of the program, whose traceback is needed
        run_command(wrong, argparse.ArgumentParser(), [])


def test_routing_reads_a_text_file_or_says_why_not(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8 \(at byte 3\)"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_every_test_file_is_collected(request):
    if request.config.args != request.config.getini("testpaths"):
        pytest.skip("only part of the suite was asked for")
    collected = {item.path for item in request.session.items}
    files = set((PROJECT_ROOT / "tests").rglob("*.py"))
    helpers = {
        "all_rows.py",
        "conftest.py",
        "fake_kfp.py",
        "fake_kubernetes.py",
        "fake_trainer.py",
        "hub_contents.py",
        "hub_server.py",
        "left_behind.py",
        "live_bytes.py",
        "pages.py",
        "real_docker.py",
        "run_contents.py",
        "runs.py",
        "servers.py",
        "stopping_server.py",
        "submissions.py",
        "synthetic_evaluations.py",
        "tiny.py",
        "train_jobs.py",
        "wandb_server.py",
    }
    assert {path.name for path in files - collected} == helpers
