"""`hf-memtune tokens --compare`: what scorers keep of a data set, counted once more from their token maps."""

import json

import pytest

from hf_memtune.cli import main, tokens
from hf_memtune.errors import ConfigError
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.training.scorer_comparison import configs_of
from hf_memtune.visualization.scorer_shares import PLACES, ROLES
from tests.support.folders import llama

COMPARED = ("combined", "context", "gradient", "true_gradient", "softmax_residual", "loss", "random")
ROWS = 4


def compared(*arguments) -> dict:
    """The numbers of a page."""
    assert main(["tokens", *map(str, arguments), "--out", "out/page.html"]) == 0
    with open("out/page.json") as file:
        return json.load(file)


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        tokens.parse(["--model", "m", "--dataset", "d", *arguments])
    return caught.value.problems


def chances_of(scorer, *arguments) -> list[tuple[list[float], list[bool]]]:
    """Of each row: the chance of each token to be kept, and which carry a label. By a token map, which makes a pass of its own."""
    index = ("--index", *map(str, range(ROWS)))
    maps = tokens.make_maps(tokens.parse([*map(str, arguments), *index, "--token_scorer", scorer]))
    return [(shown.probability or [float(kept) for kept in shown.kept], shown.labelled) for shown in maps]


@pytest.mark.parametrize(
    "selection",
    [
        (),
        ("--token_gradient", "stream"),
        ("--token_selection", "top", "--select_from", "all", "--token_ratio", "0.2", "--always_keep", "none"),
    ],
    ids=["sample", "stream", "top"],
)
def test_the_numbers_are_those_of_the_token_maps(chat_model, instructions, selection, capsys):
    common = ("--model", chat_model, "--dataset", instructions, *selection)
    names = ("context", "gradient", "true_gradient", "loss", "random")[
        : 4 if "top" in selection else 5
    ]  # the best of random scores are others in each pass
    found = compared(*common, "--compare", *names, "--rows", ROWS)
    shown = capsys.readouterr().out
    assert found["rows"] == ROWS and "out/page.html" in shown and "out/page.json" in shown
    assert found["scorers"]["loss"]["token_ratio"] == (0.2 if "top" in selection else 0.3)  # a number, as all here are
    alone = {name: chances_of(name, *common) for name in names}
    for name, wrong in zip(names, (*names[1:], names[0])):
        told = (found["shares"]["position"][name], found["shares"]["role"][name])
        assert _slow_shares(alone[name]) == pytest.approx(told[0], abs=1e-6) and _slow_role(alone[name]) == pytest.approx(told[1], abs=1e-6)
        assert _slow_shares(alone[wrong]) != pytest.approx(told[0], abs=1e-6)
        assert _slow_overlap(alone[name], alone[wrong]) == pytest.approx(found["overlap"][name][wrong], abs=1e-6)


def _slow_shares(rows) -> dict[str, float]:
    whole = sum(sum(chances) for chances, _ in rows)
    tenth = {place: 0.0 for place in PLACES}
    for chances, _ in rows:
        for i, chance in enumerate(chances):
            tenth[PLACES[int(10 * i / len(chances) + 1e-9)]] += chance / whole
    return tenth


def _slow_role(rows) -> dict[str, float]:
    whole = sum(sum(chances) for chances, _ in rows)
    answer = sum(chance for chances, labelled in rows for chance, flag in zip(chances, labelled) if flag) / whole
    return dict(zip(ROLES, (answer, 1 - answer)))


def _slow_overlap(one, other) -> float:
    pairs = [pair for (first, _), (second, _) in zip(one, other) for pair in zip(first, second)]
    return sum(map(min, pairs)) / sum(map(max, pairs))


def test_a_page_is_the_same_each_time_whatever_was_drawn_before(chat_model, instructions, tmp_path):
    common = ("--model", chat_model, "--dataset", instructions, "--preset", "tokentune", "--rows", "3", "--compare", "context")
    first, second = compared(*common, "random"), compared(*common, "random")
    assert first == second != compared(*common, "loss")
    page = (tmp_path / "out" / "page.html").read_text()
    assert "What each score keeps" in page and "preset" not in page


def test_rows_limits_the_rows_and_what_teaches_nothing_is_told(chat_model, tmp_path):
    rows = [{"instruction": "name colours", "output": " red green" * (n != 1)} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", chat_model, "--dataset", tmp_path / "rows.jsonl", "--compare", "context", "random")
    few, all_of_them = compared(*common, "--rows", 2), compared(*common)
    assert (few["rows"], all_of_them["rows"]) == (1, 4)
    assert few["settings"]["rows left out"].startswith("1 (")


def test_a_classifier_is_compared_without_roles(encoder, reviews, capsys):
    common = ("--model", encoder, "--dataset", reviews, "--task", "sequence_classification", "--max_length", "64", "--token_ratio", "0.5")
    found = compared(*common, "--compare", "context", "gradient", "--rows", "2")
    assert set(found["shares"]) == {"position", "token class"} and {each["select_from"] for each in found["scorers"].values()} == {"all"}
    assert main(["tokens", *map(str, common), "--compare", "context", "loss", "true_gradient"]) == 2
    assert "compare: got loss, true_gradient, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--compare", "context"], ["expected two or more different scorers"]),
        (["--compare", "context,random"], ["got context,random, expected two or more scorers, with spaces between them"]),
        (["--compare", "context", "context"], ["expected two or more", "context more than once"]),
        (["--compare", "context", "attention", "--rows", "0"], ["got 0, expected 1 row", "got attention, expected two or more scorers"]),
        (
            ["--compare", "context", "loss", "--index", "3", "--token_scorer", "loss"],
            ["index: chooses single rows", "token_scorer: has no effect"],
        ),
        (["--compare", "loss", "random", "--context_layer", "1"], ["context_layer: none of the compared scorers (loss, random) reads it"]),
        (["--compare", "context", "random", "--token_ratio", "1"], ["token_ratio: got 1"]),
        (["--compare", "context", "random", "--token_selection", "labelled"], ["token_selection: got 'labelled', with which every scorer"]),
        (
            ["--compare", "context", "random", "--weight_cap", "3", "--token_weight", "dft"],
            ["weight_cap: has no effect with compare", "token_weight: has no effect with compare"],
        ),
        (["--compare", "combined", "random", "--context_weight", "0", "--gradient_weight", "0"], ["both are 0"]),
        (["--compare", "random", "excess_loss", "--token_selection", "top"], ["reference_model: got None with token_scorer=excess_loss"]),
        (
            ["--compare", "random", "loss", "--reference_model", "m"],
            ["reference_model: none of the compared scorers (random, loss) reads it"],
        ),
        (
            ["--compare", "profit", "excess_loss", "--reference_model", "m"],
            ["got 'sample' with token_scorer=profit", "got 'sample' with token_scorer=excess_loss"],
        ),
    ],
)
def test_comparisons_that_cannot_work(flags, expected):
    found = problems(*flags)
    assert len(found) == len(expected) and all(part in message for part, message in zip(expected, found))


def test_a_share_of_even_draws_is_read_by_whatever_is_no_chance():
    common = ["--model", "m", "--dataset", "d", "--sample_floor", "0.1"]
    assert tokens.parse([*common, "--compare", "random", "context"]).seeking.sample_floor == 0.1
    assert problems(*common[4:]) == [
        "sample_floor has no effect with token_scorer=random, unless the trainer is given a function, or a model whose loss is one for a row. "
        "Leave it out."
    ]
    (found,) = problems(*common[4:], "--compare", "random", "context", "--token_selection", "top")
    assert found == "sample_floor has no effect with token_selection=top. Leave it out."


def test_a_text_is_not_compared(tmp_path):
    (tmp_path / "poem.txt").write_text("the sun")
    with pytest.raises(ConfigError, match="text: got a text, but scorers are compared"):
        tokens.parse(["--model", "m", "--text", "poem.txt", "--compare", "context", "random"])


def test_all_scorers_together(chat_model, instructions):
    found = compared("--model", chat_model, "--dataset", instructions, "--compare", *COMPARED, "--rows", "2")
    assert list(found["overlap"]) == list(found["scorers"]) == list(COMPARED)
    assert {round(found["tokens"][name], 6) for name in COMPARED} == {round(found["tokens"]["random"], 6)}  # as many of each


def test_scores_that_a_model_has_not_are_named(model, instructions, capsys):
    from tests.support.train import REVERSIBLE, arguments

    assert main(["train", *arguments(None, model, instructions, *REVERSIBLE, "--output_dir", "trained")]) == 0
    common = ["tokens", "--model", str(model), "--dataset", str(instructions), "--reversible_adapters", "trained", "--rows", "2"]
    assert main([*common, "--compare", "context", "random"]) == 0
    assert main([*common, "--compare", "context", "gradient", "loss"]) == 2
    assert "compare: got gradient, loss" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["random", "excess_loss"])
def test_what_is_above_a_reference_is_compared_whichever_is_named_first(chat_model, instructions, tmp_path, first):
    reference = llama(tmp_path / "reference", vocabulary=80)  # of other weights
    both = [first, *({"random", "excess_loss"} - {first})]
    common = ("--model", chat_model, "--dataset", instructions, "--token_selection", "top", "--reference_model", reference)
    found = compared(*common, "--rows", ROWS, "--compare", *both, "loss")
    assert found["scorers"]["excess_loss"]["reference_model"] == str(reference)
    alone = _slow_shares(chances_of("excess_loss", *common))
    told = found["shares"]["position"]
    assert alone == pytest.approx(told["excess_loss"], abs=1e-6) and alone != pytest.approx(told["loss"], abs=1e-6)


def test_scorers_are_compared_by_the_same_rules():
    """By itself the top of random keeps the first and the last token, as in TokenTune, and no other scorer does."""
    alone = TokenSeekingConfig(token_seeking=True, token_selection="top", token_scorer="random")
    compared = [configs_of(TokenSeekingConfig.of(alone, **given), ["random", "context"]) for given in ({}, {"always_keep": "first_last"})]
    assert [[each.kept_always for each in configs] for configs in compared] == [["none"] * 2, ["first_last"] * 2]
    assert alone.kept_always == "first_last"
