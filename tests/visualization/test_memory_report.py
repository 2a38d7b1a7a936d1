"""The page of a memory report: self-contained, with every number, and nothing of a name taken for markup."""

import re

import pytest

from hf_memtune.memory import CATEGORIES, LiveTensor, MemoryAccount, PhaseBytes, TimelinePoint
from hf_memtune.units import format_bytes
from hf_memtune.visualization import write_memory_report_html
from hf_memtune.visualization.memory_report import COLOURS

MIB = 2**20


def account(**sizes) -> MemoryAccount:
    """By phase, the bytes of saved activations beside 3 MiB of weights."""
    none = dict.fromkeys(CATEGORIES, 0)
    phases = tuple(PhaseBytes(name, none | {"weights": 3 * MIB, "saved_activations": size}) for name, size in sizes.items())
    timeline = tuple(TimelinePoint(n, name, 3 * MIB + size) for n, (name, size) in enumerate(sizes.items()))
    return MemoryAccount(phases, (LiveTensor("model.<script>", "logits", 5 * MIB, (2, 3), "float32", "aten.mm.default"),), timeline)


def report(**changed) -> dict:
    measured = account(forward=7 * MIB, backward=9 * MIB, optimizer=0)
    found = {
        "measured": measured.to_dict(),
        "predicted": {"peak_bytes": 13 * MIB, "account": account(forward=8 * MIB, backward=10 * MIB).to_dict()},
        "allocator_peaks": None,
        "batch": "2 rows of 16 tokens",
        "conditions": {"model": "tiny & small"},
        "levers": [
            {"setting": "sequence_chunk_size=4", "without_bytes": 40 * MIB, "with_bytes": 12 * MIB, "saved_bytes": 28 * MIB, "note": None}
        ],
        "advice": {"setting": "gradient_checkpointing=True", "peak_bytes": 10 * MIB, "saved_bytes": 2 * MIB, "exact": True},
        "notes": ["evaluation was not tried"],
    }
    return found | changed


def test_every_number_is_there(tmp_path):
    page = write_memory_report_html(report(), tmp_path / "new" / "page.html").read_text()
    for wanted in (12 * MIB, 10 * MIB, 13 * MIB, 28 * MIB, 40 * MIB, 5 * MIB):
        assert format_bytes(wanted) in page
    assert "+8.3 %" in page and "sequence_chunk_size=4" in page and "evaluation was not tried" in page and "tiny &amp; small" in page
    assert "model.&lt;script&gt;" in page and "<script" not in page


def test_it_needs_nothing_else(tmp_path):
    """Sibling of a page that loads something: no address, and one file."""
    page = write_memory_report_html(report(), tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert re.search(r"(src|href)=|https?://", page.replace("<svg", "<svg><image href='x'/>", 1))


def test_bars_are_as_long_as_what_they_stand_for(tmp_path):
    page = write_memory_report_html(report(predicted=None), tmp_path / "page.html").read_text()
    widths = [float(w) for w in re.findall(rf"width='([\d.]+)' height='22' fill='{COLOURS['saved_activations']}'", page)]
    assert widths[0] / widths[1] == pytest.approx(7 / 9, rel=1e-3)


@pytest.mark.parametrize(
    "changed", [{"predicted": None}, {"levers": []}, {"advice": None}, {"notes": []}, {"allocator_peaks": {"optimizer": 3 * MIB}}]
)
def test_what_is_not_known_is_left_out(tmp_path, changed):
    page = write_memory_report_html(report(**changed), tmp_path / "page.html").read_text()
    assert "None</" not in page and page.count("<svg") == 2


def test_every_category_has_a_colour():
    assert set(COLOURS) == set(CATEGORIES)
