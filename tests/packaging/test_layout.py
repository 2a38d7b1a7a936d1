"""The shape of the repository: what lies where, which way imports go, and what importing the package leaves alone."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_memtune"

TOP_LEVEL = {"setup.cfg", "hf_memtune", "configs", "scripts", "tests", "Makefile"}
TOP_LEVEL_ALSO = {
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".ci",
    "docs",
    "results",
}

# THE FLOORS, top to bottom: a module imports from its own part and from lower floors only.
FLOORS = [
    {"cli", "__main__"},
    {"forecast"},
    {"training"},
    {"evaluation", "visualization"},
    {"memory"},
    {"methods"},
    {"architectures"},
    {"core"},
    {"settings", "levers", "errors", "files", "units", "_compat"},
]
GROUND = FLOORS[-1]  # its parts may import one another; nowhere else may neighbours
HEAVY = {"accelerate", "bitsandbytes", "datasets", "evaluate", "matplotlib", "numpy", "peft", "torch", "transformers"}


# --- what lies where


def files() -> list[str]:
    """Every file that git tracks or would add, relative to the top."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_top_level_has_its_parts():
    assert TOP_LEVEL <= {path.name for path in ROOT.iterdir()}


def test_the_top_level_has_nothing_else():
    assert {name.split("/")[0] for name in files()} <= TOP_LEVEL | TOP_LEVEL_ALSO


# Spelt in pieces, or this file would name such paths itself.
ABSOLUTE = re.compile(r"(?<![\w.~$}*>-])/(?:work|root|(?:home|Users)/\w+)/")


@pytest.mark.parametrize("path", ["work", "root", "home/x", "Users/x"])
def test_the_pattern_sees_a_machine_path(path):
    assert ABSOLUTE.search(f'open("/{path}/data.json")')
    assert not ABSOLUTE.search(f"https://example.com/{path}/data.json")
    assert not ABSOLUTE.search(f'open("{path}/data.json")')


def test_no_file_names_a_path_of_one_machine():
    texts = {name: (ROOT / name).read_text(errors="replace") for name in files()}
    found = {name: match.group() for name, text in texts.items() if (match := ABSOLUTE.search(text))}
    assert not found


def test_every_file_of_the_package_is_installed():
    """A folder without __init__.py is no package: what lies in it must be declared as data, or a wheel lacks it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    globs = [(package, glob) for package, line in setup["options.package_data"].items() for glob in line.split()]
    data = {path for package, glob in globs for path in package_folder(package).glob(glob)}
    shipped = [ROOT / name for name in files() if name.startswith("hf_memtune/")]
    in_packages = {path for path in shipped if path.suffix == ".py" and (path.parent / "__init__.py").exists()}
    assert set(shipped) - in_packages <= data


def package_folder(package: str) -> Path:
    return ROOT.joinpath(*package.split("."))


# --- which way imports go


def imports(source: str, module: str) -> set[str]:
    """The dotted names that `source`, the text of `module`, imports at any depth; relative ones resolved.

    `module` ends in ".__init__" for a package's own file.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and named(node.func) in {"import_module", "__import__"}:
            found |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def named(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def floor(part: str) -> int:
    """0 is the top; raises for a part that has no floor, which then needs one above."""
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def upward(source: str, module: str) -> list[str]:
    """The imports of `module` that do not go down."""
    own = module.split(".")[1]
    targets = [(name + ".").split(".")[1] for name in imports(source, module) if (name + ".").startswith("hf_memtune.")]
    return sorted(target for target in targets if not allowed(own, target))


def allowed(own: str, target: str) -> bool:
    if target.startswith("__"):  # constants of the top package, such as __version__
        return True
    if own == target or {own, target} <= GROUND:
        return True
    return any(target in parts for parts in FLOORS) and floor(own) < floor(target)


def transformers_models(source: str, module: str) -> list[str]:
    return sorted(name for name in imports(source, module) if (name + ".").startswith("transformers.models."))


def modules() -> dict[str, str]:
    """Dotted name to source of every module below the top one, which re-exports from all floors."""
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


def test_every_part_has_a_floor():
    assert {name.split(".")[1] for name in modules()} <= set().union(*FLOORS)


def test_imports_go_down():
    wrong = {name: found for name, source in modules().items() if (found := upward(source, name))}
    assert not wrong


@pytest.mark.parametrize(
    "module, source",
    [
        ("hf_memtune.core.scoring", "from hf_memtune.training import trainer"),
        ("hf_memtune.core.scoring", "def f():\n    import hf_memtune.methods.seek"),
        ("hf_memtune.core.scoring", "from ..architectures import llama"),
        ("hf_memtune.core.__init__", "from ..architectures.llama import LLAMA"),
        ("hf_memtune.core.scoring", "from .. import cli"),
        ("hf_memtune.errors", "from hf_memtune import core"),
        ("hf_memtune.methods.seek", "from hf_memtune import MemEfficientTrainer"),
        ("hf_memtune.methods.seek", "import hf_memtune"),
        ("hf_memtune.memory.ledger", "from hf_memtune.evaluation import load_metric"),
        ("hf_memtune.units", "import importlib\nimportlib.import_module('hf_memtune.core')"),
    ],
)
def test_an_upward_import_is_seen(module, source):
    assert upward(source, module)


@pytest.mark.parametrize(
    "module, source",
    [
        ("hf_memtune.training.trainer", "from ..core.scoring import score\nfrom . import arguments"),
        ("hf_memtune.core.__init__", "from .scoring import score"),
        ("hf_memtune.settings.seeking", "from .errors import MemTuneError"),
        ("hf_memtune.cli.main", "from hf_memtune import __version__"),
        ("hf_memtune.core.scoring", "import torch, hf_memtune_other"),
    ],
)
def test_a_downward_import_is_not(module, source):
    assert not upward(source, module)


# --- no circles


def links(sources: dict[str, str]) -> dict[str, set[str]]:
    """Of each module those of `sources` that it names in imports, at any depth: inside functions and for type checkers, too.

    A name taken from a package is of the package's own file, unless it is a module of it.
    """
    own = {name.removesuffix(".__init__"): name for name in sources}

    def module_of(name: str) -> str | None:
        while name and name not in own:
            name = name.rpartition(".")[0]
        return own.get(name)

    return {name: {module_of(found) for found in imports(source, name)} - {None, name} for name, source in sources.items()}


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that can be reached from themselves, each with those it shares its circles with."""
    graph = links(sources)
    reached = {name: reachable(graph, name) for name in sources}
    rings = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in sources if name in reached[name]}
    return sorted(map(list, rings))


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, pending = set(), [*graph[start]]
    while pending:
        if (name := pending.pop()) not in found:
            found.add(name)
            pending += graph[name]
    return found


def test_no_circle_of_files():
    assert circles(modules()) == []


@pytest.mark.parametrize(
    "here, there",
    [
        ("from hf_memtune.b import c", "import hf_memtune.a"),
        ("import hf_memtune.b.c", "def f():\n    from hf_memtune.a import later"),
        ("from .b.c import name", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..a import Name"),
        ("from hf_memtune.b import name", "from hf_memtune import a"),
    ],
)
def test_a_circle_is_seen(here, there):
    third = {"hf_memtune.b.__init__": "from .c import name", "hf_memtune.b.d": "from hf_memtune.a import x\nfrom .c import name"}
    sources = {"hf_memtune.a": here, "hf_memtune.b.c": there, **third}
    (ring,) = circles(sources)
    assert {"hf_memtune.a", "hf_memtune.b.c"} <= set(ring) and "hf_memtune.b.d" not in ring
    assert not circles(sources | {"hf_memtune.b.c": "import hf_memtune_other, hf_memtune"})


def test_only_architectures_import_transformers_models():
    others = {name: source for name, source in modules().items() if name.split(".")[1] != "architectures"}
    wrong = {name: found for name, source in others.items() if (found := transformers_models(source, name))}
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import transformers.models.llama.modeling_llama",
        "from transformers.models.llama import modeling_llama",
        "from transformers import models",
        "def f():\n    import_module('transformers.models.llama')",
    ],
)
def test_an_import_of_transformers_models_is_seen(source):
    assert transformers_models(source, "hf_memtune.core.scoring")
    assert not transformers_models("from transformers import modeling_utils", "hf_memtune.core.scoring")


# --- what importing the package leaves alone

TRACES = """
import logging, os, sys, warnings
def state():
    return dict(os.environ), list(logging.root.handlers), logging.root.level, list(warnings.filters), sys.path[:]
before = state()
{statement}
print(" ".join(sys.modules))
assert state() == before, "changed"
"""


def traces(statement: str) -> tuple[bool, set[str]]:
    """In a fresh process: whether the statement left the settings alone, and which heavy modules it loaded."""
    command = [sys.executable, "-c", TRACES.format(statement=statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "AssertionError: changed" in done.stderr, done.stderr
    return done.returncode == 0, HEAVY & set(done.stdout.split())


def test_importing_the_package_changes_nothing():
    assert traces("import hf_memtune") == (True, set())


def test_a_trace_is_seen():
    assert traces("import os; os.environ['HF_MEMTUNE'] = '1'") == (False, set())
    assert traces("import numpy")[1] == {"numpy"}


# --- tests


def test_no_test_module_imports_another():
    """What they share lies in tests/support."""
    pattern = re.compile(r"^\s*(?:from tests\S*\.(?:test_\w+|conftest) import|from tests\S* import .*\btest_\w+)", re.M)
    assert pattern.search("from tests.methods.test_heads import classified") and pattern.search("    from tests.cli.conftest import llama")
    others = [path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    found = {str(path.relative_to(ROOT)) for path in others if pattern.search(path.read_text())}
    assert not found
