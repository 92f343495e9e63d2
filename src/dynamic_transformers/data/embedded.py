"""Documents that every Python installation carries: its docstrings (prose) and its source files (code).

Files are parsed, never imported: importing the whole standard library has side effects.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

CODE_CHARACTERS = 4000  # a code document is cut where it would grow past this

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
)
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def prose() -> list[str]:
    """Docstrings of the standard library's modules, classes and functions, then the topics of `help()`."""
    return [*_read_library()[0], *_help_topics()]


def code() -> list[str]:
    """Source files without tests and without docstrings, cut into a few thousand characters.

    Docstrings are left out because `prose` has them: a test document of one source must not be
    part of a training document of the other.
    """
    return _read_library()[1]


def split_source(source: bytes, tree: ast.Module) -> Iterator[str]:
    """Cut one file's docstring-free code after top-level and class-level statements."""
    # ast counts columns in bytes, so the file stays bytes until the pieces are whole.
    lines = source.splitlines(keepends=True)
    _blank_docstrings(lines, tree)
    piece = b""
    start = 0
    for end in _statement_ends(tree):
        block = b"".join(lines[start:end])
        if piece and len(piece) + len(block) > CODE_CHARACTERS:
            yield _as_document(piece)
            piece = b""
        piece += block
        start = end
    yield _as_document(piece + b"".join(lines[start:]))


def _as_document(piece: bytes) -> str:
    return piece.decode("utf-8").replace("\r\n", "\n").strip("\n")


def _statement_ends(tree: ast.Module) -> list[int]:
    """Numbers of the last lines of statements; comments in front of a definition stay with it."""
    ends = set()
    for node in tree.body:
        ends.add(node.end_lineno or node.lineno)
        if isinstance(node, ast.ClassDef):
            ends.update(member.end_lineno or member.lineno for member in node.body)
    return sorted(ends)


def _blank_docstrings(lines: list[bytes], tree: ast.Module) -> None:
    for node in _documented(tree):
        if ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        before, after = lines[first][: docstring.col_offset], lines[last][docstring.end_col_offset :]
        alone_on_its_lines = not before.strip() and not after.strip()
        needed = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : last + 1] = [b""] * (last - first + 1)
        if needed or not alone_on_its_lines:
            lines[first] = before + b"..." + after


@cache
def _read_library() -> tuple[list[str], list[str]]:
    """Docstrings and code documents; parsing takes seconds, so both come from one pass."""
    docstrings, documents = [], []
    library = _library()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        # _sysconfigdata describes the machine that Python was built on.
        if _SKIPPED_FOLDERS.intersection(parts) or path.name.startswith("_sysconfigdata"):
            continue
        source = path.read_bytes()
        try:
            source.decode("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # some files are samples of other encodings or of Python 2
        docstrings += filter(None, map(ast.get_docstring, _documented(tree)))
        documents += split_source(source, tree)
    return docstrings, documents


def _documented(tree: ast.Module) -> Iterator[_Documented]:
    """The module, its classes and functions; skipping expressions, which hold none, is most of the speed."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _Documented):
            yield node
        for name in ("body", "orelse", "handlers", "finalbody", "cases"):
            pending.extend(getattr(node, name, ()))


def _help_topics() -> Iterator[str]:
    topics = _library() / "pydoc_data" / "topics.py"
    if not topics.is_file():
        return
    for node in ast.walk(ast.parse(topics.read_bytes())):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.strip()


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])
