"""Scorers side by side: shares and overlaps are those of a slow count, and the page shows them."""

import json
import random
import re
from dataclasses import replace

import pytest

from hf_memtune.visualization.decision import Decision
from hf_memtune.visualization.scorer_page import write_scorer_comparison
from hf_memtune.visualization.scorer_shares import ALL, GROUPS, LABELLED, PLACES, ROLES, ComparedRow, ScorerShares
from hf_memtune.visualization.token_class import CLASSES, token_classes

SCORERS = ("context", "gradient", "random")


def rows(seed=0, labelled=0.6):
    """Rows of 1 to 37 tokens with random labels, classes and chances."""
    dice, found = random.Random(seed), []
    for n in (1, 9, 10, 23, 37):
        chances = {name: [dice.choice((0.0, dice.random(), 1.0)) for _ in range(n)] for name in SCORERS}
        found.append(ComparedRow([dice.random() < labelled for _ in range(n)], [dice.choice(list(CLASSES)) for _ in range(n)], chances))
    return found


def counted(some=None):
    shares = ScorerShares(SCORERS)
    for row in rows() if some is None else some:
        shares.add(row)
    return shares


def decisions(selection="sample"):
    return [Decision(name, selection, 0.3, "labels", "none", {"context_layer": -1}) for name in SCORERS]


def slow_share(some, who, belongs):
    """One number, by a loop over every token of every row. belongs: says of a row and a position whether it is of the group."""
    part = whole = 0.0
    for row in some:
        for i in range(len(row.labelled)):
            weight = 1.0 if who == ALL else float(row.labelled[i]) if who == LABELLED else row.chances[who][i]
            whole += weight
            part += weight if belongs(row, i) else 0.0
    return part / whole


def belongs_to(kind, name):
    if kind == "role":
        return lambda row, i: row.labelled[i] == (name == ROLES[0])
    if kind == "token class":
        return lambda row, i: row.classes[i] == name
    number = PLACES.index(name)
    return lambda row, i: number / 10 <= i / len(row.labelled) < (number + 1) / 10


@pytest.mark.parametrize("kind", GROUPS)
def test_shares_are_those_of_a_slow_count(kind):
    shares = counted()
    for who in (ALL, LABELLED, *SCORERS):
        found = shares.shares(who, kind)
        expected = {name: slow_share(rows(), who, belongs_to(kind, name)) for name in GROUPS[kind]}
        assert found == pytest.approx(expected, abs=1e-12) and sum(found.values()) == pytest.approx(1)
        if who in SCORERS:  # the sibling
            assert found != pytest.approx({name: slow_share(rows(1), who, belongs_to(kind, name)) for name in GROUPS[kind]}, abs=1e-3)


def test_overlaps_are_those_of_a_slow_count():
    shares = counted()
    for one in SCORERS:
        for other in SCORERS:
            pairs = [pair for row in rows() for pair in zip(row.chances[one], row.chances[other])]
            expected = sum(min(pair) for pair in pairs) / sum(max(pair) for pair in pairs)
            assert shares.overlap(one, other) == pytest.approx(expected, abs=1e-12)
            assert (expected == 1) == (one == other)


def test_of_kept_sets_the_overlap_is_that_of_jaccard():
    kept = {"context": {0, 1, 2}, "gradient": {1, 2, 3, 4}, "random": set()}
    row = ComparedRow([True] * 6, ["number"] * 6, {name: [float(i in chosen) for i in range(6)] for name, chosen in kept.items()})
    shares = counted([row])
    assert shares.overlap("context", "gradient") == len(kept["context"] & kept["gradient"]) / len(kept["context"] | kept["gradient"]) == 0.4
    assert shares.overlap("gradient", "context") == 0.4 and shares.overlap("context", "random") == 0
    assert set(shares.shares("random", "position").values()) == {0.0}  # keeps nothing, and divides by nothing


def test_the_page_and_the_json_show_the_numbers(tmp_path):
    shares = counted()
    page, numbers = write_scorer_comparison(shares, decisions(), tmp_path / "out" / "scorers.html", {"model": "a <b>"})
    text, told = page.read_text(), json.loads(numbers.read_text())
    assert numbers.name == "scorers.json" and told["overlap"] == shares.to_dict()["overlap"] and told["rows"] == 5
    shown = [float(value) for value in re.findall(r">([\d.]+) %</td>", text)]
    expected = [round(100 * shares.shares(who, kind)[name], 1) for kind in GROUPS for name in GROUPS[kind] for who in shares.columns]
    assert shown == pytest.approx(expected, abs=0.051) and len(shown) == 18 * 5
    assert f">{shares.overlap('context', 'gradient'):.3f}</td>" in text
    other, _ = write_scorer_comparison(counted(rows(1)), decisions(), tmp_path / "other.html", {})
    assert [float(value) for value in re.findall(r">([\d.]+) %</td>", other.read_text())] != shown


def test_how_much_of_a_draw_is_even_is_said_of_each_scorer(tmp_path):
    one, *others = decisions()
    for floors, words in (
        ((0.5, 0.5), "Half of the weight"),
        ((0.25, 0.5), f"A quarter ({one.scorer}), half ({others[0].scorer}) of the weight"),
        ((0.25, 0.25), "A quarter of the weight"),  # random, of the floor of 1/2 that it does not read, has no part in it
    ):
        told = [replace(each, floor=floor, selection="sample") for each, floor in zip((one, others[0]), floors)]
        page, numbers = write_scorer_comparison(counted(), [*told, others[1]], tmp_path / "scorers.html", {})
        assert words in " ".join(page.read_text().split())
        listed = json.loads(numbers.read_text())["scorers"]
        assert {name: "sample_floor" in settings for name, settings in listed.items()} == {
            "context": True,
            "gradient": True,
            "random": False,
        }


def test_the_page_stands_alone_and_is_the_same_each_time(tmp_path):
    first, second = (write_scorer_comparison(counted(), decisions(), tmp_path / name, {"model": "a <b>"}) for name in ("a.html", "b.html"))
    text = first[0].read_text()
    assert text == second[0].read_text() and first[1].read_text() == second[1].read_text()
    assert "a &lt;b&gt;" in text and not re.search(r"(src|href)=|@import|url\(|<script", text)


def test_the_page_does_not_grow_with_the_rows(tmp_path):
    few, many = (
        write_scorer_comparison(counted(rows() * times), decisions(), tmp_path / f"{times}.html", {})[0].stat().st_size for times in (1, 50)
    )
    assert abs(many - few) < 200


def test_the_page_tells_draws_from_highest_scores(tmp_path):
    drawn, best = (write_scorer_comparison(counted(), decisions(how), tmp_path / "x.html", {})[0].read_text() for how in ("sample", "top"))
    assert "averages over all draws" in drawn and "averages over all draws" not in best
    assert "tokens kept by both, over those kept by either" in best and "lower of a token's two chances" in drawn


@pytest.mark.parametrize("pool, always, said", [("labels", "none", True), ("labels", "first_last", False), ("all", "none", False)])
def test_the_page_explains_labels_places_and_axes(tmp_path, pool, always, said):
    told = [replace(each, select_from=pool, always_keep=always) for each in decisions()]
    text = write_scorer_comparison(counted(), told, tmp_path / "x.html", {})[0].read_text()
    assert "the last token of the\nprompt" in text and "its prompt included, is cut\ninto ten parts" in text
    assert ("each scorer has 100 % of them" in text) == said
    assert ">share of the kept tokens; dashed" in text and ">position in the text" in text


@pytest.mark.parametrize("labelled, columns, roles", [(0.6, 5, True), (1.0, 4, True), (0.0, 4, False)])
def test_roles_are_shown_where_there_are_labels(tmp_path, labelled, columns, roles):
    shares = counted(rows(labelled=labelled))
    page, numbers = write_scorer_comparison(shares, decisions(), tmp_path / "x.html", {})
    assert len(shares.columns) == columns
    assert ("role" in json.loads(numbers.read_text())["shares"]) == roles == (ROLES[0] in page.read_text())


def test_no_two_lines_of_the_chart_look_alike_and_each_is_in_the_key(tmp_path):
    names = [f"scorer {number}" for number in range(9)]  # as many as are built in, and more than there are colours
    shares = ScorerShares(names)
    shares.add(ComparedRow([True, False], ["number"] * 2, dict.fromkeys(names, [0.5, 0.5])))
    told = [Decision(name, "sample", 0.3, "all", "none") for name in names]
    text = write_scorer_comparison(shares, told, tmp_path / "x.html", {})[0].read_text()
    lines = re.findall(r"<polyline points='[^']*' fill='none' (stroke=[^/]*)/>", text)
    assert len(lines) == len(set(lines)) == len(shares.columns) == 11
    assert re.findall(r"y2='3' (stroke=[^/]*)/></svg>([^<]*)<", text) == list(zip(lines, shares.columns))


def test_what_cannot_be_shown_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        write_scorer_comparison(ScorerShares(SCORERS), decisions(), tmp_path / "x.html", {})
    with pytest.raises(ValueError, match="'classes': 1.* expected 2"):
        ScorerShares(["a"]).add(ComparedRow([True, False], ["number"], {"a": [0.5, 0.5]}))


# --- classes of tokens


@pytest.mark.parametrize(
    "piece, before, expected",
    [
        (" word", "The", "word start"),
        ("Word", "", "word start"),
        ("ing", " end", "word continuation"),
        ("'t", " don", "word continuation"),
        ("word", "(", "word start"),
        ("word", "\n", "word start"),
        ("words", "3", "word start"),
        (" 1", "the", "number"),
        ("2", "1", "number"),
        ("1.5", " ", "number"),
        (".", "end", "punctuation"),
        (" ->", "end", "punctuation"),
        ("\n\n", "end", "white space"),
        ("   ", "end", "white space"),
        ("\ufffd", "end", "word continuation"),
        ("", "end", "word continuation"),
    ],
)
def test_a_token_has_a_class(piece, before, expected):
    assert token_classes([before, piece], [0, 1], {})[1] == expected


def test_special_tokens_are_known_by_their_number_and_end_a_word():
    assert token_classes(["a", "<s>", "b"], [5, 1, 6], {1}) == ["word start", "special", "word start"]
    assert token_classes(["a", "<s>", "b"], [5, 1, 6], {}) == ["word start", "word continuation", "word start"]
