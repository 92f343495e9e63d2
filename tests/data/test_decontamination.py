"""13 words in a row with a benchmark's text are found, whatever their case and punctuation; 12 are not."""

import json
import re

import pytest

from dynamic_transformers.data import decontamination
from dynamic_transformers.data.decontamination import NGRAM, Contamination
from dynamic_transformers.data.embedded import prose
from dynamic_transformers.settings import UserError

QUESTION = "Question: Wie viele Äpfel hat Ζωή, wenn 3 Kinder ihr je 12 schenken и она ест два?\nAnswer:"
WORDS = re.findall(r"[^\W_]+", QUESTION)


@pytest.fixture
def contamination(tmp_path):
    """Of texts, each of a task of its own unless it brings one."""

    def read(*texts):
        records = [text if isinstance(text, dict) else {"task": "apples", "text": text} for text in texts]
        lines = [
            json.dumps(record, ensure_ascii=index % 2 == 0) + "\n" for index, record in enumerate(records)
        ]
        (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
        return Contamination.read(tmp_path / "texts.jsonl")

    return read


@pytest.mark.parametrize("first", [0, 1, len(WORDS) - NGRAM])
@pytest.mark.parametrize(
    "written",
    [
        " ".join,
        lambda words: "before, " + "\n\n".join(words).upper() + " after",
        lambda words: "before-" + " … ".join(words).lower() + "!",
        lambda words: "_" + "_".join(f"«{word.title()}»" for word in words),
    ],
)
def test_thirteen_words_are_found_and_twelve_are_not(contamination, written, first):
    known = contamination("Something else, of another question.", QUESTION)
    assert known.overlaps(written(WORDS[first : first + NGRAM])) == "apples"
    assert known.overlaps(written(WORDS[first : first + NGRAM - 1])) is None
    assert (known.texts, known.short) == (2, 1)
    for changed in (0, 6, NGRAM - 1):
        words = WORDS[first : first + NGRAM]
        for other in (f"{words[changed]}s", f"x{words[changed]}", "а", ""):  # а is Cyrillic
            assert known.overlaps(written([*words[:changed], other, *words[changed + 1 :]])) is None
    assert known.overlaps(written([*WORDS[first + 1 : first + NGRAM], WORDS[first]])) is None


def test_words_are_not_joined_over_texts_or_cut(contamination):
    words = [f"w{number}" for number in range(NGRAM + 1)]
    known = contamination(" ".join(words), "w0 w1", " ".join(words[2:]))
    assert (known.texts, known.short) == (3, 2)
    assert known.overlaps(" ".join(words)) == "apples"
    assert known.overlaps("".join(words)) is None
    assert known.overlaps("w0 w1 " + " ".join(words[3:])) is None


def test_the_first_task_is_named(contamination):
    texts = ["a b c d e f g h i j k l m", "1 2 3 4 5 6 7 8 9 10 11 12 13"]
    one, two = ({"task": task, "text": text} for task, text in zip("xy", texts, strict=True))
    known = contamination(two, one, one | {"task": "z"})
    assert known.tasks == ("y", "x", "z")
    assert known.overlaps(texts[0]) == "x"
    assert known.overlaps(f"- {texts[1]}; {texts[0]}") == "y"
    assert known.overlaps(f"- {texts[0]}; {texts[1]}") == "x"


@pytest.mark.parametrize("piece", [1, 8, 100])
def test_a_long_text_is_looked_at_in_pieces(contamination, monkeypatch, piece):
    quoted = " ".join(WORDS[:NGRAM])
    known = contamination(QUESTION)
    monkeypatch.setattr(decontamination, "PIECE", piece)
    for length in range(60):
        text = "…" * length + quoted + " and so on" * 20
        assert "".join(decontamination._pieces(text)) == text
        if piece > 1:  # no word is longer
            assert known.overlaps(text) == "apples"
            assert known.overlaps(text.replace("Äpfel", "Birnen")) is None


def test_what_is_found_is_what_sets_of_words_find(contamination):
    texts = prose()[:200]
    asked, others = (
        texts[::2],
        [text[:2000] + texts[0][300 : 300 + 7 * n] for n, text in enumerate(texts[1::2])],
    )

    def ngrams(text):
        words = re.findall(r"[^\W_]+", text.lower())
        return set(zip(*(words[n:] for n in range(NGRAM)), strict=False))

    sets = set().union(*map(ngrams, asked))
    known = contamination(*asked)
    assert len(known.hashes) == len(sets)
    expected = [bool(ngrams(text) & sets) for text in others]
    assert [known.overlaps(text) is not None for text in others] == expected
    assert 10 < sum(expected) < len(others) - 5


def test_texts_of_any_kind_are_read(contamination):
    known = contamination(QUESTION, "", "\ud800 …")
    assert (known.texts, known.short) == (3, 2)
    numbers = " ".join(map(str, range(3000)))  # of so many hashes some lie behind the last known
    for text in (
        numbers,
        "",
        " ",
        "…",
        "a",
        "\ud800",
        "\U0010ffff" * 40,
        "İ" * 200_000,
        "x" * 300_000,
        "ß " * 20,
    ):
        assert known.overlaps(text) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "none of its 0 texts has 13 words"),
        ('{"task": "a", "text": "too short"}\n', "none of its 1 texts has 13 words"),
        ('{"task": "a", "text": "x"}\n{"task": "a"', "line 2: must be"),
        ('{"task": "a", "text": "x"}\n\n', "line 2: must be"),
        ('{"text": "a"}\n', "line 1: must be"),
        ('{"task": "a", "text": ["a"]}\n', "line 1: must be"),
        ('["a", "b"]\n', "line 1: must be"),
        (b'{"task": "a", "text": "x"}\n{"task": "a", "text": "\xff"}\n', "line 2: must be"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, content, message):
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        Contamination.read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
