"""Steps as processes and containers of this machine: how they are ended."""

import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import requests
from docker.errors import APIError

from pipelines.local_steps import END_ALL, LocalSteps


@contextmanager
def running(script, capsys):
    """A step that has printed `ready`; gives the steps and a list that will hold its exit code."""
    steps, codes = LocalSteps(), []
    thread = threading.Thread(target=lambda: codes.append(steps.run_process(["sh", "-c", script])))
    thread.start()
    output, deadline = "", time.monotonic() + 20
    while "ready" not in output:
        output += capsys.readouterr().out
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield steps, codes
    thread.join(20)
    assert not thread.is_alive()


def test_a_signal_reaches_what_a_step_has_started_and_is_waited_for(capsys, tmp_path):
    # The shell ends at once, what it has started writes its checkpoint first.
    child = (
        f"trap 'sleep 0.3; touch {tmp_path}/checkpoint; exit' TERM; echo ready; while :; do sleep 0.05; done"
    )
    with running(f'sh -c "{child}"; echo never', capsys) as (steps, codes):
        steps.stop(signal.SIGINT)
    assert codes == [-signal.SIGTERM] and (tmp_path / "checkpoint").exists()
    assert steps.run_process(["touch", str(tmp_path / "further")]) == 1  # a step that comes after the signal
    assert not (tmp_path / "further").exists()


def test_a_second_signal_does_not_wait(capsys):
    with running("trap '' TERM; echo ready; while :; do sleep 0.05; done", capsys) as (steps, codes):
        steps.stop(signal.SIGTERM)
        time.sleep(0.2)
        assert not codes
        steps.stop(signal.SIGINT)
    assert codes == [-signal.SIGKILL] and steps.signal == signal.SIGTERM


def test_what_a_step_prints_is_shown_and_its_exit_code_is_kept(capsys):
    steps = LocalSteps()
    assert (
        steps.run_process(["sh", "-c", "echo $GIVEN; printf '\\377\\n' >&2; exit 3"], {"GIVEN": "value"}) == 3
    )
    assert capsys.readouterr().out.splitlines()[:2] == ["value", "\ufffd"]
    assert not steps.ends


def test_a_container_is_ended_by_a_signal_to_what_runs_in_it():
    calls = []
    steps = LocalSteps()

    def logs(stream):
        steps.stop(signal.SIGTERM)
        yield b"checkpoint written\n"
        steps.stop(signal.SIGTERM)

    container = SimpleNamespace(
        logs=logs,
        exec_run=lambda command, detach: calls.append(command),
        kill=lambda: calls.append("kill"),
        wait=lambda: {"StatusCode": 143},
        remove=lambda force: calls.append("remove"),
    )
    engine = SimpleNamespace(containers=SimpleNamespace(run=lambda **options: container))
    assert steps.run_container(engine, "train:1", ["sh"], {}) == 143
    assert calls == [END_ALL, "kill", "remove"]
    assert steps.run_container(engine, "train:1", ["sh"], {}) == 1 and len(calls) == 3


@pytest.mark.parametrize("error", [APIError("409: is not running"), requests.ConnectionError("away")])
def test_an_engine_that_does_not_do_its_part_does_not_keep_a_signal_from_other_steps(error):
    steps, others = LocalSteps(), []

    def refuse(*arguments, **options):
        raise error

    def logs(stream):
        with steps.ended_by(others.append):
            steps.stop(signal.SIGTERM)
            steps.stop(signal.SIGTERM)
        yield b""

    container = SimpleNamespace(
        logs=logs, exec_run=refuse, kill=refuse, wait=lambda: {"StatusCode": 143}, remove=lambda force: None
    )
    engine = SimpleNamespace(containers=SimpleNamespace(run=lambda **options: container))
    assert steps.run_container(engine, "train:1", ["sh"], {}) == 143
    assert others == [False, True]


IN_NAMESPACE = ["unshare", "--user", "--pid", "--fork", "--kill-child", "--"]


@pytest.mark.skipif(
    subprocess.run([*IN_NAMESPACE, "sh", "-c", "[ $$ = 1 ]"], capture_output=True).returncode != 0,
    reason="no namespace of processes can be made here",
)
def test_a_signal_that_comes_before_the_step_runs_ends_it_all_the_same():
    """In a namespace of its own, as in a container: the shell is process 1, and the signal comes first."""
    step = "trap 'echo ended in order; exit 3' TERM; for i in 1 2 3 4 5 6 7 8 9; do sleep 1; done; echo never"
    end = " ".join(END_ALL[2:])
    # Nothing here may run as anything but process 1, or below it: `kill -TERM -1` reaches whatever is there.
    script = f'[ $$ = 1 ] || exit 9; ({end}) & i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sh -c "$0"'
    result = subprocess.run([*IN_NAMESPACE, "sh", "-c", script, step], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "ended in order\n"), result
