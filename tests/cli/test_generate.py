"""`hf-memtune generate`: what is answered, and with which adapters."""

import pytest

from hf_memtune.cli import generate, main
from hf_memtune.cli.arguments import DataSource
from hf_memtune.cli.data import instruction_row
from hf_memtune.errors import ConfigError
from tests.support.folders import tokenizer
from tests.support.train import REVERSIBLE, arguments

PROMPTS = ("--prompt", "name three colours", "write a poem", "--max_new_tokens", "12")


def answers(*flags):
    return list(generate.answers(*generate.parse([str(flag) for flag in flags])))


def test_reversible_adapters_answer_with_a_cache_as_without(model, instructions, capsys):
    far = ["--learning_rate", "0.1", "--output_dir", "trained"]
    assert main(["train", *arguments(None, model, instructions, *REVERSIBLE, *far)]) == 0
    common = ("--model", model, *PROMPTS)
    adapted = answers(*common, "--reversible_adapters", "trained")
    assert [prompt for prompt, _ in adapted] == ["name three colours", "write a poem"]
    assert answers(*common, "--reversible_adapters", "trained", "--use_cache", "false") == adapted
    assert answers(*common) != adapted
    capsys.readouterr()
    assert main(["generate", *map(str, common), "--reversible_adapters", "trained"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for pair in adapted for text in pair)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_is_put_as_in_training(chat):
    """The tokens before the answer, of a row with this instruction."""
    asked = tokenizer(chat)
    row = instruction_row({"instruction": "name the sun", "output": "red"}, DataSource(), asked)
    before = [token for token, label in zip(row["input_ids"], row["labels"]) if label == -100]
    assert generate._tokens("name the sun", False, asked) == before != generate._tokens("name the sun", True, asked)
    assert asked.decode(generate._tokens("name the sun", True, asked)) == "name the sun"


def test_sampling_is_seeded(model):
    drawn = [answers("--model", model, *PROMPTS, "--temperature", "2", "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "flags, named",
    [
        ([], {"prompt", "model_name_or_path"}),
        (["--model", "m", "--prompt", " "], {"prompt"}),
        (["--model", "m", "--prompt", "a", "--max_new_tokens", "0", "--temperature", "-1"], {"max_new_tokens", "temperature"}),
        (["--model", "m", "--prompt", "a", "--seed", "3"], {"seed"}),
        (["--model", "m", "--prompt", "a", "--reversible_adapters", "absent"], {"reversible_adapters"}),
    ],
)
def test_settings_that_cannot_work(flags, named):
    with pytest.raises(ConfigError) as raised:
        generate.parse(flags)
    assert {problem.partition(":")[0] for problem in raised.value.problems} == named


def test_what_ends_a_turn_of_a_template_ends_an_answer():
    """A base model that has learned it knows another end."""
    words = tokenizer(chat=True)
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    words.chat_template = words.chat_template.replace("<eos>", "<end>")
    end = words.convert_tokens_to_ids("<end>")
    assert generate.ends_of(words, 7) == sorted({7, words.eos_token_id, end})
    assert generate.ends_of(words, [7, 8], plain=True) == sorted({7, 8, words.eos_token_id})
    opened = words.chat_template.replace("{{ m['content'] }}", "<bos> {{ m['content'] }}")  # before what is said: ends nothing
    words.chat_template = opened
    assert words.bos_token_id not in generate.ends_of(words, 7) and end in generate.ends_of(words, 7)
    words.chat_template = None
    assert end not in generate.ends_of(words, None)
