"""`hf-memtune tokens`: a page and a picture of what is kept, for a text or for rows of a data set."""

import pytest
import torch

from hf_memtune.cli import main, tokens
from hf_memtune.errors import ConfigError
from tests.support.chances import slow_probability

PNG = b"\x89PNG"


def maps_of(*arguments: str):
    return tokens.make_maps(tokens.parse(list(map(str, arguments))))


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        tokens.parse(list(map(str, arguments)))
    return caught.value.problems


def test_a_text_gives_a_page_and_a_picture(model, tmp_path, capsys):
    (tmp_path / "poem.txt").write_text("the sun and the sea are two colours " * 4)
    assert main(["tokens", "--model", str(model), "--text", "poem.txt", "--token_ratio", "0.25"]) == 0
    assert "poem.txt" in (tmp_path / "tokens.html").read_text()
    assert (tmp_path / "tokens.png").read_bytes().startswith(PNG)
    shown = capsys.readouterr().out
    assert "poem.txt" in shown and "tokens.html" in shown and "tokens.png" in shown


def test_rows_of_a_data_set(chat_model, instructions, tmp_path):
    flags = ["--dataset", str(instructions), "--index", "0", "-1", "--out", "pages/rows.html"]
    assert main(["tokens", "--model", str(chat_model), *flags]) == 0
    page = (tmp_path / "pages" / "rows.html").read_text()
    assert "row 0" in page and "row 23" in page
    assert (tmp_path / "pages" / "rows.png").read_bytes().startswith(PNG)


def test_more_rows_than_a_picture_holds_have_a_page(chat_model, instructions, tmp_path, capsys):
    flags = ["--dataset", str(instructions), "--index", *["0"] * 150]
    assert main(["tokens", "--model", str(chat_model), *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens.html" in shown and "Choose fewer with --index" in shown and not (tmp_path / "tokens.png").exists()
    assert (tmp_path / "tokens.html").read_text().count("<section>") == 150


def test_the_maps_show_the_scores_the_labels_and_as_many_kept_tokens_as_asked_for(chat_model, instructions):
    (shown,) = maps_of("--model", chat_model, "--dataset", instructions, "--index", "1", "--token_ratio", "0.2")
    assert set(shown.scores) == {"context", "gradient", "combined"}
    assert sum(shown.kept) == -(-len(shown.tokens) // 5)
    answer = [token.strip() for token, labelled in zip(shown.tokens, shown.labelled, strict=True) if labelled]
    assert answer[0] == "assistant" and 0 < sum(shown.labelled) < len(shown.tokens)  # a position is labelled by what follows it


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_a_row_is_the_same_alone_and_beside_another(selection, chat_model, instructions):
    common = ("--model", chat_model, "--dataset", instructions, "--token_scorer", "combined", "--token_selection", selection, "--index")
    alone, beside = maps_of(*common, "1"), maps_of(*common, "0", "1")
    assert alone[0] == beside[1] != beside[0]


def test_every_setting_of_token_seeking_reaches_the_maps(chat_model, instructions):
    common = ("--model", chat_model, "--dataset", instructions, "--index", "1", "--token_ratio", "0.3")
    best = (*common, "--token_selection", "top", "--select_from", "all")
    by_default = maps_of(*common)[0]
    assert maps_of(*best, "--token_scorer", "context")[0].kept != maps_of(*best, "--token_scorer", "gradient")[0].kept
    assert maps_of(*common, "--context_layer", "0")[0].scores["context"] != by_default.scores["context"]
    assert maps_of(*common, "--gradient_norm", "l1")[0].scores["gradient"] != by_default.scores["gradient"]
    anywhere = maps_of(*best, "--token_scorer", "context")[0]
    assert _keeps_labelled_alone(by_default) and not _keeps_labelled_alone(anywhere)


def _keeps_labelled_alone(shown) -> bool:
    return all(labelled for labelled, kept in zip(shown.labelled, shown.kept, strict=True) if kept)


def test_the_chances_are_those_of_the_score_that_decided(chat_model, instructions):
    """Computed again from the numbers of the map, slowly; and by the weights: a kept token counts one over its chance."""
    common = ("--model", chat_model, "--dataset", instructions, "--index", "1", "--token_ratio", "0.3")
    (shown,) = maps_of(*common, "--token_scorer", "combined")
    pool = torch.tensor(shown.labelled)
    by_score, by_other = (
        slow_probability(torch.tensor(shown.scores[name], dtype=torch.float64), pool, sum(shown.kept)).tolist()
        for name in ("combined", "context")
    )
    assert shown.probability == pytest.approx(by_score, abs=1e-6) != pytest.approx(by_other, abs=1e-6)
    assert sum(shown.probability) == pytest.approx(sum(shown.kept))
    assert (
        shown.decision.listed() | {"token_scorer": "combined", "token_selection": "sample", "token_ratio": 0.3} == shown.decision.listed()
    )


def test_what_is_drawn_is_the_same_each_time_and_of_the_best_there_is_no_chance(chat_model, instructions):
    common = ("--model", chat_model, "--dataset", instructions, "--index", "1")
    (first,), (second,), (best,) = (
        maps_of(*common),
        maps_of(*common),
        maps_of(*common, "--token_selection", "top", "--token_scorer", "context"),
    )
    assert first == second != best
    assert first.probability is not None and best.probability is None
    assert (first.decision.scorer, first.decision.parameters) == ("random", {})
    assert best.decision.parameters == {"context_layer": -1, "context_normalize": "sum"}


def test_what_is_too_improbable_is_left_out(chat_model, instructions, tmp_path):
    """By the numbers of the map; tokens without a label have no probability of one, and are shown so."""
    flags = ["--model", str(chat_model), "--dataset", str(instructions), "--index", "1", "--token_selection", "top", "--token_ratio", "1"]
    flags += ["--token_scorer", "profit"]
    (every,) = maps_of(*flags)  # its scores are shown, too
    assert all(every.kept)  # the sibling
    flags += ["--select_from", "all"]
    scores = sorted(every.scores["profit"][i] for i, labelled in enumerate(every.labelled) if labelled)
    least = (scores[1] + scores[2]) / 2
    (shown,) = maps_of(*flags, "--profit_threshold", least)
    assert shown.kept == [labelled and score > least for labelled, score in zip(shown.labelled, shown.scores["profit"])]
    assert sum(shown.kept) == sum(shown.labelled) - 2 and {shown.scores["profit"][i] for i in (0, 1)} == {-float("inf")}
    assert main(["tokens", *flags, "--profit_threshold", str(least)]) == 0
    page = (tmp_path / "tokens.html").read_text()
    assert f"Left out are those with a score below {least:g}" in page and "<dt>profit_threshold</dt>" in page
    assert (tmp_path / "tokens.png").read_bytes().startswith(PNG)


def test_a_ratio_of_one_keeps_every_token(chat_model, instructions):
    (shown,) = maps_of("--model", chat_model, "--dataset", instructions, "--token_ratio", "1")
    assert all(shown.kept) and set(shown.probability) == {1.0} and not all(shown.labelled)


def test_a_classifier_has_maps_too(encoder, reviews):
    flags = ["--task", "sequence_classification", "--max_length", "64", "--token_ratio", "0.5"]
    (shown,) = maps_of("--model", encoder, "--dataset", reviews, *flags)
    assert shown.kept[0]  # where the head reads
    assert shown.decision.select_from == "all" and "label" not in " ".join(shown.decision.said())  # none has one of its own


def test_a_new_head_for_classes_is_told_and_is_the_same_each_time(encoder, reviews):
    flags = ("--model", encoder, "--dataset", reviews, "--task", "sequence_classification", "--max_length", "64")
    with pytest.warns(UserWarning, match="has no head for classes, so it gets a new one"):
        (one,) = maps_of(*flags)
    torch.manual_seed(7)
    (other,) = maps_of(*flags)
    assert one.scores["gradient"] == other.scores["gradient"]


def test_max_length_cuts_a_text(model, tmp_path):
    (tmp_path / "long.txt").write_text("the sun " * 50)
    flags = ("--model", model, "--text", "long.txt", "--max_length", "12")
    (shown,) = maps_of(*flags)
    assert len(shown.tokens) == 12
    assert main(["tokens", *map(str, flags)]) == 0
    assert "<dt>max_length</dt><dd>12 tokens</dd>" in (tmp_path / "tokens.html").read_text()


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], {"model_name_or_path", "dataset_name"}),
        (["--model", "m", "--text", "absent.txt"], {"text"}),
        (["--model", "m", "--dataset", "d", "--out", "page.pdf", "--token_ratio", "0"], {"out", "token_ratio"}),
        (["--model", "m", "--dataset", "d", "--token_seeking", "false"], {"token_seeking"}),
        (["--model", "m", "--dataset", "d", "--learning_rate", "1"], {"learning_rate"}),
        (["recipe.yaml", "--model", "m", "--dataset", "d"], {"recipe.yaml"}),
        (["--model", "m", "--dataset", "d", "--seek_schedule", "once", "--packing"], {"seek_schedule", "packing"}),
        (["--model", "m", "--dataset", "d", "--skip_threshold", "0.1", "--rows", "3"], {"skip_threshold", "rows"}),
        (["--model", "m", "--dataset", "d", "--token_scorer", "profit"], {"token_selection"}),
        (
            ["--model", "m", "--dataset", "d", "--reference_model", "r"],
            {"reference_model has no effect with token_scorer=random. Leave it out."},
        ),
    ],
)
def test_settings_that_cannot_work(flags, named):
    assert {message.partition(":")[0] for message in problems(*flags)} == named


def test_a_page_that_cannot_be_written_is_told_before_anything_is_scored(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = problems("--model", "m", "--dataset", "d", "--out", "file/page.html")
    assert found == f"out: got 'file/page.html', and {str(tmp_path / 'file')!r} is no folder. Name another one (--out)."


def test_a_flag_without_effect_is_an_error():
    (found,) = problems("--model", "m", "--dataset", "d", "--task", "causal_lm", "--label_column", "y")
    assert found.startswith("label_column has no effect with task=causal_lm") and found.endswith("Leave it out.")


def test_a_text_and_a_data_set_are_one_too_many(tmp_path):
    (tmp_path / "poem.txt").write_text("the sun")
    found = problems("--model", "m", "--text", "poem.txt", "--dataset", "d", "--index", "3", "--output_column", "o")
    assert {message.partition(":")[0] for message in found} == {"dataset_name", "index", "output_column"}


@pytest.mark.parametrize(
    "flags, expected", [(["--index", "24"], "has 24 rows"), (["--max_length", "3"], "none of the 1 rows has a labelled token")]
)
def test_what_only_shows_with_the_data(flags, expected, model, instructions, capsys):
    assert main(["tokens", "--model", str(model), "--dataset", str(instructions), *flags]) == 2
    assert expected in capsys.readouterr().err


def test_a_scorer_that_there_is_not_is_told_with_all_else_that_is_wrong():
    found = problems("--model", "m", "--dataset", "d", "--token_scorer", "attention", "--max_length", "1")
    assert {message.partition(",")[0] for message in found} == {"token_scorer: got 'attention'", "max_length: got 1"}


def test_an_empty_text(model, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert main(["tokens", "--model", str(model), "--text", "empty.txt"]) == 2
    assert "no two tokens" in capsys.readouterr().err


def test_a_file_that_is_no_text(model, tmp_path, capsys):
    (tmp_path / "weights.txt").write_bytes(b"ab\xff\xfe")
    assert main(["tokens", "--model", str(model), "--text", "weights.txt"]) == 2
    assert "text: 'weights.txt' is no text in UTF-8 (byte 2)." in capsys.readouterr().err


def test_reversible_adapters_change_the_scores(model, instructions, tmp_path):
    from tests.support.train import REVERSIBLE, arguments

    far = ["--learning_rate", "0.1", "--output_dir", "trained"]
    assert main(["train", *arguments(None, model, instructions, *REVERSIBLE, *far)]) == 0
    common = ("--model", model, "--dataset", instructions, "--token_scorer", "context")
    (plain,), (adapted,) = maps_of(*common), maps_of(*common, "--reversible_adapters", "trained")
    assert plain.tokens == adapted.tokens and plain.scores["context"] != adapted.scores["context"]
    assert set(adapted.scores) == {"context"}  # the last block, a reversible one, cannot run alone
    assert "absent" in problems(*common, "--reversible_adapters", "absent")[0]
