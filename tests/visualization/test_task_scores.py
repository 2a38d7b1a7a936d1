"""Scores as a picture."""

import pytest

from hf_memtune.visualization.task_scores import Point, _draw, write_scores_png

POINTS = [Point("piqa", "acc", 0.716, 0.0105), Point("sciq", "acc", 0.84, None), Point("sciq", "acc_norm", 0.8, 0.01)]


def test_what_is_given_is_drawn():
    """The points and bars of one metric, on the lines of their labels."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _draw(axes, "acc", POINTS[:2], ["piqa", "sciq"])
    assert axes.lines[0].get_xydata().tolist() == [[0.716, 0], [0.84, 1]]
    assert [text.get_text() for text in axes.texts] == ["0.716 ± 0.011", "0.840"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["piqa", "sciq"]


def test_the_file_depends_on_the_scores(tmp_path):
    pytest.importorskip("matplotlib")
    first, same, other = (
        write_scores_png(points, tmp_path / name, "two $ tasks_of").read_bytes()
        for name, points in (("a.png", POINTS), ("b.png", POINTS), ("c.png", [POINTS[0]._replace(value=0.5), *POINTS[1:]]))
    )
    assert first == same != other and first.startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one score"):
        write_scores_png([], tmp_path / "d.png", "")
