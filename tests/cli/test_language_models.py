"""A model that predicts no next token, or not with weights that are stored, is refused by every command that would take it for a language model."""

import pytest
from transformers import AutoModel, BertConfig, BertLMHeadModel

from hf_memtune.cli import main
from tests.support.folders import tokenizer
from tests.support.train import arguments

BOTH_SIDES = "predicts each token from the tokens on both sides"


@pytest.fixture
def body(model):
    """A language model without its head, as AutoModel saves it."""
    AutoModel.from_pretrained(model).save_pretrained("body")
    tokenizer().save_pretrained("body")
    return "body"


@pytest.fixture
def decoder():
    """The layers of BERT, which look back alone."""
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(**size, pad_token_id=0, is_decoder=True)).save_pretrained("decoder")
    tokenizer().save_pretrained("decoder")
    return "decoder"


@pytest.mark.parametrize("command", ["train", "evaluate", "tokens", "generate"])
@pytest.mark.parametrize(
    "named, wrong", [("encoder", BOTH_SIDES), ("body", "lm_head.weight (1 in all) would be random"), ("decoder", None), ("model", None)]
)
def test_what_was_not_trained_to_predict_the_next_token_is_refused(command, named, wrong, instructions, request, capsys):
    name = request.getfixturevalue(named)
    data = ["--prompt", "the sun", "--max_new_tokens", "2"] if command == "generate" else ["--dataset", str(instructions)]
    run = arguments(None, name, instructions) if command == "train" else ["--model", str(name), *data]
    assert main([command, *run]) == (2 if wrong else 0)
    if wrong:
        assert f"model_name_or_path: {str(name)!r} " in (shown := capsys.readouterr().err) and wrong in shown
