"""How long rows may be: as many tokens as the model has positions for, and where nothing is said no more."""

import pytest
import torch

from hf_memtune.cli import estimate, evaluate, glue, main, tokens, train
from hf_memtune.cli.lengths import config_of, positions_of
from tests.support.any_type import tiny
from tests.support.train import arguments

CLASSIFY = ["--task", "sequence_classification"]


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "xmod", "data2vec-text", "gpt2", "opt", "mpnet"])
def test_all_positions_have_an_embedding_and_the_next_has_none(name):
    model = tiny(name, "masked" if name not in ("gpt2", "opt") else "causal", torch.float32).eval()
    positions = positions_of(model.config)
    assert positions is not None

    def run(count):
        return model(torch.full((1, count), 5)).logits

    assert run(positions).shape[1] == positions
    with pytest.raises((IndexError, RuntimeError)):
        run(positions + 1)


def test_a_model_without_a_bound_has_none():
    assert positions_of(tiny("bloom").config) is None


def test_where_nothing_is_said_rows_are_no_longer_than_the_model_takes(encoder, model, reviews, instructions, tmp_path):
    run = arguments(None, encoder, reviews, *CLASSIFY)
    assert main(["train", *run]) == 0
    assert "| longest row | 256 tokens at most |" in (tmp_path / "out" / "README.md").read_text()
    named = ["--model", str(encoder), "--dataset", str(reviews), *CLASSIFY]
    assert evaluate.parse(named).data.max_length == 256 == tokens.parse(named).data.max_length
    assert estimate.forecast.parse(["--model", str(encoder)], estimate.make_parser()).tokens == 256
    assert train.parse(arguments(None, model, instructions, "--output_dir", "more")).data.max_length == 1024  # of a model with that many


def test_adapters_have_the_positions_of_what_they_were_trained_on(model, instructions, tmp_path):
    assert main(["train", *arguments(None, model, instructions, "--lora_r", "2")]) == 0
    assert positions_of(config_of("out")) == positions_of(config_of(str(model))) == 1024


def test_what_was_said_is_kept_or_refused(encoder, reviews, capsys):
    assert train.parse(arguments(None, encoder, reviews, *CLASSIFY, "--max_length", "300")).data.max_length == 300
    assert main(["train", *arguments(None, encoder, reviews, *CLASSIFY, "--max_length", "300")]) == 2
    assert "max_length: got 300 tokens, but the model has positions for 256. Set it to that or less." in capsys.readouterr().err
    assert glue.parse(["--task_name", "rte", "--model", str(encoder), "--use_cpu"]).data.max_length == 128  # its own default is less
