"""Steps as processes and containers of this machine: how they are ended."""

import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from pipelines.local_steps import LocalSteps


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
    assert calls == [["sh", "-c", "kill -TERM -1"], "kill", "remove"]
    assert steps.run_container(engine, "train:1", ["sh"], {}) == 1 and len(calls) == 3
