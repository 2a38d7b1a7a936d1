"""The Makefile runs scripts that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
SCRIPT = re.compile(r"scripts/[\w/]+\.py")


def recipe(target: str) -> list[str]:
    """The commands of a target."""
    return re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.M)[1].splitlines()


def test_named_scripts_exist():
    named = set(SCRIPT.findall(MAKEFILE)) | set(SCRIPT.findall((ROOT / "README.md").read_text()))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_bench_measures_and_then_writes_the_tables():
    assert SCRIPT.findall("\n".join(recipe("bench"))) == ["scripts/bench_memory.py", "scripts/bench_speed.py", "scripts/tables.py"]
    assert re.search(r"^bench: assets\b", MAKEFILE, re.M)


def test_every_target_is_phony_and_described():
    targets = set(re.findall(r"^(\.venv|[a-z]+):", MAKEFILE, re.M))
    assert targets == set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split())
    assert targets == set(re.findall(r"^(\.venv|[a-z]+):.* ## ", MAKEFILE, re.M))
