"""Every kind of rows, known by its columns: chats, completions, instructions, text, classes; what is learned, packed, dropped and shown."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.cli.arguments import DataArguments
from hf_memtune.cli.data import IGNORED, collator, load_rows, making, mapping, prepare
from hf_memtune.cli.data.showing import table_of
from hf_memtune.errors import ConfigError
from tests.support.folders import tokenizer, write_rows
from tests.support.tolerances import tolerance

ASK, ANSWER = {"role": "user", "content": "name colours"}, {"role": "assistant", "content": "red green"}
MORE, LAST = {"role": "user", "content": "add one"}, {"role": "assistant", "content": "blue"}
SYSTEM = {"role": "system", "content": "write a poem"}
TALK = [SYSTEM, ASK, ANSWER, MORE, LAST]
SHAREGPT = [{"from": "system", "value": "write a poem"}, {"from": "human", "value": "name colours"}, {"from": "gpt", "value": "red green"}]
MARKED = (
    "{% for m in messages %}<bos> {{ m['role'] }} {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <eos>{% endgeneration %} "
    "{% else %}{{ m['content'] }} <eos> {% endif %}{% endfor %}{% if add_generation_prompt %}<bos> assistant {% endif %}"
)
FORGETFUL = (  # what the assistant said is left out once more follows, as templates do with thoughts
    "{% for m in messages %}<bos> {{ m['role'] }} {% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)


def prepared(tmp_path, rows, words=None, **settings):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return prepare(DataArguments(dataset_name=str(file), eval_fraction=0, **settings), words or tokenizer(chat=True))


def learned(rows, words, number=0):
    return words.decode([label for label in rows.train[number]["labels"] if label != IGNORED])


KINDS = {
    "messages": ({"messages": TALK}, "red green <eos> blue <eos>"),
    "conversations": ({"conversations": SHAREGPT}, "red green <eos>"),
    "conversations as messages": ({"conversations": [ASK, ANSWER]}, "red green <eos>"),
    "prompt and completion": ({"prompt": "name colours", "completion": "red green"}, "red green <eos>"),
    "prompt and completion of messages": ({"prompt": [ASK, ANSWER, MORE], "completion": [LAST]}, "blue <eos>"),
    "instruction": ({"instruction": "name colours", "output": "red green"}, "red green <eos>"),
    "text": ({"text": "red green"}, "red green <eos>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_known_by_their_columns(kind, tmp_path):
    row, expected = KINDS[kind]
    words = tokenizer(chat=True)
    rows = prepared(tmp_path, [row] * 3, words)
    assert learned(rows, words) == expected and rows.data.task == "causal_lm"
    assert len(rows.train[0]["input_ids"]) == len(rows.train[0]["labels"]) > 0
    if kind != "text":
        every = prepared(tmp_path, [row] * 3, words, assistant_only_loss=False)
        assert every.train[0]["labels"] == every.train[0]["input_ids"] and every.train[0]["input_ids"] == rows.train[0]["input_ids"]


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path):
    words = tokenizer(chat=True)
    row = prepared(tmp_path, [{"messages": TALK}], words).train[0]
    said = "<bos> system write a poem <eos> <bos> user name colours <eos> <bos> assistant red green <eos> <bos> user add one <eos> "
    assert words.decode(row["input_ids"]) == words.decode(words(said + "<bos> assistant blue <eos>")["input_ids"])
    kept = [number for number, label in enumerate(row["labels"]) if label != IGNORED]
    assert words.decode([row["input_ids"][number - 1] for number in (kept[0], kept[3])]) == "assistant assistant"


def test_marks_of_a_template_say_the_same(tmp_path):
    marked, plain = tokenizer(chat=True), tokenizer(chat=True)
    marked.chat_template = MARKED
    found, expected = (prepared(tmp_path, [{"messages": TALK}], words).train[0] for words in (marked, plain))
    assert found["input_ids"] == expected["input_ids"] and found["labels"] == expected["labels"]


@pytest.mark.parametrize("old, new", [("{% generation %}", "{% generation %} "), ("<eos>{% endg", "<eos> {% endg")], ids=["begins", "ends"])
def test_a_mark_may_stand_at_white_space_that_the_tokenizer_drops(old, new, tmp_path):
    """transformers finds no token there: it marks nothing from there on, or all tokens that follow."""
    words, plain = tokenizer(chat=True), tokenizer(chat=True)
    words.chat_template = MARKED.replace(old, new)
    found, expected = (prepared(tmp_path, [{"messages": TALK}], each).train[0] for each in (words, plain))
    assert found["input_ids"] == expected["input_ids"] and found["labels"] == expected["labels"]
    masks = words.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert masks != [int(label != IGNORED) for label in expected["labels"]]


def test_marks_in_a_prompt_carry_no_label(tmp_path):
    """The completion alone is learned; of the same messages without a prompt, every answer is."""
    words = tokenizer(chat=True)
    words.chat_template = MARKED
    row = {"prompt": [ASK, ANSWER, MORE], "completion": [LAST]}
    assert learned(prepared(tmp_path, [row] * 2, words), words) == "blue <eos>"
    assert learned(prepared(tmp_path, [{"messages": [ASK, ANSWER, MORE, LAST]}] * 2, words), words) == "red green <eos> blue <eos>"


def test_of_a_prompt_no_mark_carries_a_label_whatever_role_it_is_of(tmp_path):
    """A template may mark calls of tools, too; of the same messages without a prompt they are learned."""
    words, called = tokenizer(chat=True), {"role": "tool", "content": "three numbers"}
    words.chat_template = MARKED.replace("m['role'] == 'assistant'", "m['role'] != 'user'")
    row = {"prompt": [ASK, ANSWER, called, MORE], "completion": [LAST]}
    assert learned(prepared(tmp_path, [row] * 2, words), words) == "blue <eos>"
    whole = prepared(tmp_path, [{"messages": [*row["prompt"], LAST]}] * 2, words)
    assert learned(whole, words) == "red green <eos> three numbers <eos> blue <eos>"


def test_earlier_turns_of_a_marked_prompt_may_be_rewritten(tmp_path):
    """Where the whole prompt is written as it is before the completion: nothing within it needs to be found."""
    words = tokenizer(chat=True)
    recent = "{{ m['content'] if loop.index0 >= loop.length - 3 else 'short' }} <eos>{% endg"
    words.chat_template = MARKED.replace("{{ m['content'] }} <eos>{% endg", recent)
    row = {"prompt": [ASK, ANSWER, MORE, LAST, ASK], "completion": [ANSWER]}
    assert learned(prepared(tmp_path, [row] * 2, words), words) == "red green <eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_helps(tmp_path):
    words = tokenizer(chat=True)
    words.chat_template = FORGETFUL
    with pytest.raises(
        ConfigError, match="row 0 of the rows to train on: the chat template writes message 3 in another way.*assistant_only_loss false"
    ):
        prepared(tmp_path, [{"messages": TALK}], words)
    assert prepared(tmp_path, [{"messages": TALK}], words, assistant_only_loss=False).train[0]["labels"]
    assert learned(prepared(tmp_path, [{"messages": [ASK, ANSWER]}], words), words) == "red green <eos>"


def test_all_bad_rows_are_told_at_once_with_how_each_begins(tmp_path):
    """Their numbers are those of a part of the file, in an order of its own, so they alone would not find the row."""
    odd = [{"messages": [{"content": "who?"}]}, {"messages": [{"role": "pope", "content": "cold"}, ANSWER]}]
    words = tokenizer(chat=True)
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'pope' %}{{ raise_exception('no popes') }}{% endif %}{{ m.content }} {% endfor %}"
    )
    with pytest.raises(ConfigError) as told:
        prepared(tmp_path, [{"messages": TALK}, odd[0], {"messages": TALK}, odd[1]], words, assistant_only_loss=False)
    first, second = told.value.problems
    assert "row 1 of the rows to train on, messages has a message without a role" in first and '{"messages": [{"content": "who?"' in first
    assert "row 3 of the rows to train on: the chat template refuses" in second and "no popes" in second and '"cold"' in second


def test_chats_need_a_template_which_may_be_named(tmp_path):
    with pytest.raises(ConfigError, match="no chat template.*--chat_template_path"):
        prepared(tmp_path, [{"messages": TALK}], tokenizer())
    (tmp_path / "chat.jinja").write_text(MARKED)
    words = tokenizer()
    rows = prepared(tmp_path, [{"messages": TALK}], words, chat_template_path=str(tmp_path / "chat.jinja"))
    assert learned(rows, words) == "red green <eos> blue <eos>"
    with pytest.raises(ConfigError, match="chat_template_path"):
        prepared(tmp_path, [{"messages": TALK}], words, chat_template_path=str(tmp_path / "absent"))


@pytest.mark.parametrize("template", [None, MARKED])
def test_an_answer_of_the_weight_0_carries_no_label(template, tmp_path):
    words = tokenizer(chat=True)
    words.chat_template = template or words.chat_template
    for weights, expected in (((0, 1), "blue <eos>"), ((1, 0), "red green <eos>"), ((1, 1), "red green <eos> blue <eos>")):
        talk = [ASK, ANSWER | {"weight": weights[0]}, MORE, LAST | {"weight": weights[1]}]
        shared = [{"from": turn["role"], "value": turn["content"], "weight": turn.get("weight", 1)} for turn in talk]
        for row in ({"messages": talk}, {"conversations": shared}):
            assert learned(prepared(tmp_path, [row] * 2, words), words) == expected
    with pytest.raises(ConfigError, match=r"dropped: 2 \(no answer of an assistant\)"):
        prepared(tmp_path, [{"messages": [ASK, ANSWER | {"weight": 0}]}] * 2, words)
    with pytest.raises(ConfigError, match="row 0 of the rows to train on, messages, message 2 has the weight 0.5, expected 1"):
        prepared(tmp_path, [{"messages": [ASK, ANSWER | {"weight": 0.5}]}] * 2, words)


@pytest.mark.parametrize("template", [None, MARKED])
def test_a_chat_may_begin_with_an_answer(template, tmp_path):
    words = tokenizer(chat=True)
    words.chat_template = template or words.chat_template
    rows = prepared(tmp_path, [{"messages": [ANSWER, MORE, LAST]}] * 2, words)
    assert learned(rows, words) == "red green <eos> blue <eos>" and words.decode(rows.train[0]["input_ids"]).startswith(
        "<bos> assistant red"
    )


@pytest.mark.parametrize("name", ["chatgpt", "ChatGPT", "gpt", "GPT", "Assistant", "assistant", "bot"])
def test_roles_are_known_by_other_names(name, tmp_path):
    words = tokenizer(chat=True)
    expected = prepared(tmp_path, [{"messages": [ASK, ANSWER]}] * 2, words).train[0]
    shared = [{"from": "Human", "value": "name colours"}, {"from": name, "value": "red green"}]
    for row in ({"conversations": shared}, {"messages": [ASK | {"role": "Human"}, ANSWER | {"role": name}]}):
        if name == "bot":  # nobody's name for the assistant
            with pytest.raises(ConfigError, match="no answer of an assistant"):
                prepared(tmp_path, [row] * 2, words)
        else:
            assert prepared(tmp_path, [row] * 2, words).train[0] == expected


def test_parts_of_a_message_are_its_text(tmp_path):
    words = tokenizer(chat=True)
    text, more, image = {"type": "text", "text": "name "}, {"type": "text", "text": "colours"}, {"type": "image", "image": "sun.png"}
    rows = [
        {"messages": [ASK | {"content": parts}, ANSWER | {"content": [{"type": "text", "text": "red green"}]}]}
        for parts in ([text, more], [image])
    ]
    found = prepared(tmp_path, rows, words)
    assert found.train[0] == prepared(tmp_path, [{"messages": [ASK, ANSWER]}], words).train[0]
    assert len(found.train) == 1 and found.reasons == {"a message with parts that are no text": 1}


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_go_to_the_template(tmp_path, as_json):
    words = tokenizer(chat=True)
    words.chat_template = "{% if tools %}list {{ tools[0].name }} {% endif %}" + words.chat_template
    tools = [{"name": "add"}]
    row = prepared(tmp_path, [{"messages": TALK, "tools": json.dumps(tools) if as_json else tools}], words).train[0]
    assert words.decode(row["input_ids"]).startswith("list add")


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"messages": ["red"]}, "row 0 of the rows to train on, messages is no list of messages"),
        ({"messages": [{"content": "red"}]}, "without a role"),
        ({"messages": "red"}, "no JSON"),
        ({"colours": "red", "number": 1}, "have the columns colours, number, of which none is known"),
    ],
)
def test_rows_that_are_nothing_known(row, problem, tmp_path):
    with pytest.raises(ConfigError, match=problem):
        prepared(tmp_path, [row] * 2)


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path):
    rows = [
        {"instruction": "name colours", "output": "red"}, {"instruction": "name colours", "output": None},
        {"instruction": "name colours", "output": " "}, {"instruction": "name " * 40, "output": "red"},
    ]  # fmt: skip
    found = prepared(tmp_path, rows, max_length=16)
    assert len(found.train) == 1 and found.reasons == {"empty": 2, "nothing to learn within max_length": 1} and found.dropped == 3
    with pytest.raises(ConfigError, match=r"dropped: 2 \(empty\)"):
        prepared(tmp_path, rows[1:3])
    assert prepared(tmp_path, [{"messages": [ASK]}, {"messages": TALK}]).reasons == {"no answer of an assistant": 1}


def test_values_with_structure_are_json_text(tmp_path):
    words = tokenizer()
    rows = prepared(tmp_path, [{"instruction": "name", "output": {"name": "red", "list": ["blue", "sun"]}}], words)
    assert learned(rows, words) == words.decode(words('{"name": "red", "list": ["blue", "sun"]} <eos>')["input_ids"])


def test_classes_are_known_by_text_and_label(tmp_path):
    rows = [{"text": "a good film", "label": "glad"}, {"text": "a bad film", "label": "sad"}, {"text": "", "label": "sad"}]
    found = prepared(tmp_path, rows)
    assert found.data.task == "sequence_classification" and found.classes == ["glad", "sad"] and found.reasons == {"empty": 1}
    assert prepared(tmp_path, rows[:2], task="causal_lm").classes is None
    assert prepared(tmp_path, rows[:2], text_column="text").classes is None


@pytest.mark.parametrize("settings", [{"packing": True}, {"assistant_only_loss": False}])
def test_what_has_no_effect_on_the_rows_that_there_are_is_refused(settings, tmp_path):
    """Which kind they are shows in their columns."""
    rows = [{"text": "a good film", "label": "glad"}, {"text": "a bad film", "label": "sad"}]
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} has no effect with task=sequence_classification"):
        prepared(tmp_path, rows, **settings)
    prepared(tmp_path, rows)


@pytest.mark.parametrize("name", ["rows[1].jsonl", "ROWS.JSONL", "rows *.jsonl"])
def test_names_of_files_are_taken_as_they_are(name, tmp_path):
    file = write_rows(tmp_path / name, [{"text": "red green"}])
    write_rows(tmp_path / "rows1.jsonl", [{"text": "another"}])
    assert load_rows(DataArguments(dataset_name=str(file)), "train")["text"] == ["red green"]


def test_lines_of_a_text_file_are_rows(tmp_path):
    (tmp_path / "lines.txt").write_text("red green\nblue sun\n")
    assert load_rows(DataArguments(dataset_name=str(tmp_path / "lines.txt")), "train")["text"] == ["red green", "blue sun"]


@pytest.mark.parametrize("name, problem", [("empty.jsonl", "is empty"), ("folder", "is empty"), ("./no-such-folder", "does not exist")])
def test_data_that_is_not_there(name, problem, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=problem):
        load_rows(DataArguments(dataset_name=name if name.startswith(".") else str(tmp_path / name)), "train")


# -- rows that are kept on disk ----------------------------------------------------------------------------------------


def made_by(code, prompt, file, monkeypatch):
    """Tokenised rows where the files of the package have this digest, and prompts are written like this."""
    monkeypatch.setattr(mapping, "code_digest", lambda: code)
    monkeypatch.setattr(making, "PLAIN_PROMPT", prompt)
    return prepare(DataArguments(dataset_name=str(file), eval_fraction=0), tokenizer()).train


def test_rows_that_other_code_made_are_not_taken(tmp_path, monkeypatch):
    """They are kept under the digest of the code: the same digest gives the same rows again, another one makes them anew."""
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "name", "output": "red"}] * 2)
    cases = (("1", "{request} a"), ("1", "{request} sun"), ("2", "{request} sun"))
    first, again, other = (made_by(*case, file, monkeypatch) for case in cases)
    assert again["input_ids"] == first["input_ids"] and again._fingerprint == first._fingerprint
    assert other["input_ids"] != first["input_ids"] and other._fingerprint != first._fingerprint


def test_the_digest_is_of_the_files_that_make_rows(tmp_path, monkeypatch):
    source, folder = Path(mapping.__file__).parent, tmp_path / "data"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("qa_data.py", "glue_data.py"):
        shutil.copy(source.parent / name, tmp_path)
    here = mapping.code_digest()
    monkeypatch.setattr(mapping, "__file__", str(folder / "mapping.py"))
    assert mapping.code_digest() == here
    for changed in (folder / "chats.py", tmp_path / "qa_data.py", tmp_path / "glue_data.py"):
        before = mapping.code_digest()
        changed.write_text(changed.read_text() + "\n")
        assert mapping.code_digest() != before


# -- packing -----------------------------------------------------------------------------------------------------------


def gradients(model, batches):
    """Of the sum over labelled tokens."""
    model.zero_grad()
    for batch in batches:
        labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("streams", [False, True])
def test_packed_rows_never_see_each_other(tmp_path, model, streams):
    """Gradients of packed rows are the sum of those of the rows by themselves."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("trl")
    texts = ["red green blue", "name three colours of the sun", "a poem about the sea", "one two"]
    words, rows = tokenizer(), [{"text": text} for text in texts]
    alone, together = (prepared(tmp_path, rows, words, packing=packing, max_length=24) for packing in (False, True))
    assert len(together.train) < len(alone.train) == 4 and sum(map(len, together.train["input_ids"])) == sum(
        map(len, alone.train["input_ids"])
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).train()
    expected = gradients(loaded, [collator(alone.data, words)([row]) for row in alone.train])
    batch = collator(together.data, words)(list(together.train))
    if streams:
        with Streaming(loaded, StreamingConfig(sequence_chunk_size=5)):
            found = gradients(loaded, [batch])
    else:
        found = gradients(loaded, [batch])
    size = max(float(gradient.abs().max()) for gradient in expected.values())
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) <= tolerance(torch.float32) * size
    seen = gradients(loaded, [{"input_ids": batch["input_ids"], "labels": batch["labels"]}])
    assert max(float((seen[name] - expected[name]).abs().max()) for name in expected) > 1e-3 * size


# -- a look at the rows ------------------------------------------------------------------------------------------------


def test_rows_are_shown_as_they_are_learned(tmp_path):
    words = tokenizer(chat=True)
    rows = prepared(tmp_path, [{"messages": TALK}] * 3, words)
    console = Console(width=200, record=True, file=(tmp_path / "shown.txt").open("w"))
    console.print(table_of(rows, words, 2))
    said = console.export_text()
    assert said.count("«red green <eos>»") == 2 and "«blue <eos>»" in said and "«name colours" not in said
