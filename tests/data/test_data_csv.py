"""Broken records of CSV files, and headers that cannot be meant."""

import pytest

from dynamic_transformers.data.csv_rows import Csv
from dynamic_transformers.settings import SourceSettings, UserError
from tests.data.all_rows import read_records

QUOTES = """text,id
first,1
"two
lines",2
"unclosed one,3
two,4

three,5
"unclosed two,6
four,7
"""


@pytest.mark.parametrize("most", [2**26, 30])
def test_a_quote_that_nobody_closes_is_one_broken_record(tmp_path, monkeypatch, most):
    monkeypatch.setattr("dynamic_transformers.data.csv_rows.RECORD_CHARACTERS", most)
    (tmp_path / "a.csv").write_text(QUOTES)
    found = list(Csv(",").rows(str(tmp_path / "a.csv"), None, ()))
    assert [(row.number, row.value["text"]) for row in found if not row.fault] == [
        *[(2, "first"), (3, "two\nlines"), (6, "two"), (8, "three"), (10, "four")]
    ]
    broken = [(row.number, row.value) for row in found if row.fault]
    assert broken == [(5, '"unclosed one,3'), (9, '"unclosed two,6')]


@pytest.mark.parametrize(
    ("content", "words"),
    [("text,id,text\n1,2,3\n", "several columns have the name 'text'"), ('"text,id\n', "is no header: ")],
)
def test_a_header_that_cannot_be_meant_is_told(tmp_path, content, words):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        list(read_records(SourceSettings(name="mine", path="csv", data_files=str(tmp_path / "a.csv"))))
