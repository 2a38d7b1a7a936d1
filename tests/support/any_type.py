"""The tiny models of scripts/tiny.py, which coverage is measured with."""

from tests.support.scripts import load

_MODULE = load("tiny")
tiny, batch_of, types, TOKENS = _MODULE.tiny, _MODULE.batch_of, _MODULE.types, _MODULE.TOKENS
