"""Files appear whole or not at all, under names that are nobody else's."""

import multiprocessing
import os
import signal
import stat
import time

import pytest

from hf_memtune.files import digest_of, whole, write_text


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "numbers.json"
    with whole(path) as partial:
        partial.write_text("1")
        assert not path.exists() and partial.parent == path.parent
    assert path.read_text() == "1" and list(path.parent.iterdir()) == [path]
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_what_fails_leaves_what_was_there(tmp_path):
    path = write_text(tmp_path / "numbers.json", "1")
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text("half of it")
        1 / 0
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "cache"
    with whole(path) as first, whole(path) as second:
        assert first != second
        first.write_text("first"), second.write_text("second")
    assert path.read_text() == "first"  # the one that ended last


def _write_slowly(path):
    with whole(path) as partial:
        partial.write_text("half of it")
        path.with_suffix(".begun").touch()
        time.sleep(60)


def test_a_killed_writer_leaves_what_was_there(tmp_path):
    path = write_text(tmp_path / "numbers.json", "1")
    writer = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(path,))
    writer.start()
    while not path.with_suffix(".begun").exists():
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert path.read_text() == "1"


def test_a_digest_is_of_the_content(tmp_path):
    one, same, other = (write_text(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    assert digest_of(one) == digest_of(same) != digest_of(other)
