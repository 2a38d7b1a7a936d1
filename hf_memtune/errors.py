"""Every error of hf_memtune: one root class, and messages that name the fault, the place and the remedy."""

from collections.abc import Sequence


class MemTuneError(Exception):
    """Root of all errors raised by hf_memtune."""


class ConfigError(MemTuneError, ValueError):
    """Settings that cannot work. All problems of one request are reported together, before anything is changed."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        heading = "1 problem with the settings:" if count == 1 else f"{count} problems with the settings:"
        super().__init__("\n  - ".join([heading, *self.problems]))

    def __reduce__(self) -> tuple:
        return type(self), (self.problems,)  # and not its message, from process to process


class UnsupportedModelError(MemTuneError, ValueError):
    """A model on which a strategy would not be exact. Names the model, the reason and the remedy."""


class StaleCacheError(MemTuneError, LookupError):
    """Offline scores that do not belong to the rows, the model or the settings at hand."""


class TokenScoreError(MemTuneError, ValueError):
    """A token scorer that returned something other than one finite score for each token."""


class StreamOverflowError(MemTuneError, ArithmeticError):
    """A reversible stream that left the range of its fixed-point numbers. Names the layer and the remedy; no gradient was made of it."""


class InverseError(MemTuneError, RuntimeError):
    """A pass that runs again, or back, in backward, and cannot go backward rightly. Names the cause and the remedy."""


class LogitsError(MemTuneError, RuntimeError):
    """Logits on demand of which something was asked that would be wrong without a word. Names the cause and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says first, 300 characters of it at most and without a full stop; where it says nothing, its class. The rest is statistics."""
    if isinstance(error, ConfigError):
        return error.problems[0].rstrip(".")
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
