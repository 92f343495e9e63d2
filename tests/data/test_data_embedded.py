"""What the embedded documents hold, and what they must not."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

from dynamic_transformers.data import arithmetic, embedded


def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
            node.body = [
                statement for statement in node.body if ast.unparse(statement) not in ("...", "Ellipsis")
            ]
    return ast.dump(tree)


SAMPLE = b'''"""Module."""
class A(Exception): """One line."""
class B:
    """Alone: \xc3\xa9."""
class C:
    # Comment of f.
    def f(self):
        """Two
        lines."""; return "not a docstring"

    async def g(self):
        "Docstring"
        return """neither"""
if A:
    def h(): "Inner \xe6\x9d\xb1"; pass
'''


def test_code_loses_its_docstrings_and_nothing_else(monkeypatch):
    for limit in (1, 60, 4000):
        monkeypatch.setattr(embedded, "CODE_CHARACTERS", limit)
        pieces = list(embedded.split_source(SAMPLE, ast.parse(SAMPLE)))
        assert (len(pieces) > 1) == (limit < 4000)
        whole = "\n".join(pieces)
        assert without_docstrings(whole) == without_docstrings(SAMPLE)
        for phrase in ("Module", "One line", "Alone", "Two", "Docstring", "Inner"):
            assert phrase not in whole
    source = Path(json.decoder.__file__).read_bytes()
    pieces = list(embedded.split_source(source, ast.parse(source)))
    assert len(pieces) > 2
    assert without_docstrings("\n".join(pieces)) == without_docstrings(source)


def test_prose_and_code_share_no_docstring():
    code = "\n".join(embedded.code())
    prose = embedded.prose()
    assert json.loads.__doc__.split("\n")[0] in "\n".join(prose)
    assert "def loads(s, *, cls=None" in code
    long_ones = [text for text in prose[:6000:7] if len(text) > 60 and "\n" not in text]
    assert len(long_ones) > 50
    # A docstring may come back as a string that is no docstring (usage messages): rare.
    assert sum(text in code for text in long_ones) < 0.02 * len(long_ones)


def test_arithmetic_is_right_and_hardly_repeats():
    documents = list(arithmetic.documents())
    assert documents == list(arithmetic.documents())
    assert len(documents) > 2000
    assert len(set(documents)) > 0.999 * len(documents)
    statements = re.findall(r"((?:\d+ [-+*] )+\d+) = (\d+)", "\n".join(documents))
    assert len(statements) > 20000
    for left, right in statements:
        assert eval(left) == int(right), (left, right)
    worked = re.findall(r"Work out \d+ \+ \d+\.\n((?:\w+: .*\n)+)Answer: .* = (\d+)", "\n\n".join(documents))
    assert len(worked) > 1000
    for steps, answer in worked:
        assert "".join(re.findall(r"write (\d)", steps))[::-1] == answer
    forms = Counter(re.match(r"Question|Work|[A-Z]\w+ (has|fills)", text)[0].split()[0] for text in documents)
    assert forms["Question"] > 1000 and forms["Work"] > 500
