"""Files appear whole or not at all, under names that are nobody else's."""

import multiprocessing
import os
import signal
import stat
import time

import pytest

from hf_memtune.files import LEFT_SECONDS, digest_of, is_partial, whole, whole_folder, write_text


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
    assert path.read_text() == "1" and len(_partials(tmp_path)) == 1


def _partials(folder):
    return [path for path in folder.iterdir() if is_partial(path)]


def _age(path):
    """As if it had been written to last a while ago."""
    os.utime(path, (time.time() - LEFT_SECONDS - 1,) * 2)


def _left(folder, name):
    """What a killed writer leaves behind."""
    path = folder / f".{name}.x1y2z3_a.partial"
    path.write_text("half of it")
    return path


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    left, young, another = _left(tmp_path, "numbers.json"), tmp_path / ".numbers.json.young_00.partial", _left(tmp_path, "numbers")
    young.touch(), _age(left), _age(another)
    write_text(tmp_path / "numbers.json", "1")
    assert set(_partials(tmp_path)) == {young, another}


def test_what_somebody_is_writing_is_not_removed(tmp_path):
    with whole(tmp_path / "numbers.json") as first:
        first.write_text("slow"), _age(first)
        write_text(tmp_path / "numbers.json", "quick")
        assert first.exists()
    assert (tmp_path / "numbers.json").read_text() == "slow"


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_folder_is_there_when_it_is_whole(exists, tmp_path):
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
        number = path.stat().st_ino
    with whole_folder(path, last="config.json") as partial:
        (partial / "config.json").write_text("{}"), (partial / "weights").write_text("1"), (partial / "inner").mkdir()
        (partial / "inner" / "more").write_text("2")
        assert path.exists() == exists and not (path / "config.json").exists()
    assert {file.name for file in path.iterdir()} == {"config.json", "weights", "inner"} and (path / "inner" / "more").read_text() == "2"
    assert not _partials(tmp_path)
    assert not exists or path.stat().st_ino == number
    other = tmp_path / "other"
    other.mkdir()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_a_folder_that_fails_leaves_nothing(exists, tmp_path):
    path = tmp_path / "folder"
    if exists:
        path.mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(path, last="config.json") as partial:
        (partial / "config.json").write_text("{}")
        1 / 0
    assert path.exists() == exists and not (exists and list(path.iterdir())) and not _partials(tmp_path)


def test_a_folder_that_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".folder.x1y2z3_a.partial"
    left.mkdir(), _left(left, "weights"), _age(left)
    with whole_folder(tmp_path / "folder", last="config.json") as partial:
        (partial / "config.json").write_text("{}")
        assert not left.exists()


def test_of_two_writers_of_one_folder_the_second_to_end_fails(tmp_path):
    with pytest.raises(OSError), whole_folder(tmp_path / "folder", last="config.json") as first:
        _age(first)
        with whole_folder(tmp_path / "folder", last="config.json") as second:
            assert first.exists()
            (second / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "config.json"]


def test_a_digest_is_of_the_content(tmp_path):
    one, same, other = (write_text(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    assert digest_of(one) == digest_of(same) != digest_of(other)
