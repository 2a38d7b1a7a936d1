"""Texts are learned letter by letter as the file has them, whatever else stands beside them; and what would be learned in their place is refused."""

import gzip
import json
import re
import shutil
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_memtune.cli import evaluate, train
from hf_memtune.cli.arguments import DataArguments, DataSource, ModelSource
from hf_memtune.cli.data import load_rows, prepare
from hf_memtune.cli.data.kinds import resolved
from hf_memtune.cli.data.making import as_text
from hf_memtune.cli.data.mixed import as_stored, written
from hf_memtune.cli.data.showing import show
from hf_memtune.cli.glue_data import _classes
from hf_memtune.errors import ConfigError
from tests.support.folders import tokenizer, write_rows

ANSWERS = ['{"a": 1}', '["a","b"]', "[1,2]", "42", "1.50", "null", "true", "plain", "-0"]
ASK, ANSWER = {"role": "user", "content": "name colours"}, {"role": "assistant", "content": "red green"}


def data_of(path, **settings):
    return DataArguments(dataset_name=str(path), **{"eval_fraction": 0} | settings)


def read(path):
    rows, mixed = as_stored(load_rows(DataSource(dataset_name=str(path)), "train"))
    return [written(row, mixed) for row in rows]


# -- mixed types -------------------------------------------------------------------------------------------------------


def test_answers_beside_lists_of_parts_are_what_was_written(tmp_path):
    parts = [{"type": "text", "text": "name colours"}]
    rows = [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]} for answer in ANSWERS]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"messages": [ASK, {"role": "assistant", "content": None}]}])
    turns = [row["messages"] for row in read(file)]
    assert [said["content"] for _, said in turns] == [*ANSWERS, None]
    assert [asked["content"] for asked, _ in turns] == [parts] * len(ANSWERS) + ["name colours"]
    by_itself = [row["messages"][1]["content"] for row in load_rows(DataSource(dataset_name=str(file)), "train")]
    assert by_itself != [*ANSWERS, None]  # what `datasets` makes of it
    assert len(prepare(data_of(file), tokenizer(chat=True)).train) == len(ANSWERS)  # and none of them is dropped


def test_a_column_of_texts_and_numbers_is_what_was_written(tmp_path):
    rows = [{"instruction": "name colours", "output": answer} for answer in (*ANSWERS, 3, {"k": [1]}, None)]
    file = write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "name colours", "output": {"città": None, "y": 2}}])
    objects = {'["a","b"]': ["a", "b"], "[1,2]": [1, 2]}  # JSON without a space is stored as the object is, and taken for it
    expected = [*(objects.get(answer, answer) for answer in ANSWERS), "3", {"k": [1]}, None, {"città": None, "y": 2}]
    assert [row["output"] for row in read(file)] == expected
    assert as_text(expected[-1]) == '{"y": 2}'


def test_a_turn_that_is_nothing_is_told(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "name colours"}]}
    with pytest.raises(ConfigError, match="row 0 of the rows to train on, messages is no list of messages"):
        prepare(data_of(write_rows(tmp_path / "rows.jsonl", [{"messages": [parts, ANSWER, None]}])), tokenizer(chat=True))


def test_labels_of_two_kinds_are_refused(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "sun", "label": label} for label in ("good", 1, "bad")])
    with pytest.raises(ConfigError, match="names and numbers beside one another"):
        prepare(data_of(file), tokenizer())


@pytest.mark.parametrize("swapped", ["prompt", "completion"])
def test_a_text_beside_messages_is_what_its_role_says(swapped, tmp_path):
    rows = {"prompt": [ASK], "completion": [ANSWER]}
    both = prepare(data_of(write_rows(tmp_path / "both.jsonl", [rows])), words := tokenizer(chat=True)).train[0]
    rows |= {swapped: rows[swapped][0]["content"]}
    one = prepare(data_of(write_rows(tmp_path / "one.jsonl", [rows])), words).train[0]
    assert one == both and words.decode([label for label in one["labels"] if label != -100]) == "red green <eos>"


# -- csv ---------------------------------------------------------------------------------------------------------------

CELLS = ["True", "False", "007", "3.50", "42", "None", "NA", "null", "nan"]


@pytest.mark.parametrize("gap", [False, True], ids=["full", "with an empty cell"])
@pytest.mark.parametrize("cells", [CELLS, ["True", "False"], ["007", "42"], ["3.50", "42"], ["NA", "None"]])
def test_cells_of_a_csv_file_are_what_was_written(cells, gap, tmp_path):
    given = [*cells, *[""] * gap]
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "".join(f"name colours,{cell}\n" for cell in given))
    assert [row["output"] for row in read(tmp_path / "rows.csv")] == [*cells, *[None] * gap]
    assert len(prepare(data_of(tmp_path / "rows.csv"), tokenizer()).train) == len(cells)


def test_a_folder_of_csv_files_is_read_as_one_is(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("instruction,output\nname colours,007\nname colours,NA\n")
    assert [row["output"] for row in read(tmp_path / "data")] == ["007", "NA"]


def test_a_text_that_stands_where_labels_would_is_a_text(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,label\nname colours,1.50\nname colours,42\n")
    settings = DataSource(dataset_name=str(tmp_path / "rows.csv"), output_column="label")
    assert list(load_rows(settings, "train")["label"]) == ["1.50", "42"]


@pytest.mark.parametrize(
    "cells, expected",
    [
        (["0", "1", "-1"], [0, 1, -1]),
        (["0.5", "2"], [0.5, 2.0]),
        (["007", "1"], ["007", "1"]),
        (["good", "1"], ["good", "1"]),
        (["1", ""], [1, None]),
    ],
)
def test_labels_of_a_csv_file_are_numbers_where_all_are(cells, expected, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"sun,{cell}\n" for cell in cells))
    found = load_rows(DataSource(dataset_name=str(tmp_path / "rows.csv")), "train")["label"]
    assert list(found) == expected and [type(value) for value in found] == [type(value) for value in expected]


# -- what is held out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train_on, held_out, both", [("train", "train[-4:]", 4), ("train[:12]", "train[10:]", 2), ("train[:-4]", "train[-4:]", 0)]
)
def test_rows_that_are_trained_on_are_not_held_out_without_a_word(instructions, train_on, held_out, both):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prepare(data_of(instructions, dataset_split=train_on, eval_split=held_out), tokenizer())
    told = [str(each.message) for each in told if "are trained on, too" in str(each.message)]
    assert [message.split()[1] for message in told] == ([str(both)] if both else [])


def test_whole_splits_and_limits_count(tmp_path, instructions):
    rows = Dataset.from_list([{"text": "name colours"}] * 6)
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "data")

    def told(**settings):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            prepare(data_of(**settings), tokenizer())
        return [message.split()[1] for each in found if "are trained on, too" in (message := str(each.message))]

    assert told(path=tmp_path / "data", eval_split="train") == ["6"] and not told(path=tmp_path / "data", eval_split="test")
    assert not told(path=instructions, eval_split="train[15:]", max_train_rows=10)
    assert told(path=instructions, eval_split="train[15:]", max_train_rows=18) == ["3"]


def labelled(names):
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_list([{"text": "good film", "label": 0}, {"text": "bad film", "label": 1}], features=features)


def test_names_of_classes_in_another_order_are_refused(tmp_path):
    for names, works in ((["bad", "good"], True), (["good", "bad"], False)):
        DatasetDict(train=labelled(["bad", "good"]), test=labelled(names)).save_to_disk(tmp_path / "data")
        settings = data_of(tmp_path / "data", eval_split="test", eval_fraction=0.05)
        if works:
            assert prepare(settings, tokenizer()).held_out["labels"] == [0, 1]
        else:
            pytest.raises(ConfigError, prepare, settings, tokenizer()).match("the same numbers are others")
        parts = {"train": labelled(["bad", "good"]), "validation": labelled(names)}
        glue = (DataSource(dataset_name="d", task="sequence_classification"), SimpleNamespace(labels=None), parts)
        assert _classes(*glue)[0] == ["bad", "good"] if works else pytest.raises(ConfigError, _classes, *glue).match("are others")


def test_numbers_and_names_of_them_are_the_same_classes(tmp_path):
    numbers = labelled(["bad", "good"]).cast_column("label", Value("int64"))
    DatasetDict(train=numbers, test=labelled(["bad", "good"])).save_to_disk(tmp_path / "data")
    assert prepare(data_of(tmp_path / "data", eval_split="test", eval_fraction=0.05), tokenizer()).held_out["labels"] == [0, 1]


def test_a_renamed_column_of_classes_is_one():
    data = DataSource(dataset_name="d", text_column="sentence", label_column="stars")
    assert resolved(data, ["sentence", "stars"]).task == "sequence_classification"
    assert resolved(DataSource(dataset_name="d", text_column="sentence"), ["sentence", "label"]).task == "causal_lm"


def test_a_row_without_a_class_is_refused(tmp_path):
    rows = labelled(["bad", "good"]).map(lambda row: {"label": -1}, features=labelled(["bad", "good"]).features)
    DatasetDict(train=rows, test=labelled(["bad", "good"])).save_to_disk(tmp_path / "data")
    for parts, problem in ((("train", None), "got the value -1"), (("test", "train"), "held-out rows have -1")):
        with pytest.raises(ConfigError, match=problem):
            prepare(data_of(tmp_path / "data", dataset_split=parts[0], eval_split=parts[1]), tokenizer())


def test_a_thousand_rows_that_are_dropped_come_before_one_that_is_not(tmp_path):
    rows = [{"instruction": "name colours", "output": ""}] * 1000 + [{"instruction": "name colours", "output": "red"}]
    found = prepare(data_of(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer())
    assert len(found.train) == 1 and found.dropped == 1000


# -- flags, recipes, models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, problem",
    [({"input_column": "contxt"}, "input_column: the data has no column 'contxt'"), ({"dataset_config": "de"}, "dataset_config: got 'de'")],
)
def test_columns_and_configs_that_are_not_there(settings, problem, instructions):
    with pytest.raises(ConfigError, match=problem):
        prepare(data_of(instructions, **settings), tokenizer())


def test_bad_completions_are_not_learned(tmp_path):
    rows = [{"prompt": "name colours", "completion": text, "label": text == "red"} for text in ("red", "sun")]
    with pytest.raises(ConfigError, match="a label of true or false, as for KTO"):
        prepare(data_of(write_rows(tmp_path / "kto.jsonl", rows)), tokenizer())
    (tmp_path / "kto.csv").write_text("prompt,completion,label\nname colours,red,True\nname colours,sun,False\n")
    with pytest.raises(ConfigError, match="a label of true or false, as for KTO"):
        prepare(data_of(tmp_path / "kto.csv"), tokenizer())
    good = [{name: row[name] for name in ("prompt", "completion")} for row in rows if row["label"]]
    assert len(prepare(data_of(write_rows(tmp_path / "good.jsonl", good)), tokenizer()).train) == 1


def test_idle_lines_of_a_recipe_are_warned_of_once_and_end_no_run(instructions):
    assert len(prepare(data_of(instructions, eval_split="train[:4]", eval_fraction=0.1), tokenizer()).train) == 24
    assert resolved(data_of(instructions, max_eval_rows=3), ["instruction", "input", "output"]).task == "causal_lm"


def test_a_tokenizer_without_a_template_gives_none(model, instructions):
    with pytest.raises(ConfigError, match="chat_template_path: the tokenizer of .* has no chat template"):
        prepare(data_of(instructions, chat_template_path=str(model)), tokenizer(chat=True))


def test_a_misspelt_column_of_classes_measures_no_text(encoder, reviews, model, tmp_path):
    classifier = tmp_path / "classifier"
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(classifier)
    AutoTokenizer.from_pretrained(model).save_pretrained(classifier)
    flags = ["--model", str(classifier), "--dataset", str(reviews), "--max_length", "64"]
    with pytest.raises(ConfigError, match="label_column has no effect"):
        evaluate.measured(evaluate.parse([*flags, "--label_column", "star"]))
    with pytest.raises(ConfigError, match="tells 2 classes apart, and the rows are text without any"):
        evaluate.measured(evaluate.parse([*flags, "--task", "causal_lm"]))
    assert evaluate.measured(evaluate.parse(flags))["rows"] == 40


def test_a_misspelt_target_of_lora_is_refused_beside_right_ones(model, instructions):
    from tests.support.train import arguments

    settings = train.parse(arguments(None, model, instructions, "--lora_r", "2", "--lora_target_modules", "q_proj", "v_prj"))
    with pytest.raises(ConfigError, match="lora_target_modules: LlamaForCausalLM has no module named v_prj"):
        train.make_trainer(settings)


def test_a_classifier_pads_as_its_tokenizer_does(model, reviews, tmp_path):
    """Its head looks for the last token that is no padding: another one would have it look at padding."""
    from hf_memtune.cli import main
    from hf_memtune.cli.model import load_model, load_tokenizer
    from tests.support.train import arguments

    config = json.loads((model / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    source = ModelSource(model_name_or_path=str(other))
    words = load_tokenizer(source)
    data = DataSource(dataset_name="d", task="sequence_classification", max_length=64)
    assert load_model(source, data, words, ["bad", "good"]).config.pad_token_id == words.pad_token_id != 5
    assert main(["train", *arguments(None, other, reviews, "--lora_r", "2", "--max_length", "64")]) == 0
    assert main(["merge", "--model", "out", "--output_dir", "merged"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["pad_token_id"] == words.pad_token_id


def test_a_run_that_has_had_its_epochs_is_not_resumed(model, instructions, tmp_path, capsys):
    from hf_memtune.cli import main
    from tests.support.train import SHORT, arguments

    epochs = ["--max_steps", "-1", "--num_train_epochs", "1", "--save_strategy", "epoch"]
    run = arguments(None, model, instructions, *epochs)
    assert main(["train", *run]) == 0 and SHORT
    before = (tmp_path / "out" / "summary.json").read_bytes()
    assert main(["train", *run, "--resume_from_checkpoint"]) == 2
    assert "is of epoch 1, and num_train_epochs is 1, so nothing is left to train" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_accuracy_of_a_model_that_returns_more_than_logits():
    logits = numpy.array([[0.0, 1.0], [1.0, 0.0]])
    for predictions in (logits, (logits, numpy.zeros(3))):
        found = train.accuracy(SimpleNamespace(predictions=predictions, label_ids=numpy.array([1, 1])))
        assert found == {"accuracy": 0.5}


@pytest.mark.parametrize(
    "changed, told",
    [([], []), (["--max_train_rows", "4"], ["rows to train on"]), (["--eval_fraction", "0.5"], ["rows to train on", "held-out rows"])],
)
def test_a_run_that_goes_on_with_other_rows_says_so(changed, told, model, instructions):
    from hf_memtune.cli import main
    from tests.support.train import arguments

    run = arguments(None, model, instructions, "--save_strategy", "steps", "--save_steps", "1", "--lora_r", "2")
    assert main(["train", *run]) == 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert main(["train", *run, "--resume_from_checkpoint", "out/checkpoint-1", *changed]) == 0
    said = [str(each.message) for each in said if "are others than those that this run began with" in str(each.message)]
    assert len(said) == len(told) and all(words in message for words, message in zip(told, said))


def test_a_run_that_goes_on_elsewhere_knows_its_rows_there(tmp_path):
    from hf_memtune.cli.same_rows import ROWS, note_rows

    def trainer(rows, folder):
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        args = SimpleNamespace(output_dir=str(tmp_path / folder))
        return SimpleNamespace(is_world_process_zero=lambda: True, train_dataset=data, eval_dataset=None, args=args)

    rows, others = [[1, 2], [3]], [[1, 2], [4]]
    note_rows(trainer(rows, "first"), None)
    note_rows(trainer(rows, "second"), str(tmp_path / "first" / "checkpoint-1"))
    assert (tmp_path / "second" / ROWS).read_text() == (tmp_path / "first" / ROWS).read_text()
    with pytest.warns(UserWarning, match="the rows to train on .* are others"):
        note_rows(trainer(others, "second"), True)


def test_adapters_that_go_on_beside_other_weights_say_so(model, instructions, tmp_path):
    """Also where the folder is the same and one tensor was changed in it; not where the same weights are loaded in another dtype."""
    from transformers import AutoModelForCausalLM

    from hf_memtune.cli import main
    from tests.support.train import arguments

    base = tmp_path / "base"
    shutil.copytree(model, base)
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--lora_r", "2"]

    def said(*more):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert main(["train", *arguments(None, base, instructions, *flags, *more)]) == 0
        return sum("were trained beside the weights of" in str(each.message) for each in found)

    assert said() == 0 and said("--resume_from_checkpoint", "out/checkpoint-1") == 0
    assert said("--resume_from_checkpoint", "out/checkpoint-1", "--seed", "5") == 0
    assert said("--resume_from_checkpoint", "out/checkpoint-1", "--dtype", "bfloat16") == 0
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.model.layers[1].mlp.up_proj.weight.data += 0.01
    changed.save_pretrained(base)
    assert said("--resume_from_checkpoint", "out/checkpoint-1") == 1
    assert said("--resume_from_checkpoint", "--max_steps", "3") == 0  # the newest: that run went on from what the others had left


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint8"])
def test_weights_of_any_dtype_are_known_by_what_they_are(dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_memtune.cli.same_base import known_base

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
    weight, expected = model.model.layers[0].mlp.up_proj.weight, known_base(model)
    assert expected["formats"] == ["bfloat16"] and known_base(model) == expected
    weight.data = (weight.data * 100).to(getattr(torch, dtype))
    before = known_base(model)
    assert before["formats"] == sorted({"bfloat16"} | ({f"{dtype} of cpu"} if dtype != "bfloat16" else set()))
    weight.data[::3] += 1
    assert known_base(model)["digest"] != before["digest"] != expected["digest"]
    weight.requires_grad_(dtype != "uint8")
    assert dtype == "uint8" or known_base(model)["formats"] == ["bfloat16"]


@pytest.mark.parametrize(
    "step, epoch, most, wanted, is_over",
    [
        (3, 1.0, 3, 1, True),
        (4, 1.4, 5, 1.35, False),
        (5, 1.6, 5, 1.35, True),
        (6, 2.0, 9, 1, True),
        (3, 1.0, 3, 2, False),
        (2, 0.7, 3, 1, False),
    ],
)
def test_what_is_left_of_epochs(step, epoch, most, wanted, is_over, tmp_path):
    """Steps of an epoch that ends in the middle of an accumulated batch are left; fewer epochs than were done are not."""
    from hf_memtune.cli.checks import _problems_of_steps

    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": epoch, "max_steps": most}))
    found = _problems_of_steps(tmp_path, SimpleNamespace(max_steps=-1, num_train_epochs=wanted))
    assert bool(found) is is_over


# -- dates, and files that would be read as others ---------------------------------------------------------------------


def test_texts_that_look_like_dates_are_what_was_written(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a day", "completion": day} for day in ("2024-03-05", "2024-03-06 00:00:00")])
    assert [row["completion"] for row in read(file)] == ["2024-03-05", "2024-03-06 00:00:00"]
    turns = [{"role": "user", "content": "2024-03-05"}, {"role": "assistant", "content": "2024-03-06"}]
    assert read(write_rows(tmp_path / "chats.jsonl", [{"messages": turns}])) == [{"messages": turns}]


def test_what_is_no_text_is_refused(tmp_path):
    from decimal import Decimal

    Dataset.from_dict({"text": [Decimal("1.50")]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="a text is a Decimal"):
        prepare(data_of(tmp_path / "rows.parquet"), tokenizer())


def test_csv_files_whose_columns_would_be_mistaken_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output\nname,red,green\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="more cells than its first line has names"):
        prepare(data_of(tmp_path / "rows.csv"), tokenizer())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.csv").write_text("instruction,output\nname,red\n", encoding="utf-8")
    (folder / "b.csv").write_text("instruction,output,input\nname,red,green\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected the same of every file"):
        prepare(data_of(folder), tokenizer())


def test_a_folder_whose_name_stands_for_others_is_refused(tmp_path):
    for name in ("d0", "d[0]"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", [{"text": name}])
    with pytest.raises(ConfigError, match="Rename it"):
        prepare(data_of(tmp_path / "d[0]"), tokenizer())
    assert len(prepare(data_of(tmp_path / "d[0]" / "rows.jsonl"), tokenizer()).train) == 1


@pytest.mark.parametrize(
    "names, left",
    [
        (["a.jsonl", "b.csv"], "b.csv is not read; a.jsonl is"),
        (["z.jsonl", "notes.txt", "more.txt"], "z.jsonl is not read; more.txt, notes.txt are"),
        (["train.jsonl", "more.jsonl", "validation.jsonl"], "more.jsonl is not read; train.jsonl, validation.jsonl are"),
        (["train.jsonl", "test.jsonl", "README.txt", ".cache/old.jsonl"], None),
        (["a.jsonl", "b.jsonl.gz", "sub/c.jsonl"], None),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_named(names, left, tmp_path):
    for name in names:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "text\nsun\n" if name.endswith("csv") else json.dumps({"text": "sun"}) + "\n"
        file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_rows(DataSource(dataset_name=str(tmp_path / "data")), "train")
    told = [str(each.message) for each in told if "not read" in str(each.message)]
    assert len(told) == (left is not None) and all(left in message for message in told)


TURNS = [{"from": "human", "value": "name colours"}, {"from": "gpt", "value": "red green"}]
REQUEST = {"instruction": "name colours", "output": "red"}


@pytest.mark.parametrize(
    "row, names, lost",
    [
        (
            {"conversations": TURNS, "system": "be brief", "id": "3"},
            ["system", "id"],
            "columns not read: system, id. Answers may depend on system.",
        ),
        (REQUEST | {"history": [["a", "b"]], "score": 1}, ["history", "score"], "columns not read: history, score."),
        (REQUEST | {"input": "the sun", "id": "3"}, ["id"], None),
        (REQUEST | {"system": "", "history": []}, ["system", "history"], None),
        ({"prompt": "name colours", "completion": "red", "tools": "[]"}, ["tools"], "columns not read: tools."),
        ({"prompt": [ASK], "completion": [ANSWER], "tools": "[]"}, [], None),
        ({"messages": [ASK, ANSWER], "tools": "[]", "source": "x"}, ["source"], None),
        ({"text": "name colours", "context": "x"}, ["context"], None),
    ],
)
def test_columns_that_are_not_read_are_named(row, names, lost, tmp_path, capsys):
    rows = prepare(data_of(write_rows(tmp_path / "rows.jsonl", [row] * 2)), words := tokenizer(chat=True))
    found, warning = rows.unread
    assert sorted(found) == sorted(names) and ((warning is None) if lost is None else (lost in warning))
    with nullcontext() if lost is None else pytest.warns(UserWarning, match="Answers may depend on"):
        show(rows, words, 0)
    assert ("columns not read" in capsys.readouterr().err) == (bool(names) and lost is None)


@pytest.mark.parametrize("command", ["train", "evaluate", "tokens"])
def test_a_command_warns_of_a_column_that_answers_depend_on(command, model, tmp_path, capsys):
    """And says how many rows it leaves out."""
    from hf_memtune.cli import main
    from tests.support.train import arguments

    rows = write_rows(tmp_path / "rows.jsonl", [REQUEST | {"system": "be brief"}, REQUEST | {"output": " "}] * 12)
    flags = arguments(None, model, rows) if command == "train" else ["--model", str(model), "--dataset", str(rows)]
    flags += ["--out", str(tmp_path / "page.html")] if command == "tokens" else []
    with pytest.warns(UserWarning, match="Answers may depend on system"):
        assert main([command, *flags]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert command == "tokens" or re.search(r"dropped \d+ rows: \d+ empty", said)  # it shows one row, which is not


@pytest.mark.parametrize("name", ["rows.txt", "rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_the_mark_at_the_beginning_of_a_file_is_no_text(name, in_folder, tmp_path):
    (tmp_path / "data").mkdir()
    lines = {"rows.txt": "sun\nsea\n", "rows.csv": "text\nsun\nsea\n", "rows.jsonl": '{"text": "sun"}\n{"text": "sea"}\n'}
    (tmp_path / "data" / name).write_text(lines[name], encoding="utf-8-sig")
    assert read(tmp_path / "data" / ("" if in_folder else name)) == [{"text": "sun"}, {"text": "sea"}]


@pytest.mark.parametrize("where", ["data", "data/rows.csv.gz"])
def test_a_compressed_csv_file_is_read_as_one_is(where, tmp_path):
    (tmp_path / "data").mkdir()
    with gzip.open(tmp_path / "data" / "rows.csv.gz", "wt") as file:
        file.write("instruction,output\nname colours,007\nname colours,NA\n")
    (tmp_path / "data" / "README.txt").write_text("how they were made\n")  # it made the folder one of several kinds
    assert [row["output"] for row in read(tmp_path / where)] == ["007", "NA"]


def test_a_column_that_is_named_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output,output\nname colours,red,green\n")
    with pytest.raises(ConfigError, match="names output twice"):
        prepare(data_of(tmp_path / "rows.csv"), tokenizer())


def test_cells_between_tabs_in_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.tsv").write_text("instruction\toutput\nname, colours\tNA\n")
    assert read(tmp_path / "data") == [{"instruction": "name, colours", "output": "NA"}]
