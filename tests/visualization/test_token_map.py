"""Token maps: the data is checked, and page and picture show it all and load nothing from elsewhere."""

import re
import struct

import pytest

from hf_memtune.visualization import TokenMap, write_token_map_html, write_token_map_png
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
