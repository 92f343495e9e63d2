"""Generated arithmetic: problems stated directly, with worked steps, or as a short story.

Every statement has the form `23 + 58 = 81`; the direct form, `Question: 23 + 58 = 81`, is also
the form of the arithmetic task, whose questions come from the same generator.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

DOCUMENTS = 4000
# Small problems are nearly all in the training data: without a limit, long products would prevail.
LARGEST_ANSWER = 999  # of a question
SEED = 20240402  # fixed: runs with different seeds share their documents, hence their test split

_PLACES = ("Ones", "Tens", "Hundreds", "Thousands")
_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goro", "Hana", "Ivan", "Juno", "Kofi", "Lena")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "pencils", "cards", "marbles", "tickets", "seeds")
# Of up to 18 digits: Python refuses to read thousands of them as a number.
_EXPRESSION = re.compile(r"(?<!\d)(\d{1,18}+)\s*+([-+*×])\s*+(\d{1,18}+)\s*+=")
_END_OF_EXPRESSION = re.compile(r"[-+*×]\s*+\d++\s*+=")  # searched five times as fast; most texts have none

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Problem:
    """`left operator right` with whole, non-negative numbers and answer."""

    left: int
    operator: str  # + - *
    right: int

    @property
    def answer(self) -> int:
        """Value of the expression."""
        if self.operator == "+":
            return self.left + self.right
        return self.left - self.right if self.operator == "-" else self.left * self.right

    @property
    def expression(self) -> str:
        """`23 + 58`."""
        return f"{self.left} {self.operator} {self.right}"

    @property
    def question(self) -> str:
        """Direct form without the answer: `Question: 23 + 58 =`."""
        return f"Question: {self.expression} ="

    @property
    def key(self) -> Key:
        """Identity for the search for leaks: 23 + 58 and 58 + 23 are the same."""
        return _key(self.left, self.operator, self.right)


def documents() -> Iterator[str]:
    """A few thousand documents of three to six problems each."""
    rng = random.Random(SEED)
    for _ in range(DOCUMENTS):
        problems = [sample_problem(rng) for _ in range(rng.randint(3, 6))]
        yield "\n\n".join(_render(problem, rng) for problem in problems)


def sample_problem(rng: random.Random) -> Problem:
    """One problem: sums and differences up to three digits, products of up to three by up to two."""
    operator = rng.choices("+-*", (4, 3, 3))[0]
    left = _sample_number(rng, (1, 4, 3))
    right = _sample_number(rng, (1, 2) if operator == "*" else (1, 4, 3))
    if operator == "-" and right > left:
        left, right = right, left
    return Problem(left, operator, right)


def expressions(text: str) -> Iterator[Key]:
    """Keys of the expressions in `text` that an equals sign follows."""
    if not _END_OF_EXPRESSION.search(text):
        return
    for match in _EXPRESSION.finditer(text):
        yield _key(int(match[1]), "*" if match[2] == "×" else match[2], int(match[3]))


def could_be_asked(key: Key) -> bool:
    """Whether `sample_problem` may give it, with an answer that a question may have."""
    operator, left, right = key
    return max(left, right) <= 999 and Problem(left, operator, right).answer <= LARGEST_ANSWER


def distractors(problem: Problem, rng: random.Random) -> list[int]:
    """Three wrong answers close to the right one, different, of as many digits."""
    offsets = (1, 2, 3, 9, 10, 11, 20, 100)
    near = [problem.answer + sign * offset for offset in offsets for sign in (1, -1)]
    return rng.sample([n for n in near if n >= 0 and len(str(n)) == len(str(problem.answer))], 3)


def _key(left: int, operator: str, right: int) -> Key:
    return (operator, left, right) if operator == "-" else (operator, min(left, right), max(left, right))


def _sample_number(rng: random.Random, weights_of_lengths: tuple[int, ...]) -> int:
    length = rng.choices(range(1, len(weights_of_lengths) + 1), weights_of_lengths)[0]
    return rng.randint(2 if length == 1 else 10 ** (length - 1), 10**length - 1)


def _render(problem: Problem, rng: random.Random) -> str:
    form = rng.choices(("direct", "worked", "story"), (5, 3, 2))[0]
    statement = f"{problem.expression} = {problem.answer}"
    if form == "direct":
        return f"Question: {statement}"
    if form == "story":
        return f"{_story(problem, rng)}\nAnswer: {statement}"
    steps = {"+": _add_columns, "-": _subtract_columns, "*": _distribute}[problem.operator](problem)
    return "\n".join([f"Work out {problem.expression}.", *steps, f"Answer: {statement}"])


def _add_columns(problem: Problem) -> Iterator[str]:
    left, right, carry, place = problem.left, problem.right, 0, 0
    while left or right:
        terms = [left % 10, right % 10] + [carry] * bool(carry)
        total = sum(terms)
        carry = total // 10
        rest = f"write {total % 10}, carry {carry}" if carry else f"write {total}"
        yield f"{_PLACES[place]}: {' + '.join(map(str, terms))} = {total}, {rest}"
        left, right, place = left // 10, right // 10, place + 1
    if carry:
        yield f"{_PLACES[place]}: write {carry}"


def _subtract_columns(problem: Problem) -> Iterator[str]:
    left, right, borrow, place = problem.left, problem.right, 0, 0
    while left:
        top, bottom = left % 10, right % 10 + borrow
        borrow = int(top < bottom)
        top += 10 * borrow
        yield f"{_PLACES[place]}: {top} - {bottom} = {top - bottom}" + (", borrow 1" if borrow else "")
        left, right, place = left // 10, right // 10, place + 1


def _distribute(problem: Problem) -> Iterator[str]:
    powers = range(len(str(problem.left)) - 1, -1, -1)
    parts = [problem.left // 10**power % 10 * 10**power for power in powers]
    total = 0
    for part in filter(None, parts):
        product = part * problem.right
        yield f"{part} * {problem.right} = {product}"
        if total:
            yield f"{total} + {product} = {total + product}"
        total += product


def _story(problem: Problem, rng: random.Random) -> str:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    left, right = problem.left, problem.right
    if problem.operator == "+":
        return f"{name} has {left} {thing} and finds {right} more. How many {thing} does {name} have now?"
    if problem.operator == "-":
        return f"{name} has {left} {thing} and gives {right} away. How many {thing} are left?"
    return f"{name} fills {left} boxes with {right} {thing} each. How many {thing} are in the boxes?"
