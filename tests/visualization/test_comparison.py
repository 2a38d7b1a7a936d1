"""Methods side by side: the numbers given are the numbers shown."""

import re

import pytest

from hf_memtune.visualization import comparison_table, write_comparison_html


def rows(after=1.6):
    return [
        {"method": "plain", "loss_before": 1.8, "loss_after": 1.5, "peak_bytes": 3 * 2**30, "seconds_per_step": 2.5, "tokens_kept_share": 1.0},
        {
            "method": "seeking <10 %>",
            "loss_before": 1.8,
            "loss_after": after,
            "peak_bytes": 229 * 2**20,
            "seconds_per_step": 1.25,
            "tokens_kept_share": 0.1,
            "losses": [(0, 1.8), (10, 1.7), (20, after)],
        },
    ]  # fmt: skip


def test_the_table_is_aligned_and_complete():
    lines = comparison_table(rows()).splitlines()
    assert len({len(line) for line in lines}) == 1
    for shown in ("1.6000", "229 MiB", "1.25", "10.0 %"):
        assert shown in lines[3]
    assert "1.6000" not in comparison_table(rows(after=1.7))


def test_the_page_is_self_contained_and_complete(tmp_path):
    pytest.importorskip("matplotlib")
    text = write_comparison_html(rows(), tmp_path / "report.html", "Four ways", {"torch": "2.13", "commit": "<abc>"}).read_text()
    assert "<svg" in text and "&lt;abc&gt;" in text and "seeking &lt;10 %&gt;" in text
    assert not re.search(r"<(script|link|img)\b", text)
    assert not re.search(r"""(src|href)=["']https?:""", text)


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="one dict a method"):
        write_comparison_html([], tmp_path / "report.html", "t", {})
