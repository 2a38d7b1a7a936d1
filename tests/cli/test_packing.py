"""`hf-memtune train --packing`: with token seeking whose gradient streams a step is that of the kept tokens, each row by itself; and models that do
not keep packed rows apart are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_memtune.cli import main, train
from hf_memtune.cli.data import collator
from tests.support.any_type import tiny
from tests.support.folders import WORDS, tokenizer, write_rows
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, shifted, worst_difference

ROWS, MAX_LENGTH = (14, 9, 11, 6, 5, 8), 24  # rows of so many words and an end; several of them in one of max_length
# one step of gradient descent at a rate of 1 on all rows at once: what a weight changes by is its gradient
STEP = (
    "--max_steps 1 --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --optim sgd --learning_rate 1 --max_grad_norm 0 "
    "--lr_scheduler_type constant --warmup_steps 0 --use_cpu --eval_fraction 0 --disable_tqdm true --save_strategy no "
    "--train_sampling_strategy sequential"
).split()
SEEKING = "--token_seeking --token_ratio 0.4 --token_selection top --token_gradient stream --sequence_chunk_size 7".split()


@pytest.fixture
def arguments(model, tmp_path):
    pytest.importorskip("trl")
    texts = [" ".join(WORDS[(3 * row + n) % 20] for n in range(count)) for row, count in enumerate(ROWS)]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    return ["--model", str(model), "--dataset", str(file), "--packing", "true", "--max_length", str(MAX_LENGTH), *STEP, *SEEKING]


def rows_apart(batch, kept):
    """The parts of a packed row, each as a batch of its own: ids, labels and which tokens are kept."""
    begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    sizes = [end - begin for begin, end in zip(begins, [*begins[1:], batch["input_ids"].shape[1]])]
    yield from zip(*(tensor.split(sizes, dim=1) for tensor in (batch["input_ids"], batch["labels"], kept)))


def expected_gradients(model, parts, count):
    """Of the mean over the kept tokens, of plain training on the rows as they are given."""
    loss = 0
    for ids, labels, kept in parts:
        target = shifted(labels).masked_fill(~kept, -100)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum") / count
    return gradients(model, loss)


def test_a_step_is_that_of_the_kept_tokens_of_rows_apart(arguments, model):
    settings = train.parse(arguments)
    trainer, rows = train.make_trainer(settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    train.fit(trainer, settings)
    found = {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}
    batch = collator(rows.data, tokenizer())(list(rows.train))
    kept = trainer.last_selection.kept_mask()
    assert kept.shape == batch["input_ids"].shape == (1, sum(ROWS) + len(ROWS)) and 0.3 < kept.float().mean() < 0.5
    parts = list(rows_apart(batch, kept))
    assert sorted(ids.shape[1] for ids, *_ in parts) == sorted(count + 1 for count in ROWS)
    count = sum(int(((shifted(labels) != -100) & kept).sum()) for _, labels, kept in parts)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    assert worst_difference(found, expected_gradients(plain, parts, count)) <= 10 * tolerance(torch.float32)
    together = [(batch["input_ids"], batch["labels"], kept)]
    assert worst_difference(found, expected_gradients(plain, together, count)) > NOTICED  # rows that see each other
    every = [(ids, labels, torch.ones_like(kept)) for ids, labels, kept in parts]
    assert worst_difference(found, expected_gradients(plain, every, count)) > NOTICED  # all tokens


@pytest.mark.parametrize("schedule", ["once", "epoch"])
def test_scores_made_before_training_are_found_by_row_and_a_batch_is_one(arguments, schedule, capsys):
    assert main(["train", *arguments, "--seek_schedule", schedule]) == 2
    assert "with packing, which makes one row of a batch" in capsys.readouterr().err


def test_the_command_trains_and_counts(arguments, tmp_path):
    from tests.support.train import summary

    assert main(["train", *arguments]) == 0
    numbers = summary(tmp_path)
    assert numbers["steps"] == 1 and numbers["tokens_seen"] == sum(ROWS) + len(ROWS)
    assert 0.3 < numbers["tokens_kept"] / numbers["tokens_seen"] < 0.5


@pytest.fixture
def opt():
    """Its layers ask for masks by attention_mask alone."""
    tiny("opt", "causal", torch.float32, vocab_size=64).save_pretrained("opt")
    tokenizer().save_pretrained("opt")
    return "opt"


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize("named, packing, told", [("opt", True, True), ("opt", False, False), ("model", True, False)])
def test_a_model_that_does_not_keep_packed_rows_apart_is_refused(command, named, packing, told, instructions, request, capsys):
    pytest.importorskip("trl")
    name = str(request.getfixturevalue(named))
    data = ["--dataset", str(instructions), "--max_length", str(MAX_LENGTH), *(["--packing"] if packing else [])]
    run = [*STEP, "--output_dir", "out"] if command == "train" else []
    assert main([command, "--model", name, *data, *run]) == (2 if told else 0)
    if told:
        assert "packing: in OPTForCausalLM the rows that are packed into one see one another" in capsys.readouterr().err
