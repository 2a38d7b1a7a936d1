"""What the launches of two processes are worth to the tests that read what they left."""

import pytest

from tests.support.two_processes import LAUNCH, launch

ABORTS = "import os, sys; folder, again = sys.argv[1:]; folder.endswith(again) or os.abort()"
RAISES = "raise ValueError('what is tested is wrong')"


def of(program, tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(program)
    return lambda folder: [*LAUNCH, str(script), str(folder), *arguments]


def test_a_process_that_was_aborted_is_launched_once_more_and_the_trace_is_shown(tmp_path):
    with pytest.warns(UserWarning, match=r"(?s)launched again.*Fatal Python error: Aborted.*script\.py"):
        assert launch(of(ABORTS, tmp_path, "_again"), tmp_path / "two") == (0, "", str(tmp_path / "two_again"))


def test_one_that_aborts_always_and_one_that_fails_do_not_pass(tmp_path, recwarn):
    status, errors, _ = launch(of(RAISES, tmp_path), tmp_path / "raises")
    assert status and errors.startswith("Traceback") and "what is tested is wrong" in errors
    assert not any("launched again" in str(warning.message) for warning in recwarn)
    status, errors, folder = launch(of(ABORTS, tmp_path, "never"), tmp_path / "aborts")
    assert status and errors.startswith("Fatal Python error: Aborted") and folder == str(tmp_path / "aborts_again")
    assert sum("launched again" in str(warning.message) for warning in recwarn) == 1
