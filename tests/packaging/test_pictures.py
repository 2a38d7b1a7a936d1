"""The pictures of docs/: one colour a scorer, and names that can be read."""

import itertools

import pytest

from tests.support.scripts import load

ARMS = ["plain", "checkpointing@1", "streaming", *(f"{scorer}/sample/{path}/30%/labels" for scorer in ("random", "true_gradient") for path in ("cut", "stream"))]  # fmt: skip


@pytest.fixture(scope="module")
def looks():
    return load("looks")


@pytest.fixture(scope="module")
def pictures():
    return load("pictures")


def luminance(colour):
    values = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(part * value for part, value in zip((0.2126, 0.7152, 0.0722), linear))


def contrast_with_white(colour):
    return 1.05 / (luminance(colour) + 0.05)


def test_every_scorer_of_the_plans_has_a_colour_of_its_own(looks):
    from learning.plans import PLANS

    arms = {arm for plan in PLANS["quality"] for stage in ("final", "time", "race") for arm, _ in plan.sized_arms(stage)}
    assert {looks.scorer_of(arm) for arm in arms} <= set(looks.SCORERS)
    assert len(set(looks.SCORERS.values())) == len(looks.SCORERS)
    assert looks.colour_of("mine") == looks.UNLISTED and looks.in_order("mine") > looks.in_order("true_gradient")


def test_colours_are_seen_on_white(looks):
    assert all(contrast_with_white(colour) >= 3 for colour in looks.SCORERS.values())
    assert contrast_with_white("#F0E442") < 3, "yellow, which was one of them"


def raced(pictures, n_bytes):
    """Arms of as many bytes, each with batches of two sizes."""
    from learning.groups import Interval

    found = Interval(0.02, 0.01)
    groups = [pictures.Group(arm, rows, {}, 1.0, n_bytes, True) for arm in ARMS for rows in (4, 8)]
    return [pictures.Raced(group, found if group.rows == 4 else None, found, 10) for group in groups]


def test_names_in_a_race_do_not_overlap(pictures, monkeypatch, tmp_path):
    """However near their bytes and losses are to one another."""
    drawn, race = [], raced(pictures, 128 * 2**20)
    monkeypatch.setattr(pictures.pyplot, "close", drawn.append)
    pictures.draw_race(race, tmp_path / "race.png")
    (figure,) = drawn
    figure.canvas.draw()  # where names are depends on the dots of an inch
    names = figure.axes[0].get_yticklabels()
    boxes = [name.get_window_extent() for name in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(figure.bbox.contains(box.x0, box.y0) for box in boxes)
    assert {name.get_text() for name in names} == {f"{arm.label}: 128 MiB" for arm in race}
