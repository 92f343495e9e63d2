"""Small tasks made of held-out documents: perplexity by source, cloze, and unseen arithmetic.

The tasks do not depend on the run's seed: runs that differ in it answer the same questions.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from dynamic_transformers.data import arithmetic
from dynamic_transformers.settings import EMBEDDED, DataSettings, UserError

PERPLEXITY_DOCUMENTS = 40
PERPLEXITY_CHARACTERS = 1200
CLOZE_DOCUMENTS = 1000  # of each source, of which questions are made
CONTEXT_CHARACTERS = 200
CHOICE_CHARACTERS = 40
CHOICES = 4

_WORD_GAP = re.compile(r"(?<=\S) (?=\S)")

logger = logging.getLogger("dynamic_transformers")


class TestTexts(Protocol):
    """Documents of the test split of a source, the lowest by a hash of `purpose` and text first."""

    def __call__(self, source: str, purpose: str, count: int, shortest: int) -> list[str]:
        """So many of at least `shortest` bytes."""
        ...


def write_tasks(
    folder: Path, test_texts: TestTexts, questions: Set[arithmetic.Key], data: DataSettings
) -> None:
    """Write `perplexity_<source>.jsonl`, `cloze.jsonl` and `arithmetic.jsonl`.

    A task without examples (none asked, or all documents are too short) gets no file.

    Args:
        questions: arithmetic expressions that the training documents have.

    Raises:
        UserError: the training documents leave too few unseen arithmetic questions.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    written: dict[str, list[str]] = {}
    for source in data.dataset_configs:
        texts = test_texts(source.name, "perplexity", PERPLEXITY_DOCUMENTS, 0)
        tasks[f"perplexity_{source.name}"] = [{"text": text[:PERPLEXITY_CHARACTERS]} for text in texts]
        if not (source.path == EMBEDDED and source.name == "math"):  # which is generated
            least = CONTEXT_CHARACTERS + CHOICE_CHARACTERS
            written[source.name] = test_texts(source.name, "cloze", CLOZE_DOCUMENTS, least)
    tasks["cloze"] = cloze(written, data.cloze_examples)
    tasks["arithmetic"] = unseen_arithmetic(questions, data.arithmetic_examples)
    folder.mkdir()
    for name, examples in tasks.items():
        if not examples:
            logger.warning("task %s: no examples, no file", name)
            continue
        lines = [json.dumps(example) + "\n" for example in examples]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def cloze(test_texts: Mapping[str, Sequence[str]], examples: int) -> list[dict[str, Any]]:
    """Which of four continuations, one space and 39 characters each, goes on the context?

    Sources take turns. The wrong continuations are from three other documents of the same source.
    """
    pools = {}
    for name, texts in test_texts.items():
        long_enough = [text for text in texts if _gaps(text)]
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


def unseen_arithmetic(asked: Set[arithmetic.Key], examples: int) -> list[dict[str, Any]]:
    """Questions in the form of the generated documents whose expression is not among those `asked`.

    Raises:
        UserError: there are not enough such questions.
    """
    seen = set(asked)
    rng = random.Random("arithmetic")
    answers = [index % CHOICES for index in range(examples)]
    rng.shuffle(answers)
    found: list[dict[str, Any]] = []
    for _ in range(1000 * examples):
        if len(found) == examples:
            break
        problem = arithmetic.sample_problem(rng)
        if problem.key in seen or problem.answer > arithmetic.LARGEST_ANSWER:
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
