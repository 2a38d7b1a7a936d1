"""The README says what the committed result files say; it and the reference name files that exist, and their programs run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Trainer, TrainingArguments

import hf_memtune
from hf_memtune import architectures, evaluation, memory, visualization
from hf_memtune.memory.cards import CARDS
from tests.support.readme import write_model
from tests.support.scripts import load, run

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
PAGES = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
SECTION = re.compile(r"<!-- ([a-z0-9-]+) -->\n(.*?)<!-- end -->", re.S)


tables = load("tables")
MEASURED = "".join((ROOT / f"{name}.md").read_text() for name in tables.PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT + REFERENCE, re.S | re.M)


# --- tables


def test_tables_come_from_the_result_files():
    done = subprocess.run([sys.executable, "scripts/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_section_is_there_once():
    assert sorted(match[1] for match in SECTION.finditer(MEASURED)) == sorted(tables.SECTIONS)


@pytest.mark.parametrize("name", tables.SECTIONS)
def test_a_changed_number_is_noticed(name):
    """The last number of the section, or one more where it has none."""
    section = next(match[0] for match in SECTION.finditer(MEASURED) if match[1] == name)
    changed = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), section.removesuffix("<!-- end -->"))
    altered = changed.replace(" -->\n", " -->\n9", 1) + "<!-- end -->"
    assert tables.pages.filled(altered, tables.SECTIONS) == section != altered


def test_every_picture_is_drawn(tmp_path):
    tables.draw(tmp_path)
    drawn, shown = {path.name for path in tmp_path.iterdir()}, {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert drawn == shown - {"memory-report.png"} and all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


def test_an_unknown_section_is_noticed():
    with pytest.raises(KeyError):
        tables.pages.filled("<!-- other -->\n<!-- end -->", tables.SECTIONS)


def test_conditions_that_differ_are_all_named(tmp_path, monkeypatch):
    rows = [
        {"device": "traced", "conditions": {"torch": "2.6", "commit": "a", "rows": 1, "lora_rank": 8}},
        {"device": "traced", "conditions": {"torch": "2.7", "commit": "b", "rows": 1, "lora_rank": None}},
        {"device": "cuda", "conditions": {"torch": "2.8+cuda", "commit": "c", "rows": 4, "lora_rank": 8}},
    ]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "memory.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.SECTIONS["memory-conditions"]() == "Conditions: torch 2.6 / 2.7, commit a / b, rows 1."


# --- files and targets


def test_named_files_exist():
    named = set(re.findall(r"(?<![\w/.])(?:scripts|configs|tests|results|hf_memtune)/[\w/.-]*\w", TEXT + PAGES))
    assert {"scripts/train.py", "configs/lm/seek.yaml"} <= named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in link]
    assert len(links) > 30 and not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) < 200


def test_named_targets_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.M))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named and named <= targets


# --- programs

# What the blocks leave behind: that methods acted, and arguments for trl, of which they make no use.
AFTERWARDS = """
kept = [int(count) for count in trainer.last_selection.counts]
assert len(kept) == 8 and set(kept) <= {180, 181}, kept  # three tenths of 600 to 602 tokens, rounded up
assert streaming.strategy is seeking.strategy is None
assert 0.29 < sum(seeking.last_selection.counts) / (8 * 601) < 0.31, seeking.last_selection.counts
assert any("tokens_kept" in entry for entry in plain.state.log_history), plain.state.log_history
assert Mine and Arguments("sft", token_seeking=True, token_ratio=0.3).token_ratio == 0.3
"""


@pytest.fixture
def short_on_a_cpu(monkeypatch):
    """trl trains in bfloat16, which needs a GPU unless a CPU is asked for; and long."""
    begin, train = TrainingArguments.__post_init__, Trainer.train

    def on_a_cpu(self):
        self.use_cpu, self.report_to = True, "none"
        begin(self)

    def two_steps(self, *args, **kwargs):
        self.args.max_steps, self.args.logging_steps = 2, 1
        return train(self, *args, **kwargs)

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_a_cpu)
    monkeypatch.setattr(Trainer, "train", two_steps)


def test_the_programs_run(tmp_path, short_on_a_cpu):
    """All Python as one program, then the new lines of the comparison at its top. Rows are of more than one chunk."""
    pytest.importorskip("trl")
    write_model(tmp_path / "my-model")
    texts = [" ".join(f"w{4 + (n + k) % 50}" for k in range(600 + n % 3)) for n in range(8)]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    chat = [[{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text}] for text in texts]
    write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chat])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "w5 w6 ", "chosen": text, "rejected": text[::-1]} for text in texts])
    (comparison,) = blocks("diff")
    new_lines = [line[2:] for line in comparison.splitlines() if line.startswith("+ ")]
    program = tmp_path / "program.py"
    program.write_text("\n".join([*blocks("python"), AFTERWARDS, *new_lines]))
    done = run(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "token_maps" / "step-000000.html").exists()


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_log_keys_are_explained():
    keys = {
        "tokens_seen",
        "tokens_kept",
        "tokens_learned",
        "tokens_recomputed",
        "full_loss",
        "peak_memory_bytes",
        "resident_bytes",
        "step_seconds",
    }
    logs = REFERENCE.partition("\n## Logs\n")[2].partition("\n## ")[0]
    assert keys <= set(re.findall(r"`(\w+)`", logs))


def test_every_card_has_its_name_on_the_page():
    page = (ROOT / "docs" / "what-fits.md").read_text()
    named = re.search(r"Names for `--gpu`: (.*?)\.\s", page, re.S)[1]
    assert [name.strip() for name in named.split(",")] == list(CARDS)


def test_every_public_name_is_in_the_docs():
    said = set(re.findall(r"\w+", TEXT + PAGES))
    packages = [hf_memtune, architectures, evaluation, memory, visualization]
    assert not [name for package in packages for name in package.__all__ if name not in said]
