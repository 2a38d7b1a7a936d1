"""What a command keeps from the screen, and from the screen alone: warnings that its user can do nothing about."""

import logging
import warnings
from contextlib import contextmanager

# How a library calls another, or itself: nothing that a setting changes.
HIDDEN = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


@contextmanager
def quiet():
    """Libraries' notes to programmers are hidden, and our own warnings are shown without the line of code they come from.

    The package itself hides nothing: whoever programs with it is a programmer.
    """
    # on a CPU it reports a missing optional kernel as a failure, whether 4 bits were asked for or not
    noisy = logging.getLogger("bitsandbytes.backends.cpu")
    level, formatted = noisy.level, warnings.formatwarning
    with warnings.catch_warnings():
        for kind in HIDDEN:
            warnings.simplefilter("ignore", kind)
        noisy.setLevel(logging.ERROR)
        warnings.formatwarning = _formatted
        try:
            yield
        finally:
            warnings.formatwarning = formatted
            noisy.setLevel(level)


def _formatted(message, category, filename, lineno, line=None) -> str:
    return f"warning: {message}\n"
