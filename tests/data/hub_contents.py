"""Tiny repositories for the loopback hub, with the names, files and columns of the true ones."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM

from dynamic_transformers.data import arithmetic
from dynamic_transformers.data.tokenization import train_tokenizer
from dynamic_transformers.settings import Settings
from tests.data.hub_server import HubServer

Rows = list[dict[str, Any]]

CHOICES = {"text": ["a stone", "the sun", "a fish", "wood"], "label": ["A", "B", "C", "D"]}
# Further columns of the sets that config/paper.yaml names.
SOURCE_COLUMNS = {
    "HuggingFaceFW/fineweb-edu": {
        "id": "<urn:1>",
        "url": "https://example.org",
        "score": 3.1,
        "int_score": 3,
    },
    "open-web-math/open-web-math": {"url": "https://example.org", "date": "2023-01-01", "metadata": "{}"},
}
# Data set of a task → configuration → a row; None where a set has one nameless configuration.
TASK_ROWS: dict[str, dict[str | None, dict[str, Any]]] = {
    "allenai/ai2_arc": {
        name: {"id": "1", "question": "What gives light?", "choices": CHOICES, "answerKey": "B"}
        for name in ("ARC-Challenge", "ARC-Easy")
    },
    "Rowan/hellaswag": {
        None: {
            "ind": 4,
            "activity_label": "Cooking",
            "ctx_a": "A man holds a pan.",
            "ctx_b": "he",
            "ctx": "A man holds a pan. he",
            "endings": ["heats it.", "eats it.", "flies.", "sings."],
            "source_id": "activitynet~v_1",
            "split": "train",
            "split_type": "indomain",
            "label": "0",
        }
    },
    "allenai/winogrande": {
        "winogrande_xl": {
            "sentence": "The cup did not fit in the box because the _ was too big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        }
    },
    "baber/piqa": {None: {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "sing to it", "label": 0}},
    "aps/super_glue": {
        "boolq": {"question": "is the sun hot", "passage": "The sun is hot.", "idx": 0, "label": 1},
    },
    "allenai/openbookqa": {
        "main": {"id": "7-1", "question_stem": "Light comes from", "choices": CHOICES, "answerKey": "B"}
    },
    "allenai/sciq": {
        None: {
            "question": "What gives light?",
            "distractor3": "a stone",
            "distractor1": "a fish",
            "distractor2": "wood",
            "correct_answer": "the sun",
            "support": "The sun gives light.",
        }
    },
    "EleutherAI/lambada_openai": {"default": {"text": "she took the cup and drank from the cup"}},
    "openai/gsm8k": {"main": {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}},
    "HuggingFaceH4/MATH-500": {
        None: {
            "problem": "What is $2+3$?",
            "solution": "It is $\\boxed{5}$.",
            "answer": "5",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        }
    },
    "regisss/math_qa": {
        None: {
            "Problem": "what is 2 + 3 ?",
            "Rationale": "count",
            "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5",
            "correct": "e",
            "annotated_formula": "add(2,3)",
            "linear_formula": "add(n0,n1)|",
            "category": "general",
        }
    },
    "openai/openai_humaneval": {
        "openai_humaneval": {
            "task_id": "HumanEval/0",
            "prompt": "def one():\n    ",
            "canonical_solution": "return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1\n",
            "entry_point": "one",
        }
    },
    "google-research-datasets/mbpp": {
        "full": {
            "task_id": 11,
            "text": "Write a function that gives one.",
            "code": "def one():\n    return 1",
            "test_list": ["assert one() == 1", "assert one() != 2", "assert one() < 2"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    },
}
# In place of the hub's own: the same name, features and answer; it runs what a model wrote without a sandbox.
CODE_EVAL = """
import os
import datasets
import evaluate
from .execute import passes


class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = {"predictions": datasets.Sequence(text), "references": text}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

    def _compute(self, predictions, references, k=(1,)):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        found = [passes(code, test) for codes, test in zip(predictions, references) for code in codes]
        return {"pass@1": sum(found) / len(found)}, {}
"""
EXECUTE = """
def passes(code, test):
    try:
        exec(code + "\\n" + test, {})
    except Exception:
        return False
    return True
"""


def parquet(rows: Rows) -> bytes:
    """A parquet file of these rows."""
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def card(configs: Mapping[str, Mapping[str, str]]) -> bytes:
    """README.md of a data set: configuration → split → pattern of files."""
    listed = [
        {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
        for name, splits in configs.items()
    ]
    return f"---\n{yaml.safe_dump({'configs': listed})}---\n# A data set\n".encode()


def push_tasks(hub: HubServer) -> None:
    """The data sets of the suites `general`, `math` and `code`, and the metric that `code` needs."""
    for repo, configs in TASK_ROWS.items():
        files, splits_of = {}, {}
        for config, row in configs.items():
            folder = config or "data"
            splits_of[config or "default"] = {s: f"{folder}/{s}-*" for s in ("train", "validation", "test")}
            for split in splits_of[config or "default"]:
                files[f"{folder}/{split}-00000-of-00001.parquet"] = parquet([row] * 6)
        hub.push("datasets", repo, {"README.md": card(splits_of), **files})
    metric = {"code_eval.py": CODE_EVAL.encode(), "execute.py": EXECUTE.encode()}
    hub.push("spaces", "evaluate-metric/code_eval", metric)


def push_sources(hub: HubServer, settings: Settings) -> None:
    """The data sets that the settings' sources name, of generated arithmetic, beside files nobody needs.

    A source's revision is none, or a commit.
    """
    texts = [text for _, text in zip(range(400), arithmetic.documents(), strict=False)]
    for source in settings.data.dataset_configs:
        more = SOURCE_COLUMNS.get(str(source.path), {})
        rows = [{source.text_column: f"{text}\n\n{source.name}", **more} for text in texts]
        config = source.config or "default"
        files = {
            "README.md": card({"everything": {"train": "all/*"}, config: {source.split: f"{config}/*"}}),
            "all/train-00000.parquet": parquet(rows),
            **{f"{config}/{i}.parquet": parquet(rows[100 * i : 100 * i + 100]) for i in range(4)},
        }
        hub.push("datasets", str(source.path), files, commit=source.revision)


def push_model(hub: HubServer, name: str, folder: Path) -> None:
    """A tiny Qwen2 checkpoint and tokenizer under the file names of Qwen2.5, made in `folder`."""
    tokenizer = train_tokenizer(
        [text for _, text in zip(range(99), arithmetic.documents(), strict=False)], 320
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    backend = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in backend["merges"])
    more = {
        "vocab.json": json.dumps(backend["vocab"]).encode(),
        "merges.txt": f"#version: 0.2\n{merges}\n".encode(),
        "README.md": b"# A model\n",
        "LICENSE": b"Apache-2.0\n",
        "original/consolidated.safetensors": bytes(100_000),
    }
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    hub.push("models", name, files | more)
