"""Files and folders that appear whole or not at all, and digests that tell whether they are still what was written."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial as with_arguments
from pathlib import Path

LEFT_SECONDS = 3600  # a partial file that nobody has locked, and nobody has written to for so long, is of a process that was killed


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, whose name nobody else has. It takes the place of `path` when the block ends.

    Where the block fails it is removed, and `path` is as it was. A process that is killed may leave it behind: `.NAME.*.partial`. The
    next `whole` of the same path removes it, LEFT_SECONDS after it was written to last.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path.parent, path.name)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with _held(number):
            yield partial
            _to_disk(partial)
            partial.chmod(0o666 & ~_umask())  # mkstemp's are for their owner alone
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | Path, last: str) -> Iterator[Path]:
    """A folder to fill, whose name nobody else has. It becomes `path` when the block ends. Where the block fails it is removed.

    path: new, or an empty folder. One that exists stays the same folder, since it may be a mount or the current one: the files move into
    it one by one, the one named `last` at the end, so that without it the folder is known to be unfinished. What a killed process leaves
    behind, `.NAME.*.partial`, is beside a new folder and within one that exists; it goes as that of `whole` does.
    """
    path = Path(path)
    around = path if path.exists() else path.parent
    around.mkdir(parents=True, exist_ok=True)
    _remove_left(around, path.name)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=around))
    try:
        with _held(os.open(partial, os.O_RDONLY)):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _to_disk(file)
            partial.chmod(0o777 & ~_umask())
            if around == path:
                _move_into(path, partial, last)
            else:
                partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def is_partial(path: Path) -> bool:
    """Whether a file or folder is one that is being written, or that a killed process left behind."""
    return path.name.startswith(".") and path.suffix == ".partial"


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """While open, no other process of this machine is inside a `locked` of the same path. The lock is a file beside it: `.NAME.lock`."""
    path = Path(path)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: str | Path, text: str, errors: str = "strict") -> Path:
    """Write UTF-8 text, whole or not at all. Returns the path."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)
    return Path(path)


def digest_of(path: str | Path) -> str:
    """A digest of the content of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, with_arguments(hashlib.blake2b, digest_size=16)).hexdigest()


@contextmanager
def _held(number: int) -> Iterator[None]:
    """While open, an open file is locked, so that nobody takes it for one that was left behind."""
    try:
        with suppress(OSError):  # a file system without locks: then nobody removes anything
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(number)


def _remove_left(folder: Path, name: str) -> None:
    """Remove what killed writers of a file or folder of this name left in `folder`. Both signs are needed: a file system may keep its locks
    to one machine, and a slow writer may be silent for long."""
    for path in folder.iterdir():
        if is_partial(path) and path.stem.rpartition(".")[0] == f".{name}":
            with suppress(OSError):  # it is gone meanwhile, is somebody else's, is locked, or locks are unknown here
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    """Raises OSError where somebody holds it."""
    number = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        os.close(number)


def _move_into(folder: Path, partial: Path, last: str) -> None:
    for file in sorted(partial.iterdir(), key=lambda file: file.name == last):
        file.rename(folder / file.name)
    partial.rmdir()


def _to_disk(path: Path) -> None:
    """Before the name is there, so that after a loss of power the name never stands for an empty file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
