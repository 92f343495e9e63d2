"""Loopback servers, and the command in this process."""

import kfp
import pytest
from fake_kfp import fake_kfp
from submissions import TOKEN, VARIABLES, write_package

from dynamic_transformers.launch import patience
from pipelines import progress, submit


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package") / "pipeline.yaml")


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / ".config/kfp/context.json"))
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(patience, "OUTAGE_SECONDS", 2.0)
    monkeypatch.setattr(progress, "OUTAGE_SECONDS", 2.0)


@pytest.fixture
def fake():
    with fake_kfp() as server:
        yield server


@pytest.fixture
def guarded():
    with fake_kfp(token=TOKEN) as server:
        yield server


@pytest.fixture
def run(capsys, package):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(host, *arguments):
        given = [] if "--package" in arguments else ["--package", package]
        with pytest.raises(SystemExit) as end:
            submit.main(["--host", host, *map(str, [*given, *arguments])])
        output, errors = capsys.readouterr()
        assert TOKEN not in output + errors
        return end.value.code, output, errors

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must end in one line, and gives it."""

    def call(host, *arguments):
        code, _, errors = run(host, *arguments)
        assert code == 2
        assert errors.startswith("error: ") and len(errors.splitlines()) == 1, errors
        return errors.removeprefix("error: ")

    return call
