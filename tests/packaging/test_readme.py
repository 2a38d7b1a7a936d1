"""The README says what the committed result files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tables():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import tables as module
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def test_tables_come_from_the_result_files():
    done = subprocess.run([sys.executable, "scripts/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    altered = text.replace("| Llama-3.2-1B | 2048 | ", "| Llama-3.2-1B | 2048 | 9", 1)
    assert altered != text
    assert tables().filled(altered) == text
