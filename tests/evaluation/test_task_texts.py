"""`task-texts`: what lm-eval shows a model of its tasks, in the file that decontamination reads."""

import json
import subprocess
import sys

import pytest

from dynamic_transformers.data.decontamination import Contamination
from dynamic_transformers.evaluation import task_index
from dynamic_transformers.evaluation.task_texts import task_documents
from dynamic_transformers.settings import PROJECT_ROOT, UserError

# The kinds of tasks in our suites: choices after a question, a target after each beginning (winogrande),
# one target (lambada, gsm8k), several.
COMMON = (
    "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
)
TASKS = {
    "choices": 'output_type: multiple_choice\ndoc_to_text: "Q: {{q}}"\ndoc_to_choice: [Paris, Lima]\n'
    "doc_to_target: n\n",
    "beginnings": "output_type: multiple_choice\ndoc_to_text: n\ndoc_to_target: q\n"
    "doc_to_choice: \"{{['Ann said', 'Bob said']}}\"\n",
    "one": 'output_type: loglikelihood\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{\' Lima\'}}"\n'
    'target_delimiter: ""\n',
    "several": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: \"{{['x', 'y']}}\"\n",
    "number": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: n\n",
    "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: q\n',
}
TEXTS = {
    "choices": ["Q: Où? Paris", "Q: Où? Lima"],
    "beginnings": ["Ann said Où?", "Bob said Où?"],
    "one": ["Où? Lima"],
    "several": ["Où? x", "Où? y"],
    "number": ["Où? 1"],
    "rolling": [" Où?"],
}
QUESTION = "Which of the two towns at the foot of the mountains is the older one?"  # 15 words


@pytest.fixture
def task_dir(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text(json.dumps({"q": "Où?", "n": 1}) + "\n" + json.dumps({"q": QUESTION, "n": 0}) + "\n")
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, file=file) + task)
    (folder / "group.yaml").write_text("group: mine\ntask: [one, number]\n")
    return folder


def test_texts_are_those_that_a_model_is_shown(task_dir):
    names = [*(name for name in TASKS if name not in ("one", "number")), "mine"]
    found = {name: list(texts) for name, texts in task_documents(names, None, task_dir, None)}
    assert {name: texts[0] for name, texts in found.items()} == TEXTS
    assert all(len(texts) == 2 for texts in found.values())


def task_texts(*arguments):
    command = [sys.executable, "-m", "dynamic_transformers.cli", "task-texts", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)


def test_what_the_command_writes_is_what_decontamination_reads(task_dir, data_dir, tmp_path):
    file = tmp_path / "new" / "texts.jsonl"
    places = ("--task_dir", task_dir, "--data_dir", data_dir, "--output_path", file)
    result = task_texts("--tasks", "choices,quick_test", *places)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    counts = {name: [line["task"] for line in lines].count(name) for name in [line["task"] for line in lines]}
    assert set(counts) == {"choices", "dt_arithmetic", "dt_perplexity_math"}
    assert result.stdout.splitlines() == [
        *(f"{name}: {count} texts" for name, count in counts.items()),
        f"written: {file}",
    ]
    (first, *_) = map(json.loads, (data_dir / "tasks" / "arithmetic.jsonl").read_text().splitlines())
    shown = [line["text"] for line in lines if line["task"] == "dt_arithmetic"]
    assert shown[: len(first["choices"])] == [first["question"] + choice for choice in first["choices"]]
    known = Contamination.read(file)
    words = QUESTION.upper().replace("?", "").split()
    assert known.overlaps("\n".join(words[2:])) == "choices"
    assert known.overlaps("\n".join(words[3:])) is None
    assert known.overlaps("\n".join([*words[3:], "Lima"])) == "choices"  # with an answer, right or wrong
    limited = task_texts("--tasks", "choices", "--limit", 1, *places)
    assert limited.stdout.splitlines()[0] == "choices: 2 texts"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tasks", "arc_easyy", "--output_path", "x"], "did you mean arc_easy"),
        (["--tasks", "quick_test", "--output_path", "x"], "give --data_dir"),
        (["--tasks", ",", "--output_path", "x"], "no tasks given"),
        (
            ["--tasks", "general", "--output_path", "docs"],
            "docs: is a folder; name a file with --output_path",
        ),
        (["--tasks", "general", "--output_path", "/proc/x"], "/proc/x: cannot be written"),
        (["--tasks", "mbpp", "--output_path", "x"], "task 'mbpp' cannot be loaded"),  # no hub, but no consent
    ],
)
def test_mistakes_are_told_in_one_line(arguments, line, tmp_path):
    result = task_texts(*(str(tmp_path / "x") if word == "x" else word for word in arguments))
    assert result.returncode == 2 and not (tmp_path / "x").exists()
    assert line in result.stderr.splitlines()[-1] and result.stderr.splitlines()[-1].startswith("error: ")


def test_without_lm_eval_its_installation_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    monkeypatch.setattr(task_index, "task_manager", task_index.task_manager.__wrapped__)  # which keeps it
    with pytest.raises(UserError, match="lm-eval is not installed"):
        list(task_documents(["arc_easy"], None, None, None))
