"""Conversations as tokens: those of apply_chat_template, whatever the tokenizer makes of spaces, with labels on the answers alone."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_memtune.cli import generate
from hf_memtune.cli.arguments import DataSource
from hf_memtune.cli.data import IGNORED, instruction_row
from hf_memtune.cli.data.chats import Chat, _in_pieces, chat_tokens
from tests.support.folders import CHAT, tokenizer

TALK = [
    {"role": "user", "content": "name three colours"}, {"role": "assistant", "content": "red green"},
    {"role": "user", "content": "one more"}, {"role": "assistant", "content": "blue é"},
]  # fmt: skip
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "a space is the answer's": BRACKETS,
    "a space is the prompt's": BRACKETS.replace("[/INST]", "[/INST] ").replace("%} {{ m", "%}{{ m"),
    "no space": BRACKETS.replace("%} {{ m", "%}{{ m"),
    "lines": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}  # fmt: skip
MARKED = (
    "{% for m in messages %}<bos> {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos> {% endgeneration %}"
    "{% else %}{{ m['content'] }} <eos> {% endif %}{% endfor %}"
)
SAID = [
    "[INST] name three colours [/INST] red green [INST] one more [/INST] blue é", "<|user|>", "<|assistant|>", "\n", "one more [/INST].", "a A",
]  # fmt: skip


def words_of(kind: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of parts of words: of Llama's kind, which puts a space before a text, or of bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "metaspace":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
        letters = []
    else:
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(SAID * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters))
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    words.chat_template = TEMPLATES[template]
    return words


def cut(words):
    """The tokens of the text cut where answers begin and end."""
    text, spans, at = words.apply_chat_template(TALK, tokenize=False), [], 0
    for said in ("red green</s>", "blue é</s>"):
        start = text.index(said, at)
        at = start + len(said)
        spans.append((start, at))
    return _in_pieces(text, spans, words)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_tokens_are_those_of_the_template(kind, template):
    words = words_of(kind, template)
    ids, learned = chat_tokens(Chat(TALK), words, True, "row 0")
    expected = words.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert ids == expected and chat_tokens(Chat(TALK), words, False, "row 0") == (ids, [True] * len(ids))
    assert (cut(words)[0] != expected) is (kind == "metaspace" or "space is" in template)
    said = words.decode([token for token, is_learned in zip(ids, learned) if is_learned])
    assert "".join(said.split()) == "redgreen</s>blueé</s>"


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_a_token_that_goes_into_a_mark_is_learned_as_transformers_has_it(kind):
    """ "]." is one token, of which the answer is the second part."""
    words = words_of(kind, "no space")
    words.chat_template = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    talk = [{"role": "user", "content": "one more"}, {"role": "assistant", "content": ". a"}]
    ids, learned = chat_tokens(Chat(talk), words, True, "row 0")
    expected = words.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert ids == expected["input_ids"] and learned == [bool(mark) for mark in expected["assistant_masks"]]
    assert words.decode([ids[learned.index(True)]]).strip() != "."


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_a_question_is_put_as_in_training(kind, template):
    """Also where the answer that stands in for the real one is one token with what is before it: "[/INST]." is one here."""
    words = words_of(kind, template)
    row = instruction_row({"instruction": "one more", "output": "red green"}, DataSource(), words)
    start = next(number for number, label in enumerate(row["labels"]) if label != IGNORED)
    assert generate._tokens("one more", False, words) == row["input_ids"][:start]
    stop = instruction_row({"instruction": "one more", "output": "."}, DataSource(), words)
    if template == "no space":
        assert [label for label in stop["labels"] if label != IGNORED] == [words.eos_token_id]


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["turn by turn", "marked"])
def test_a_tokenizer_that_does_not_know_places_is_given_pieces(template):
    words = tokenizer(chat=True)
    words.chat_template = template
    expected = chat_tokens(Chat(TALK), words, True, "row 0")

    class Slow:
        is_fast = False
        chat_template, eos_token, apply_chat_template = words.chat_template, words.eos_token, words.apply_chat_template
        special_tokens_map = words.special_tokens_map

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            calls.append(text)
            return words(text, **options)

    calls: list[str] = []
    assert chat_tokens(Chat(TALK), Slow(), True, "row 0") == expected and len(calls) == 4
    assert chat_tokens(Chat(TALK[:2]), words, True, "row 0") != expected
