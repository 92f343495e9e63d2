"""Which expressions of a text count as asked."""

from __future__ import annotations

import time

from dynamic_transformers.data.arithmetic import expressions


def test_expressions_with_an_equals_sign_are_found_by_their_key():
    text = "7 + 5 = 12, 5+7= 12; 3 × 4\n= 12 and 9 - 2 =; 1 + 2 + 3 = 6; x = 4, a - 5 = 2, 6 * 7"
    assert list(expressions(text)) == [("+", 5, 7), ("+", 5, 7), ("*", 3, 4), ("-", 9, 2), ("+", 2, 3)]
    assert list(expressions("no figures = none; -5 = five")) == []


def test_numbers_of_thousands_of_digits_are_none_of_ours():
    long = "9" * 100_000
    start = time.process_time()
    assert list(expressions(f"{long} + 1 = 2; 1 + {long} = 2; {long}x; {long} 4 + 5 = 9")) == [("+", 4, 5)]
    assert time.process_time() - start < 1  # second; it took minutes where every digit was a beginning
