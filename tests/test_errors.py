"""Errors: all problems of one request, and what one says first."""

import pickle

import pytest

from hf_memtune.errors import ConfigError, LogitsError, first_line


def test_all_problems_are_told_and_a_single_one_may_be_text():
    several, single = ConfigError(["a: got 1.", "b: got 2."]), ConfigError("a: got 1.")
    assert str(several) == "2 problems with the settings:\n  - a: got 1.\n  - b: got 2."
    assert pickle.loads(pickle.dumps(several)).problems == several.problems
    assert single.problems == ["a: got 1."] and str(single) == "1 problem with the settings:\n  - a: got 1."


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("\n CUDA out of memory.\nstatistics"), "CUDA out of memory"),
        (KeyError("no such task"), "no such task"),
        (ValueError(), "ValueError"),
        (ConfigError(["a: got 1.", "b: got 2."]), "a: got 1"),
        (LogitsError("x" * 400), "x" * 300),
    ],
)
def test_what_an_error_says_first(error, expected):
    assert first_line(error) == expected
