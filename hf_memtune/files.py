"""Files that appear whole or not at all, and digests that tell whether they are still what was written."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PART_BYTES = 2**20  # read at a time; hashlib.file_digest would do it, from Python 3.11 on


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file beside `path` to write to, whose name nobody else has. It takes the place of `path` when the block ends.

    Where the block fails it is removed, and `path` is as it was. A process that is killed may leave it behind: `.NAME.*.partial`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(number)
    partial = Path(name)
    try:
        yield partial
        _to_disk(partial)
        partial.chmod(0o666 & ~_umask())  # mkstemp's are for their owner alone
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(_PART_BYTES):
            found.update(part)
    return found.hexdigest()


def _to_disk(path: Path) -> None:
    """Before the name is there, so that after a loss of power the name never stands for an empty file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
