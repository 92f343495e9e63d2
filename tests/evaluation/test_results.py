"""results.json grows with each bench, whoever writes it at once, and is found unwritable before the tasks."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamic_transformers.cli import COMMANDS
from dynamic_transformers.evaluation.results import add_results, identity, read_results, results_path
from dynamic_transformers.settings import UserError


def result(task, value, **conditions):
    return {
        "results": {task: {"acc,none": value}},
        "config": {"tasks": [task], **conditions},
        "configs": {task: conditions},
        "realised": {task: {"tokens": 7}},
    }


MODEL = {"path": "/models/a", "sha256": "1" * 64}


def test_other_tasks_are_added_and_the_same_replaced(tmp_path):
    file = tmp_path / "results.json"
    add_results(file, result("a", 0.1, limit=2), MODEL)
    add_results(file, result("b", 0.2, limit=None), MODEL)
    add_results(file, result("a", 0.3, limit=5), MODEL)
    found = json.loads(file.read_text())
    assert found["results"] == {"a": {"acc,none": 0.3}, "b": {"acc,none": 0.2}}
    assert found["configs"] == {"a": {"limit": 5}, "b": {"limit": None}}
    assert set(found["realised"]) == {"a", "b"}
    assert found["config"] == {"tasks": ["a"], "limit": 5} and found["model"] == MODEL


def test_benches_at_once_are_all_kept(tmp_path):
    file = tmp_path / "results.json"
    names = [f"task{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: add_results(file, result(name, 0.5), MODEL), names))
    assert sorted(json.loads(file.read_text())["results"]) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def bench(*arguments):
    command, add_arguments, _ = COMMANDS["bench"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command(parser.parse_args(arguments))


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path):
    unwritable = "/proc/self"  # even root writes no file there
    with pytest.raises(UserError, match=r"/proc/self/results.json: cannot be written .*--output_path"):
        bench("--model_path", unwritable)
    with pytest.raises(UserError, match="no exported model"):  # the next thing that is wrong
        bench("--model_path", unwritable, "--output_path", str(tmp_path / "new/r.json"))


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--seed", "-1", "must be in [0, 4294967295]"),
        ("--seed", "1_0", "must be a whole number"),
        ("--num_fewshot", "-1", "must be in [0, 1000]"),
        ("--limit", "0", "must be at least 1"),
        ("--limit", "many", "must be a whole number"),
        ("--batch_size", "0", "must be in [1, 1048576]"),
    ],
)
def test_a_flag_has_the_range_of_its_setting(tmp_path, capsys, flag, value, words):
    with pytest.raises(SystemExit) as end:
        bench("--model_path", str(tmp_path), flag, value)
    assert end.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"error: argument {flag}: {flag[2:]}={value}: {words}")
    )


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "results.json"), ("new/x.json", "new/x.json"), (".", "results.json")]
)
def test_where_results_go(tmp_path, given, expected):
    assert results_path(tmp_path, given and tmp_path / given) == tmp_path / expected
    assert (tmp_path / expected).parent.is_dir()


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 3, "configs": {}}', "{}"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="holds no results of bench"):
        read_results(results_path(tmp_path, None), MODEL)
    assert (tmp_path / "results.json").read_text() == content


def test_a_model_folder_that_is_missing_is_not_made(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        results_path(tmp_path / "none", None)
    assert not Path(tmp_path / "none").exists()


def test_results_of_another_model_are_not_mixed_in(tmp_path):
    """In a file that both are told to write, and beside weights that are not those of the results."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(f"weights of {name}")
    file = tmp_path / "results.json"
    add_results(file, result("task", 0.1), identity(tmp_path / "a"))
    with pytest.raises(UserError) as error:
        bench("--model_path", str(tmp_path / "b"), "--output_path", str(file))
    assert str(error.value) == (
        f"{file}: holds results of another model, {tmp_path}/a; name another file with --output_path"
    )
    (tmp_path / "a").rename(tmp_path / "moved")
    assert read_results(file, identity(tmp_path / "moved"))["results"]
    (tmp_path / "moved/model.safetensors").write_text("trained on")
    with pytest.raises(UserError, match="holds results of another model"):
        add_results(file, result("task", 0.2), identity(tmp_path / "moved"))
    assert json.loads(file.read_text())["results"] == {"task": {"acc,none": 0.1}}
