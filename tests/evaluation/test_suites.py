"""The suites name tasks that lm-eval has and data sets that need no scripts; embedded tasks resolve."""

import sys
from pathlib import Path

import pytest

from dynamic_transformers.evaluation.suites import SUITES, embedded_tasks, expand_tasks
from dynamic_transformers.evaluation.task_index import check_tasks, manager_of, task_files, task_manager
from dynamic_transformers.settings import UserError

HUB_TASKS = [(task, dataset) for suite in SUITES.values() for task, dataset in suite.items()]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "tasks"
    folder.mkdir(parents=True)
    for name in ("perplexity_my_code", "perplexity_prose", "cloze", "arithmetic"):
        (folder / f"{name}.jsonl").write_text('{"text": "a"}\n')
    return tmp_path / "data"


@pytest.mark.parametrize(("task", "dataset"), HUB_TASKS)
def test_hub_task_exists_and_reads_the_approved_data_set(task: str, dataset: str) -> None:
    entry = task_manager(include_defaults=True).task_index[task]
    assert entry.cfg is not None
    assert entry.cfg["dataset_path"] == dataset
    assert not str(entry.cfg.get("dataset_name") or "").endswith(".py")
    assert not (entry.cfg.get("dataset_kwargs") or {}).get("trust_remote_code")


def test_only_the_code_suite_runs_code() -> None:
    index = task_manager(include_defaults=True).task_index
    unsafe = {task for task, _ in HUB_TASKS if (index[task].cfg or {}).get("unsafe_code")}
    assert unsafe == set(SUITES["code"])


def test_quick_test_is_what_the_data_folder_has(data_dir: Path) -> None:
    specs = expand_tasks(["quick_test"], data_dir)
    assert set(specs) == {"dt_perplexity_my_code", "dt_perplexity_prose", "dt_cloze", "dt_arithmetic"}
    for name, config in embedded_tasks(data_dir).items():
        assert specs[name].keys() == config.keys()
        assert config["task"] == name
        assert config["custom_dataset"]()["test"][:] == {"text": ["a"]}
        assert all({"aggregation", "higher_is_better"} <= set(metric) for metric in config["metric_list"])


def test_suites_and_names_mix_in_order_and_each_once(data_dir: Path) -> None:
    specs = expand_tasks(["mbpp", "dt_cloze", "code", "dt_cloze"], data_dir)
    assert list(specs) == ["mbpp", "dt_cloze", "humaneval"]
    assert specs["mbpp"] == "mbpp"


@pytest.mark.parametrize(
    ("tasks", "with_data", "message"),
    [
        (["quick_test"], False, "--data_dir"),
        (["dt_cloze"], False, "--data_dir"),
        (["dt_perplexity_math"], True, "dt_perplexity_prose"),
        ([], True, "no tasks"),
    ],
)
def test_mistakes_are_named(data_dir: Path, tasks: list[str], with_data: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand_tasks(tasks, data_dir if with_data else None)


def test_a_folder_without_task_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task files"):
        embedded_tasks(tmp_path)


@pytest.mark.parametrize(
    ("tasks", "consent", "message"),
    [
        ([], False, "no tasks given; suites: quick_test"),
        (["quick_tset"], False, "'quick_tset'; did you mean quick_test"),
        (["dt_nothing"], False, "'dt_nothing'; embedded ones"),
        (["code"], False, "humaneval, mbpp: .*confirm_run_unsafe_code"),
        (["general", "humaneval"], False, "^humaneval: "),
        (["mbpp_plus"], False, "^mbpp_plus: "),
        (["quick_test", "dt_cloze", "dt_perplexity_my_code", "general", "math", "arc_easy"], False, None),
        (["code", "mbpp_plus"], True, None),
    ],
)
def test_tasks_are_checked_without_data(tasks: list[str], consent: bool, message: str | None) -> None:
    if message is None:
        check_tasks(tasks, consent)
        return
    with pytest.raises(UserError, match=message) as caught:
        check_tasks(tasks, consent)
    assert "\n" not in str(caught.value)


def test_known_names_need_no_lm_eval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    task_manager.cache_clear()
    check_tasks(["quick_test", "general"], False)
    assert not caplog.messages
    check_tasks(["some_task_of_lm_eval"], False)
    assert caplog.messages == ["some_task_of_lm_eval: not checked, since lm-eval is not installed here"]


OWN = {
    "capitals.yaml": "task: capitals\ntag: [geography]\nload: !function rows.load\n",
    "deeper/rivers.yaml": "task: rivers\ntag: [geography]\nunsafe_code: true\n",
    "all.yaml": "group: mine\ntask: [capitals, arc_easy]\n",
}


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "my tasks"
    for name, text in OWN.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("tasks", "consent", "message"),
    [
        (["capitals", "quick_test", "general"], False, None),
        (["capitals", "mine", "mbpp_plus", "geography"], True, None),
        (["rivers"], False, "^rivers: runs code that the model writes"),
        (["geography"], False, "^rivers: runs code"),
        (
            ["capitols"],
            False,
            "no suite or lm-eval task 'capitols', and none in .*my tasks; did you mean capitals",
        ),
    ],
)
def test_tasks_of_a_folder_are_known(task_dir, tasks, consent, message) -> None:
    if message is None:
        check_tasks(tasks, consent, task_dir)
        return
    with pytest.raises(UserError, match=message):
        check_tasks(tasks, consent, task_dir)


def test_lm_evals_own_tasks_are_read_only_if_they_may_be_needed(task_dir) -> None:
    assert manager_of(["capitals", "rivers"], task_dir).all_tasks == [
        "capitals",
        "geography",
        "mine",
        "rivers",
    ]
    assert "arc_easy" in manager_of(["capitals", "arc_easy"], task_dir).all_tasks
    assert "arc_easy" in manager_of(["mine"], task_dir).all_tasks


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("capitals.yaml", "task: [", r"capitals\.yaml: no YAML: "),
        (
            "capitals.yaml",
            "task: dt_cloze",
            "'dt_cloze' is a name of ours; .* quick_test, general, .* or dt_",
        ),
        ("capitals.yaml", "group: math\ntask: [a]", "'math' is a name of ours"),
        ("capitals.yaml", "tusk: capitals", "no task in it; a task is a file .* `task: NAME`"),
        ("capitals.yml", "task: capitals", "no task in it"),
        (None, None, "my tasks: no such folder"),
    ],
)
def test_a_folder_that_gives_no_tasks_is_refused(tmp_path, name, text, message) -> None:
    folder = tmp_path / "my tasks"
    if name:
        folder.mkdir()
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        check_tasks(["quick_test"], False, folder)
    assert "\n" not in str(caught.value)


def test_files_of_a_folder_are_told_apart_by_content(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    for name in ("capitals.yaml", "capitals.jsonl", "__pycache__/rows.pyc"):
        (tmp_path / name).write_text("{}")
    before = task_files(tmp_path)
    assert set(before) == {"capitals.yaml", "capitals.jsonl"}
    (tmp_path / "capitals.jsonl").write_text("[]")
    assert task_files(tmp_path) != before
