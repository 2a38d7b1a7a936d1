"""Token maps: the data is checked, and page and picture show it all and load nothing from elsewhere."""

import math
import re
import struct
from dataclasses import replace

import pytest

from hf_memtune.settings.scorers import BUILT_IN
from hf_memtune.visualization import TokenMap, picture, write_token_map_html, write_token_map_png
from hf_memtune.visualization.decision import EXPLANATIONS, Decision, as_shown
from hf_memtune.visualization.panels import colour_levels
from hf_memtune.visualization.token_map import visible

TOKENS = ["<script>", "alert(1)", "\n", "  ", " a&b", " end"]


def a_map(kept=(0, 4), labelled=(2, 3, 4), tokens=TOKENS):
    n = len(tokens)
    scores = {"context": [500.0, *[0.1 * (i + 1) for i in range(n - 1)]], "combined": [float(i) for i in range(n)]}
    flags = [[i in chosen for i in range(n)] for chosen in (kept, labelled)]
    return TokenMap("row <1>", list(tokens), scores, *flags)


def page(tmp_path, maps):
    return write_token_map_html(maps, tmp_path / "out" / "tokens.html", {"model": "a <b> model"}).read_text()


def test_the_page_loads_nothing_and_escapes_the_text(tmp_path):
    text = page(tmp_path, [a_map()])
    assert not re.search(r"(src|href)=|@import|url\(|<script", text)
    assert "&lt;script&gt;" in text and "a &lt;b&gt; model" in text and "row &lt;1&gt;" in text


@pytest.mark.parametrize("kept", [(0, 4), (1,), ()])
def test_kept_tokens_are_marked_once_in_each_panel(tmp_path, kept):
    text = page(tmp_path, [a_map(kept=kept)])
    marks = re.findall(r"class='t k[^']*'", text)
    assert len(marks) == 2 * len(kept)  # two scores, two panels
    assert text.count("class='dot'") == 2 * len(kept)


def test_the_numbers_are_those_of_the_map(tmp_path):
    text = page(tmp_path, [a_map()])
    assert "2 (33.3 %)" in text  # kept
    assert "1 (50.0 % of the kept)" in text  # kept and labelled
    assert "3 (50.0 %)" in text  # labelled
    other = page(tmp_path, [a_map(kept=(0, 1, 4))])
    assert "2 (33.3 %)" not in other


def test_a_sink_does_not_wash_out_the_other_tokens():
    levels = colour_levels([1e6, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert levels[1:] == sorted(levels[1:]) and len(set(levels)) == 6


@pytest.mark.parametrize("last, said", [(0.0, "(log scale, a score of 0 at its lower end; dots"), (0.1, "(log scale; dots")])
def test_a_score_of_0_on_a_logarithmic_axis_is_told(tmp_path, last, said):
    shown = replace(a_map(), scores={"gradient": [500.0, 0.2, 0.3, 0.4, 0.5, last]})
    assert said in page(tmp_path, [shown]) and "log scale" not in page(tmp_path, [replace(shown, scores={"gradient": [last] * 6})])


def test_white_space_is_visible_and_still_breaks_the_line():
    assert visible("\n") == ("", "⏎", "\n")
    assert visible(" word") == (" ", "word", "")
    assert "␣" in visible("  ")[1]


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError) as error:
        TokenMap("t", ["a", "b"], {"context": [1.0]}, [True], ["yes", "no"])
    for place in ("scores['context']", "kept", "labelled"):
        assert place in str(error.value)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    file = write_token_map_png([a_map(), a_map(kept=(1,))], tmp_path / "tokens.png", {"model": "m"})
    data = file.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and width == 1800 and height > 500
    one = write_token_map_png([a_map()], tmp_path / "one.png", {}).read_bytes()
    assert struct.unpack(">II", one[16:24])[1] < height


@pytest.mark.parametrize("write", [write_token_map_html, write_token_map_png])
def test_no_maps_is_an_error(tmp_path, write):
    with pytest.raises(ValueError, match="at least one TokenMap"):
        write([], tmp_path / "nothing", {})


def test_long_texts_are_whole_on_the_page(tmp_path):
    text = page(tmp_path, [a_map(tokens=[f" w{i}" for i in range(2000)])])
    assert "w1999" in text


# --- chances, and what decided

CHANCES = [0.0, 0.0, 0.25, 0.75, 1.0, 0.0]
SAMPLED = Decision("combined", "sample", 0.3, "labels", "none", {"context_layer": -1})
TOP = Decision("combined", "top", 0.1, "all", "first_last")


def drawn(**changed):
    return replace(a_map(kept=(3, 4)), probability=CHANCES, decision=SAMPLED, **changed)


def numbers_of(text):
    """(position, chance, weight, kept) of each token, read from what its first view says under the pointer."""
    found = re.findall(r"title='position (\d+): (kept|not kept), [^;]*; chance p ([^,]+), weight 1/p ([^,]+),", text)
    return [(int(i), float(p), math.nan if weight == "never kept" else float(weight), kept == "kept") for i, kept, p, weight in found]


def test_every_token_tells_its_chance_and_its_weight(tmp_path):
    views = numbers_of(page(tmp_path, [drawn()]))
    assert len(views) == 3 * len(CHANCES)  # the chances, and two scores
    for position, chance, weight, kept in views:
        assert chance == CHANCES[position] and kept == (position in (3, 4))
        assert math.isnan(weight) if chance == 0 else abs(chance * weight - 1) < 1e-3
    others = numbers_of(page(tmp_path, [replace(drawn(), probability=[0.5] * 6)]))
    assert others[0] != views[0]


def test_what_is_seldom_kept_has_a_colour_and_what_never_is_has_none(tmp_path):
    chances = [0.0, 1e-6, 0.001, 0.75, 1.0, 0.0]
    text = page(tmp_path, [replace(drawn(), probability=chances)])
    shades = re.findall(r"background:rgba\(230,159,0,([\d.]+)\)", text)
    assert [float(shade) > 0.1 for shade in shades] == [p > 0 for p in chances] and shades[3] < shades[4]


@pytest.mark.parametrize("highest", [0.08, 1.0])
def test_the_chart_of_chances_goes_from_0_to_the_highest(tmp_path, highest):
    text = page(tmp_path, [replace(drawn(), probability=[0.0, 0.0, 0.02, 0.04, highest, 0.0])])
    line, top, bottom = re.search(
        r"aria-label='chance of being kept by position'><polyline points='([^']*)'.*?'end'>([\d.]+)<.*?'end'>([\d.]+)<", text
    ).groups()
    heights = [float(point.partition(",")[2]) for point in line.split()]
    assert (float(top), float(bottom)) == (highest, 0) and heights[4] == min(heights) == 10 and heights[0] == max(heights) > 100


def test_a_cap_bounds_the_weights_that_are_shown(tmp_path):
    capped = replace(drawn(), decision=replace(drawn().decision, cap=1.5))
    text, free = page(tmp_path, [capped]), page(tmp_path, [drawn()])
    assert max(weight for _, _, weight, _ in numbers_of(text) if not math.isnan(weight)) == 1.5
    assert max(weight for _, _, weight, _ in numbers_of(free) if not math.isnan(weight)) == 4
    assert "at most 1.5 times" in text and "leans towards tokens that are often drawn" in text and "is that of all tokens" not in text
    assert "is that of all tokens" in free and "at most" not in free


LABELS = [1.0, 0.5, 0.5, 0.25, 0.125, 1.0]


def test_a_weight_by_the_probability_of_the_label_is_a_part_of_the_weights_that_are_shown(tmp_path):
    weighed = replace(drawn(), label_probability=LABELS, decision=replace(SAMPLED, weight="dft"))
    text = page(tmp_path, [weighed])
    found = re.findall(r"title='position (\d+): [^;]*; chance p ([^,]+), label&#x27;s q ([^,]+), weight q/p ([^,]+),", text)
    assert len(found) == 3 * len(CHANCES) and "weight 1/p" not in text
    for i, p, q, weight in found:
        assert (float(p), float(q)) == (CHANCES[int(i)], LABELS[int(i)])
        assert weight == "never kept" if float(p) == 0 else float(weight) == pytest.approx(float(q) / float(p), rel=1e-3)
    assert "0.125 to 2" in text and "each times its q" in text and "<dt>token_weight</dt><dd>dft</dd>" in text
    best = page(tmp_path, [replace(a_map(), label_probability=LABELS, decision=replace(TOP, weight="dft"))])
    assert "weight q " in best and "q/p" not in best and "counts once in the loss, times the probability q" in best
    assert "token_weight" not in page(tmp_path, [drawn()]) and "each times its q" not in page(tmp_path, [drawn()])  # the sibling


def test_every_label_is_as_in_plain_training_but_for_its_weight():
    every = replace(TOP, selection="labelled")
    (said,), (weighed,) = every.said(), replace(every, weight="dft").said()
    assert "as in plain training" in said and "probability q" not in said
    assert "as in plain training" not in weighed and "times the probability q that the model gives its label" in weighed
    assert replace(every, weight="dft").listed()["token_weight"] == "dft" and "token_weight" not in every.listed()


def test_the_table_has_a_line_for_every_token(tmp_path):
    text = page(tmp_path, [drawn()])
    lines = re.findall(r"<tr[^>]*><td>(\d+)</td><td>.*?</td><td>(yes)?</td><td>(yes)?</td><td>([\d.]+)</td>", text)
    assert [(float(p), kept == "yes") for _, _, kept, p in lines] == list(zip(CHANCES, drawn().kept))
    assert "2.00" in text and "1 to 4" in text  # the chances summed; the weights


def test_without_draws_the_page_says_so_in_place_of_chances(tmp_path):
    text = page(tmp_path, [replace(a_map(), decision=TOP)])
    assert "No token has a probability here (token_selection=top)" in text
    assert "chance p" not in text and "weight 1/p" not in text and "yellow" not in text
    assert "No token has a probability" not in page(tmp_path, [drawn()])


@pytest.mark.parametrize(
    "decision, said, unsaid",
    [
        (
            SAMPLED,
            ["the likelier the higher their combined score", "30 % of each text, rounded up", "carry a label (all", "1/p times"],
            ["first and the last"],
        ),
        (TOP, ["highest combined score", "10 % of each text", "first and the last"], ["by chance", "carry a label", "1/p"]),
        (replace(SAMPLED, scorer="random"), ["no score had a part", "as likely as any other", "1/p times"], ["the likelier the higher"]),
        (replace(TOP, scorer="random"), ["picked at random, anew at every step", "No token has a probability"], ["highest"]),
        (replace(TOP, scorer="my_own"), ["my_own score (as named by the scorer)"], ["attention"]),
        (replace(SAMPLED, ratio=1.0), ["Every token is kept"], ["by chance", "1/p"]),
    ],
)
def test_the_page_says_what_decided(tmp_path, decision, said, unsaid):
    words = " ".join(decision.said())
    assert all(part in words for part in said) and not any(part in words for part in unsaid)
    text = page(tmp_path, [replace(a_map(), decision=decision)])
    assert all(part in text for part in said)
    assert f"<dt>token_scorer</dt><dd>{decision.scorer}</dd>" in text and f"<dd>{decision.selection}</dd>" in text


def test_a_share_of_even_draws_is_listed_where_a_score_has_the_rest():
    assert SAMPLED.listed()["sample_floor"] == 0.5
    even = replace(SAMPLED, scorer="random", cap=3.0).listed()
    assert "sample_floor" not in even and even["weight_cap"] == 3 and as_shown(3.0) == "3"


def test_every_score_is_explained():
    assert EXPLANATIONS.keys() | {"random"} == BUILT_IN.keys()
    assert "from itself" in EXPLANATIONS["context"]  # the last token of a text gets its own attention alone, and not 0


def test_a_decision_is_said_once(tmp_path):
    once = page(tmp_path, [drawn(), drawn(title="another")])
    assert once.count("What decided here") == 1
    assert page(tmp_path, [drawn(), replace(a_map(), decision=TOP)]).count("What decided here") == 2
    assert "What decided here" not in page(tmp_path, [a_map()])


def test_the_score_that_decided_comes_first(tmp_path):
    text = page(tmp_path, [drawn()])
    assert text.index("combined score") < text.index("context score") and text.count("this score decided") == 1
    other = page(tmp_path, [replace(drawn(), decision=replace(SAMPLED, scorer="context"))])
    assert other.index("context score <") < other.index("combined score <")


@pytest.mark.parametrize(
    "chances, place",
    [
        ([0.5] * 5, "got 5 values"),
        ([1.5] * 6, "got 1.5"),
        ([float("nan")] * 6, "got nan"),
        (["1"] * 6, "got '1'"),
        ([0.0] * 6, "probability[3]: got 0"),
    ],
)
def test_chances_that_cannot_be_are_named(chances, place):
    with pytest.raises(ValueError, match="probability") as error:
        replace(drawn(), probability=chances)
    assert place in str(error.value)


def test_probabilities_of_labels_are_checked_too():
    with pytest.raises(
        ValueError, match=r"label_probability: got 1\.5, expected a number in \[0, 1\] per token; leave it out where losses"
    ):
        replace(a_map(), label_probability=[1.5] * 6)


def test_the_picture_tells_what_a_kept_token_counts_for(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    written = []
    monkeypatch.setattr(picture, "_write", lambda figure, place, text, *size, **style: written.append(text))
    for each, weights in ((drawn(), "counts 1 to 4 times in the loss"), (a_map(), None)):
        written.clear()
        write_token_map_png([each], tmp_path / "a.png", {})
        assert any(weights in text for text in written) if weights else not any("in the loss" in text for text in written)


def test_the_picture_has_a_view_more(tmp_path):
    pytest.importorskip("matplotlib")
    plain, with_chances = (write_token_map_png([each], tmp_path / "a.png", {}).read_bytes() for each in (a_map(kept=(3, 4)), drawn()))
    assert plain != with_chances
    assert with_chances == write_token_map_png([drawn()], tmp_path / "b.png", {}).read_bytes()
