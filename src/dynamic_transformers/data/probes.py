"""Small tasks made of held-out documents: perplexity by source, cloze, and unseen arithmetic.

The tasks do not depend on the run's seed: runs that differ in it answer the same questions.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_transformers.data import arithmetic
from dynamic_transformers.data.documents import Corpus, Document
from dynamic_transformers.data.mixing import shuffled
from dynamic_transformers.settings import EMBEDDED, DataSettings, UserError

PERPLEXITY_DOCUMENTS = 40
PERPLEXITY_CHARACTERS = 1200
CONTEXT_CHARACTERS = 200
CHOICE_CHARACTERS = 40
CHOICES = 4
# Small problems are nearly all in the training data: without a limit, long products would prevail.
LARGEST_ANSWER = 999

_WORD_GAP = re.compile(r"(?<=\S) (?=\S)")

logger = logging.getLogger("dynamic_transformers")


def write_tasks(folder: Path, corpus: Corpus, data: DataSettings) -> None:
    """Write `perplexity_<source>.jsonl`, `cloze.jsonl` and `arithmetic.jsonl`.

    A task without examples (none asked, or all documents too short) gets no file.

    Raises:
        UserError: the training documents leave too few unseen arithmetic questions.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for name, documents in corpus.splits["test"].items():
        chosen = shuffled(documents, 0, "perplexity")[:PERPLEXITY_DOCUMENTS]
        tasks[f"perplexity_{name}"] = [{"text": document.text[:PERPLEXITY_CHARACTERS]} for document in chosen]
    generated = {source.name for source in data.dataset_configs if source.path == EMBEDDED} & {"math"}
    written = {name: texts for name, texts in corpus.splits["test"].items() if name not in generated}
    tasks["cloze"] = cloze(written, data.cloze_examples)
    train_texts = (document.text for documents in corpus.splits["train"].values() for document in documents)
    tasks["arithmetic"] = unseen_arithmetic(train_texts, data.arithmetic_examples)
    folder.mkdir()
    for name, examples in tasks.items():
        if not examples:
            logger.warning("task %s: no examples, no file", name)
            continue
        lines = [json.dumps(example) + "\n" for example in examples]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def cloze(test_documents: Mapping[str, Sequence[Document]], examples: int) -> list[dict[str, Any]]:
    """Which of four continuations, one space and 39 characters each, goes on the context?

    Sources take turns. The wrong continuations are from three other documents of the same source.
    """
    pools = {}
    for name, documents in test_documents.items():
        ordered = shuffled(documents, 0, "cloze")
        long_enough = [document.text for document in ordered if _gaps(document.text)]
        if len(long_enough) >= CHOICES:
            pools[name] = long_enough
    if not pools:
        return []
    rng = random.Random("cloze")
    answers = [index % CHOICES for index in range(examples)]
    rng.shuffle(answers)
    found = []
    for index, answer in enumerate(answers):
        texts = list(pools.values())[index % len(pools)]
        own = index // len(pools) % len(texts)
        if example := _cloze_example(texts[own], texts[:own] + texts[own + 1 :], answer, rng):
            found.append(example)
    return found


def unseen_arithmetic(train_texts: Iterable[str], examples: int) -> list[dict[str, Any]]:
    """Questions in the form of the generated documents whose expression no training text has.

    Raises:
        UserError: there are not enough such questions.
    """
    seen = {key for text in train_texts for key in arithmetic.expressions(text)}
    rng = random.Random("arithmetic")
    answers = [index % CHOICES for index in range(examples)]
    rng.shuffle(answers)
    found: list[dict[str, Any]] = []
    for _ in range(1000 * examples):
        if len(found) == examples:
            break
        problem = arithmetic.sample_problem(rng)
        if problem.key in seen or problem.answer > LARGEST_ANSWER:
            continue
        seen.add(problem.key)
        answer = answers[len(found)]
        choices = arithmetic.distractors(problem, rng)
        choices.insert(answer, problem.answer)
        found.append(
            {"question": problem.question, "choices": [f" {choice}" for choice in choices], "answer": answer}
        )
    if len(found) < examples:
        raise UserError(
            f"data.arithmetic_examples={examples}: the training data leave only {len(found)} unseen questions"
        )
    return found


def _gaps(text: str) -> list[int]:
    """Places of single spaces between words with a context in front and a continuation behind."""
    end = max(len(text) - CHOICE_CHARACTERS + 1, 0)
    return [match.start() for match in _WORD_GAP.finditer(text, CONTEXT_CHARACTERS, end)]


def _cloze_example(own: str, others: Sequence[str], answer: int, rng: random.Random) -> dict[str, Any] | None:
    for _ in range(100):  # documents that repeat each other may have no four different continuations
        cut = rng.choice(_gaps(own))
        choices = [_continuation(text, rng.choice(_gaps(text))) for text in rng.sample(others, CHOICES - 1)]
        choices.insert(answer, _continuation(own, cut))
        if len(set(choices)) == CHOICES:
            context = own[cut - CONTEXT_CHARACTERS : cut]
            first_whole_word = re.sub(r"^\S*\s+", "", context)
            return {"context": first_whole_word or context, "choices": choices, "answer": answer}
    return None


def _continuation(text: str, start: int) -> str:
    return text[start : start + CHOICE_CHARACTERS]
