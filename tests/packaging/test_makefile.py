"""The Makefile runs scripts that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
CI = (ROOT / ".ci" / "run").read_text()
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
    targets = set(re.findall(r"^(\.venv|[-a-z]+):", MAKEFILE, re.M))
    assert targets == set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split())
    assert targets == set(re.findall(r"^(\.venv|[-a-z]+):.* ## ", MAKEFILE, re.M))


def test_what_the_fast_tests_name_exists():
    fast = re.search(r"^FAST := (.*\n\t.*)", MAKEFILE, re.M)[1]
    files = [f"{prefix}{name}" for prefix, names in re.findall(r"\(addprefix (\S+),([^)]*)\)", fast) for name in names.split()]
    files += [name for name in fast.partition("$")[0].replace("\\\n", " ").split() if name != "\\"]
    assert len(files) > 8 and not [name for name in files if not list(ROOT.glob(name))]


def test_continuous_integration_checks_code_types_and_tests():
    assert re.findall(r"^make (.*)", CI, re.M) == ["lint", "types", "test"]
    assert set(re.findall(r"^make (.*)", CI, re.M)) <= set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split())


def test_tools_are_pinned_where_they_run():
    """ruff of pre-commit is ruff of `make lint`: two versions would format differently."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {"ruff", "mypy", "pytest-cov"} <= pins.keys()
    assert f"rev: v{pins['ruff']}" in (ROOT / ".pre-commit-config.yaml").read_text()
