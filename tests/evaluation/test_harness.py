"""bench.py end to end on the embedded tasks against figures computed here from the logits; refusals."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dynamic_transformers.cli import routing_command
from dynamic_transformers.evaluation import harness
from dynamic_transformers.evaluation.exported import load_model
from dynamic_transformers.evaluation.harness import render_table, run_benchmarks
from dynamic_transformers.evaluation.suites import expand_tasks
from dynamic_transformers.manifest import write_manifest
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import PROJECT_ROOT, UserError

TEXTS = ["the cat sat on the mat. " * repeats for repeats in (1, 2, 3, 5, 40)] + ["π ≈ 3.14\n\n  né 1848"]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CLOZE = [
    {"context": f"the {a} and {b}", "choices": [f" {a}", " dog sat", " the mat is", " é on"], "answer": i % 4}
    for i, (a, b) in enumerate(zip(WORDS * 3, WORDS[1:] * 3, strict=False))
]
ARITHMETIC = [
    {"question": f"3 + {n} =", "choices": [f" {n + 1}", f" {n + 2}", f" {n + 3}", " 40"], "answer": 2}
    for n in range(20)
]
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,  # shorter than the longest text: the rolling windows are tested too
    "initializer_range": 0.3,  # sharp predictions, so that no two choices tie
}


def save_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE into `folder`; returns its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standard")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=save_tokenizer(folder), **SIZE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mod_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mod")
    config_class, model_class = ARCHITECTURES["mod"].config_class, ARCHITECTURES["mod"].model_class
    torch.manual_seed(0)
    config = config_class(vocab_size=save_tokenizer(folder), capacity=0.5, **SIZE)
    model_class(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "exp [1] a::b %20 ~ #ü"
    folder.mkdir()
    (folder / "tasks").mkdir()
    contents = {
        "perplexity_prose": [{"text": text} for text in TEXTS],
        "cloze": CLOZE,
        "arithmetic": ARITHMETIC,
    }
    for name, rows in contents.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "tasks" / f"{name}.jsonl").write_text(lines)
    write_manifest(folder, "prepare_data", {}, {})
    return folder


@pytest.fixture(scope="module")
def bench(model_dir: Path, data_dir: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Output of one real run, with the data folder taken from the model's manifest, and its results.json."""
    write_manifest(model_dir, "export", {}, {"data": data_dir})
    command = [sys.executable, str(PROJECT_ROOT / "bench.py"), "--model_path", str(model_dir)]
    options = ["--tasks", "quick_test", "--batch_size", "4", "--num_fewshot", "3"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT_ROOT / "src")}
    answer = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer, json.loads((model_dir / "results.json").read_text())


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, prefix: list[int], target: list[int]) -> float:
    """Sum in nats of `target` after `prefix`, one row, no padding."""
    logits = model(torch.tensor([prefix + target])).logits[0, len(prefix) - 1 : -1]
    return logits.log_softmax(-1)[range(len(target)), target].sum().item()


def direct_bits_per_byte(model_dir: Path) -> float:
    """Bits per byte, the text cut in windows of the model's context, each after the last token before it."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    width = SIZE["max_position_embeddings"]
    nats = 0.0
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        nats -= log_likelihood(model, [tokenizer.bos_token_id], tokens[:width])
        for start in range(width, len(tokens), width):
            stop = min(start + width, len(tokens))
            context = tokens[stop - width - 1 : start]
            nats -= log_likelihood(model, context, tokens[start:stop])
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


def direct_accuracy(model_dir: Path, questions: list[tuple[str, list[str], int]]) -> dict[str, float]:
    """Accuracy of the likeliest choice, and of the likeliest per character."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    hits = {"acc,none": 0, "acc_norm,none": 0}
    for context, choices, answer in questions:
        prefix = tokenizer(context)["input_ids"]
        sums = [
            log_likelihood(model, prefix, tokenizer(context + choice)["input_ids"][len(prefix) :])
            for choice in choices
        ]
        per_character = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        hits["acc,none"] += sums.index(max(sums)) == answer
        hits["acc_norm,none"] += per_character.index(max(per_character)) == answer
    return {metric: count / len(questions) for metric, count in hits.items()}


def test_perplexity_is_that_of_the_logits(bench: tuple, model_dir: Path) -> None:
    found = bench[1]["results"]["dt_perplexity_prose"]
    expected = direct_bits_per_byte(model_dir)
    assert found["bits_per_byte,none"] == pytest.approx(expected, rel=1e-3)
    assert found["byte_perplexity,none"] == pytest.approx(2**expected, rel=1e-3)
    assert found["word_perplexity,none"] > found["byte_perplexity,none"]


def test_accuracy_is_that_of_the_likeliest_choice(bench: tuple, model_dir: Path) -> None:
    cloze = [(row["context"], row["choices"], row["answer"]) for row in CLOZE]
    arithmetic = [(row["question"], row["choices"], row["answer"]) for row in ARITHMETIC]
    for task, questions in (("dt_cloze", cloze), ("dt_arithmetic", arithmetic)):
        found = bench[1]["results"][task]
        expected = direct_accuracy(model_dir, questions)
        assert {metric: found[metric] for metric in expected} == pytest.approx(expected)
    assert 0 < bench[1]["results"]["dt_cloze"]["acc,none"] < 1


def test_results_say_how_they_were_made_and_what_was_not_done(bench: tuple) -> None:
    answer, result = bench
    assert set(result) == {"model", "results", "config", "configs", "realised"}
    made = {
        "batch_size": 4,
        "limit": None,
        "seed": 0,
        "dtype": "fp32",
        "selection_rule": None,
        "causal": True,
        "label": None,
    }
    shots = dict.fromkeys(("dt_arithmetic", "dt_cloze", "dt_perplexity_prose"), 0)
    assert result["config"] == {"tasks": ["quick_test"], "num_fewshot": shots, **made}
    assert result["configs"] == {task: {"num_fewshot": 0, **made} for task in shots}
    lines = [line for line in answer.stderr.splitlines() if "num_fewshot" in line]
    assert lines == [f"{', '.join(shots)}: fixed at 0 examples; num_fewshot=3 is not used"]
    assert set(result["realised"]) == set(shots)
    assert all(realised["fraction"] is None for realised in result["realised"].values())
    assert "bits_per_byte" in answer.stdout
    assert "non-causal" not in answer.stdout
    for chatter in ("is defined, but", "few-shot", "kwargs", "Running loglikelihood"):
        assert chatter not in answer.stderr


def test_topk_is_labelled_and_changes_the_scores(mod_dir: Path, data_dir: Path) -> None:
    def run(rule: str | None) -> dict:
        return run_benchmarks(
            mod_dir, ["dt_perplexity_prose"], data_dir=data_dir, batch_size=4, limit=3, selection_rule=rule
        )

    own, topk = run(None), run("topk")
    assert (own["config"]["selection_rule"], own["config"]["causal"]) == ("threshold", True)
    assert (topk["config"]["selection_rule"], topk["config"]["causal"]) == ("topk", False)
    assert own["config"]["label"] is None and topk["config"]["label"] == "non-causal upper bound"
    assert render_table(topk).title == "non-causal upper bound"
    realised = own["realised"]["dt_perplexity_prose"]
    cells = [list(column.cells) for column in render_table(own).columns]
    row = cells[1].index("tokens routed (sd)")
    assert cells[2][row] == f"{realised['fraction']['mean']:.4f} ({realised['fraction']['sd']:.4f})"
    assert cells[2][row + 1] == f"{realised['forward_flops_per_token']:.3e}"
    key = "bits_per_byte,none"
    assert own["results"]["dt_perplexity_prose"][key] != topk["results"]["dt_perplexity_prose"][key]
    assert topk["results"]["dt_perplexity_prose"]["sample_len"] == 3


@pytest.mark.parametrize("rule", ["predictor", "aux", "best"])
def test_a_rule_that_the_model_lacks_is_refused(mod_dir: Path, data_dir: Path, rule: str) -> None:
    with pytest.raises(UserError, match=f"selection_rule={rule}"):
        run_benchmarks(mod_dir, ["quick_test"], data_dir=data_dir, batch_size=4, selection_rule=rule)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_easyy"], "did you mean arc_easy"),
        (["quick_tset"], "did you mean quick_test"),
        (["code"], "humaneval, mbpp.*--confirm_run_unsafe_code"),
        (["arc_easy", "mbpp_plus"], "mbpp_plus.*--confirm_run_unsafe_code"),
        (["longproc"], "longproc_pseudo_to_code_2k.*--confirm_run_unsafe_code"),
    ],
)
def test_unknown_and_unsafe_tasks_are_refused(model_dir: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_benchmarks(model_dir, tasks, data_dir=None, batch_size=4)
    assert "\n" not in str(caught.value)


def test_a_task_that_cannot_be_read_is_named(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "cloze.jsonl").write_text('{"context": \n')
    with pytest.raises(UserError, match=r"'dt_cloze' cannot be loaded: .+") as caught:
        run_benchmarks(model_dir, ["quick_test"], data_dir=tmp_path, batch_size=4)
    assert "\n" not in str(caught.value)


def test_a_plain_model_has_no_rule_to_replace(model_dir: Path) -> None:
    with pytest.raises(UserError, match="a qwen2 model routes nothing"):
        run_benchmarks(model_dir, ["arc_easy"], data_dir=None, batch_size=4, selection_rule="topk")


def test_without_lm_eval_its_installation_is_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UserError, match=r"lm-eval is not installed: pip install 'lm-eval\[hf\]'"):
        run_benchmarks(model_dir, ["quick_test"], data_dir=None, batch_size=4)


def spoil(folder: Path, fault: str) -> None:
    """Weights as a copy that broke off, or a converter that knows only part of the model, leaves them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if fault == "one missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif fault == "router missing":
        tensors = {name: tensor for name, tensor in tensors.items() if ".routers." not in name}
    elif fault == "other shape":
        tensors["model.norm.weight"] = torch.ones(7)
    elif fault == "one more":
        tensors["model.extra"] = torch.ones(7)
    save_file(tensors, file, metadata={"format": "pt"})
    if fault == "cut":
        os.truncate(file, 5000)
    if fault == "no file":
        file.unlink()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("one missing", "weights are missing: model.layers.1.mlp.up_proj.weight"),
        ("router missing", "weights are missing: model.routers."),
        ("other shape", "weights have another shape than config.json says: model.norm.weight"),
        ("one more", "weights are of another model than config.json says: model.extra"),
        ("cut", "weights cannot be read: "),
        ("no file", "weights cannot be read: "),
    ],
)
def test_weights_that_are_missing_are_never_made_up(
    mod_dir: Path, data_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str, words: str
) -> None:
    folder = shutil.copytree(mod_dir, tmp_path / "model")
    spoil(folder, fault)
    for load in (
        lambda: run_benchmarks(folder, ["dt_cloze"], data_dir=data_dir, batch_size=4, limit=1),
        lambda: load_model(folder),
        lambda: routing_command(
            argparse.Namespace(model_path=folder, text="a", file=None, output_dir=tmp_path)
        ),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert str(error.value).startswith(f"{folder}: ") and words in str(error.value)
        assert "\n" not in str(error.value)
    assert not caplog.messages


@pytest.fixture
def generating(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The task dt_arithmetic, with answers of up to 5 tokens that the model writes."""
    (task,) = expand_tasks(["dt_arithmetic"], data_dir).values()
    assert isinstance(task, dict)
    for name in ("doc_to_choice", "metric_list", "target_delimiter"):
        task.pop(name)
    task |= {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    task |= {"generation_kwargs": {"until": ["no such text"], "max_gen_toks": 5}}
    monkeypatch.setattr(harness, "expand_tasks", lambda *_: {"dt_arithmetic": task})
    return task


def test_a_task_whose_answers_are_as_long_as_the_context_is_refused(
    model_dir: Path, data_dir: Path, generating: dict[str, Any]
) -> None:
    context = harness.load_config(model_dir).max_position_embeddings
    context = max(context, harness.SHORTEST_CONTEXT)
    generating["generation_kwargs"]["max_gen_toks"] = context
    words = f"^task 'dt_arithmetic': its answers have up to {context} tokens, the model's context {context}: "
    with pytest.raises(UserError, match=words):
        run_benchmarks(model_dir, ["dt_arithmetic"], data_dir=data_dir, batch_size=4, limit=1)
    generating["generation_kwargs"]["max_gen_toks"] = context - 1
    run_benchmarks(model_dir, ["dt_arithmetic"], data_dir=data_dir, batch_size=1, limit=1)


def test_a_task_says_how_long_a_text_is_not_the_model(
    model_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generating: dict[str, Any],
) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"max_new_tokens": 40, "do_sample": false}')
    lengths = []

    def generate(model, *arguments, **options):
        text = generate_as_ever(model, *arguments, **options)
        lengths.append(text.shape[1] - options["input_ids"].shape[1])
        return text

    generate_as_ever = Qwen2ForCausalLM.generate
    monkeypatch.setattr(Qwen2ForCausalLM, "generate", generate)
    run_benchmarks(tmp_path / "model", ["dt_arithmetic"], data_dir=data_dir, batch_size=4, limit=4)
    assert lengths == [5]
