"""sequence_chunk_size=auto: the fastest size that is predicted to fit, chosen before step 0, without a trace of the trial."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

from hf_memtune import ConfigError, MemEfficientTrainingArguments, Streaming, StreamingCallback, StreamingConfig, estimate, memory
from hf_memtune.memory import available_bytes
from hf_memtune.memory.cards import ALLOCATOR_SHARE
from hf_memtune.memory.estimate import MemoryEstimate
from hf_memtune.memory.residents import bytes_held
from hf_memtune.training.care import chunk_choice
from tests.support.runs import DrawingRows, arguments, same_parameters, text_rows, train, trainer_for
from tests.support.tiny_models import tiny_model
from tests.support.two_processes import found_by_two

TOKENS = 300
ROWS = [row for seed, length in enumerate((TOKENS, TOKENS - 1) * 2) for row in text_rows(1, seed, length, length)]
SIZES = [TOKENS, 128]  # what is tried here: on models this small a chunk has to be well below the row to need less
LARGE = {"n_positions": 512, "resid_pdrop": 0.1}


def model():
    return tiny_model("gpt2", **LARGE)


def settings(folder, size="auto", **more):
    return arguments(folder, False, MemEfficientTrainingArguments, sequence_chunk_size=size, per_device_train_batch_size=2, **more)


PREDICT = chunk_choice._predicted
PREDICTED: dict[tuple, MemoryEstimate] = {}


def predicted_once(trainer, shape, size, predict=chunk_choice._predicted):
    """The same model and settings in most tests: each prediction is made once."""
    key = shape, size, bool(trainer.args.gradient_checkpointing), type(trainer)
    return PREDICTED[key] if key in PREDICTED else PREDICTED.setdefault(key, predict(trainer, shape, size))


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(chunk_choice, "SIZES", (2048, 1024, 128))
    monkeypatch.setattr(chunk_choice, "_predicted", predicted_once)


def clocked(monkeypatch, **seconds):
    """Sizes take these times: `n128=1.0` for chunks of 128; others take 10 s. Returns the sizes that were timed."""
    timed = []

    def told(trainer, config, inputs):
        timed.append(config.sequence_chunk_size)
        return seconds.get(f"n{config.sequence_chunk_size}", 10.0)

    monkeypatch.setattr(chunk_choice, "_seconds", told)
    return timed


def chosen(folder, **more):
    trainer = trainer_for(model(), settings(folder, **more), ROWS)
    trainer.train()
    assert trainer.args.sequence_chunk_size == trainer.method_callback.config.sequence_chunk_size
    return trainer.args.sequence_chunk_size


@pytest.mark.parametrize("fastest", SIZES)
def test_the_fastest_by_the_clock_is_taken(monkeypatch, tmp_path, fastest):
    timed = clocked(monkeypatch, **{f"n{fastest}": 1.0})
    assert chosen(tmp_path, max_steps=1) == fastest
    assert timed == SIZES


def peaks(folder):
    sizes = {size: settings(folder, size) for size in SIZES}
    return {size: estimate(model(), args, sequence_length=TOKENS, padded=True).peak_bytes for size, args in sizes.items()}


def test_what_does_not_fit_is_not_taken_however_fast(monkeypatch, tmp_path):
    """Fits is what `estimate` says: at a budget of a size's own prediction it is taken, one byte below it the next one is."""
    timed, expected = clocked(monkeypatch, n300=1.0), peaks(tmp_path)
    assert expected[300] > expected[128]
    assert chosen(tmp_path, max_steps=1, chunk_budget=str(expected[300])) == 300
    assert timed == SIZES
    assert chosen(tmp_path, max_steps=1, chunk_budget=str(expected[300] - 1)) == 128
    assert timed == SIZES  # of one alone nothing has to be timed


def test_where_nothing_fits_nothing_was_touched(monkeypatch, tmp_path):
    clocked(monkeypatch)
    trainer = trainer_for(given := model(), settings(tmp_path, chunk_budget="1MB"), ROWS)
    before = {name: p.clone() for name, p in given.named_parameters()}
    with pytest.raises(
        ConfigError, match="no size fits 977 KiB with 2 rows of up to 300 tokens: chunks of 128 .* activation_checkpointing=True"
    ):
        trainer.train()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in given.named_parameters())


def test_the_remedy_works(monkeypatch, tmp_path):
    """What the refusal names first brings the step under a budget that it did not fit."""
    clocked(monkeypatch)
    budget = peaks(tmp_path)[128] - 1
    with pytest.raises(ConfigError, match="activation_checkpointing=True"):
        chosen(tmp_path, max_steps=1, chunk_budget=str(budget))
    assert chosen(tmp_path, max_steps=1, chunk_budget=str(budget), activation_checkpointing=True) in SIZES


def test_by_a_real_clock_the_trial_leaves_no_trace(tmp_path):
    """With dropout, and rows that draw: the bits of a run that was given the number."""
    rows, others = DrawingRows(ROWS), DrawingRows(ROWS)
    found = train(model(), settings(tmp_path / "auto", chunk_budget="1GiB"), rows)
    size = found.trainer.args.sequence_chunk_size
    assert size in SIZES
    expected = train(model(), settings(tmp_path / "given", size), others)
    assert found.losses == expected.losses and same_parameters(found, expected) and rows.next_draw == others.next_draw
    other = train(model(), settings(tmp_path / "other", size, seed=1), ROWS)
    assert not same_parameters(found, other)


def test_a_resumed_run_keeps_the_size(monkeypatch, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    clocked(monkeypatch, n128=1.0)
    trainer = trainer_for(model(), settings(tmp_path, **saving), ROWS)
    trainer.train()
    timed = clocked(monkeypatch, n300=1.0)
    for resume, size in ((str(tmp_path / "checkpoint-1"), 128), (None, 300)):  # without a checkpoint the new clock decides
        resumed = trainer_for(model(), settings(tmp_path, **saving), ROWS)
        resumed.train(resume_from_checkpoint=resume)
        assert resumed.args.sequence_chunk_size == size and bool(timed) == (resume is None)


def test_processes_come_to_one_size(tmp_path_factory):
    """Their clocks and their budgets differ: the first one's clock decides, and the tightest budget."""
    found = found_by_two(tmp_path_factory, "streaming")[0]["chunk choice"]
    assert found["clocks"] == [128, 64] and found["sizes"] == [128, 128] and found["tight"] == [64, 64]


def test_timed_are_the_first_tokens_of_the_longest_batch(monkeypatch, tmp_path):
    seen, seconds = [], chunk_choice._seconds

    def looked_at(trainer, config, inputs):
        seen.append({name: tuple(value.shape) for name, value in inputs.items()})
        return seconds(trainer, config, inputs)

    monkeypatch.setattr(chunk_choice, "_seconds", looked_at)
    chosen(tmp_path, max_steps=1, chunk_budget="1GiB")
    assert len(seen) == 2 and all(set(shapes.values()) == {(2, 256)} for shapes in seen)  # of 300


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ROWS


@pytest.mark.parametrize("rows", [Endless(), [{"pixels": [0.0] * 5, "labels": [1] * 5}] * 2], ids=["endless", "no ids"])
def test_rows_of_unknown_length_are_refused(tmp_path, rows):
    with pytest.raises(ConfigError, match="the length of the longest row is not known.*Give a number of tokens"):
        trainer_for(model(), settings(tmp_path, max_steps=1), rows, data_collator=lambda rows: {"labels": torch.tensor([1])}).train()


def test_a_step_of_ones_own_is_refused(tmp_path):
    from hf_memtune import MemEfficientTrainer

    class Own(MemEfficientTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ConfigError, match="Own has a step or a loss of its own.*Give a number of tokens"):
        trainer_for(model(), settings(tmp_path, max_steps=1), ROWS, Own).train()


def test_a_loss_of_ones_own_is_refused(tmp_path):
    """It may read all of the logits, of which a prediction knows nothing."""
    with pytest.raises(ConfigError, match="compute_loss_func has a step or a loss of its own.*Give a number of tokens"):
        loss = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.float().logsumexp(-1).mean()}
        trainer_for(model(), settings(tmp_path, max_steps=1), ROWS, **loss).train()


def test_an_optimizer_that_the_arguments_do_not_tell_is_refused(tmp_path):
    """Its state is not that of optim. Sibling: one that is, made by hand."""
    more = {"optim": "adamw_torch", "max_steps": 1, "chunk_budget": "1GiB"}
    for make, is_told in ((torch.optim.SGD, False), (partial(torch.optim.AdamW, fused=True), False), (torch.optim.AdamW, True)):
        given = model()
        trainer = trainer_for(given, settings(tmp_path, **more), ROWS, optimizers=(make(given.parameters(), lr=1e-3), None))
        with nullcontext() if is_told else pytest.raises(ConfigError, match="its optimizer, .* is not the one of optim=adamw_torch"):
            trainer.train()


def test_where_evaluation_needs_most_it_is_what_to_change(monkeypatch, tmp_path):
    """And in no case are chunks offered, of which none fits."""
    clocked(monkeypatch)
    more = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 64}
    for settled, words in ((more, "per_device_eval_batch_size=32"), ({}, "activation_checkpointing=True")):
        trainer = trainer_for(model(), settings(tmp_path, chunk_budget="1MB", max_steps=1, **settled), ROWS, eval_dataset=ROWS)
        monkeypatch.setattr(chunk_choice, "_predicted", PREDICT)
        with pytest.raises(ConfigError) as refused:
            trainer.train()
        remedies = str(refused.value).partition("Try, one at a time: ")[2]
        assert words in remedies and "sequence_chunk_size=" not in remedies and "prediction_loss_only" not in remedies


def test_sharded_parameters_are_refused(monkeypatch, tmp_path):
    trainer = trainer_for(model(), settings(tmp_path, max_steps=1), ROWS)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ConfigError, match=r"spread over processes \(FSDP\).*Give a number of tokens"):
        chunk_choice._estimates(trainer, chunk_choice.BatchShape(2, TOKENS, False), 2**30)


def test_where_no_trainer_chooses_a_number_is_wanted(tmp_path):
    with pytest.raises(ConfigError, match="got 'auto', which MemEfficientTrainer chooses.*Expected a number"):
        StreamingCallback(sequence_chunk_size="auto")
    with pytest.raises(ConfigError, match="got auto, expected the tokens of a chunk.*auto is for MemEfficientTrainer"):
        Streaming(model(), StreamingConfig(sequence_chunk_size="auto"))
    with pytest.raises(ConfigError, match="got 'auto', which a trainer chooses.*plan"):
        estimate(model(), settings(tmp_path))
    with pytest.raises(ConfigError, match="got 'auto' with token_seeking"):
        settings(tmp_path, token_seeking=True, token_gradient="stream")


def test_budgets_are_read_and_judged(tmp_path):
    with pytest.raises(ConfigError, match="chunk_budget: not a number of bytes: got 'much'"):
        settings(tmp_path, chunk_budget="much")
    with pytest.raises(ConfigError, match="chunk_budget: got '0', expected more than 0 bytes"):
        settings(tmp_path, chunk_budget="0")
    with pytest.warns(UserWarning, match="chunk_budget has no effect without sequence_chunk_size=auto"):
        settings(tmp_path, 128, chunk_budget="1GiB")


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("512", 512)])
def test_flags_are_words_or_numbers(tmp_path, word, value):
    parser = HfArgumentParser(MemEfficientTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", "--sequence_chunk_size", word])
    assert args.sequence_chunk_size == value
    with pytest.raises(ConfigError, match="sequence_chunk_size: got 'some', expected 1 token or more, or auto"):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--sequence_chunk_size", "some"])


@pytest.fixture
def free(monkeypatch):
    """Bytes that the system says are free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5000))
    return 5000


def test_what_is_free_counts_what_is_held(tmp_path, monkeypatch, free):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert available_bytes("cpu", 0) == free and available_bytes("cpu", 70) == free + 70


def test_tensors_of_others_on_a_device_are_not_to_be_had(monkeypatch):
    """An average of the weights, say, which nobody predicts. Sibling: the run's own, which are predicted, may take the place they have."""
    found = {"mem_get_info": (1000, 4000), "memory_reserved": 3000, "memory_allocated": 2500}
    allocator = SimpleNamespace(**{name: lambda device, value=value: value for name, value in found.items()})
    monkeypatch.setattr(memory, "_allocator", lambda device: allocator)
    everything = int(4000 / (1 + ALLOCATOR_SHARE))
    assert available_bytes("cuda", 2500) == available_bytes("cuda", 2600) == everything  # of weights in host memory as well
    assert available_bytes("cuda", 600) == everything - 1900


def test_what_a_run_holds_is_its_weights_and_what_its_optimizer_keeps(tmp_path):
    found = train(given := model(), settings(tmp_path, None, max_steps=1, optim="adamw_torch"), ROWS)
    weights = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in given.state_dict().values())}
    moments = 2 * sum(p.nbytes for p in given.parameters())
    held = bytes_held(given, found.trainer.optimizer) - sum(weights.values()) - moments
    assert held == 4 * len(list(given.parameters()))  # numbers of steps


@pytest.mark.parametrize("limit, left", [("1000", 500), ("max\n", None), (None, None)])
def test_a_container_has_its_own_limit(tmp_path, monkeypatch, free, limit, left):
    """Of which a cache of files can be had again."""
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("700\n")
        (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 200\n")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    found = available_bytes("cpu", 8)
    assert found == (free if left is None else left) + 8


def test_rows_that_the_trainer_has_yet_to_collate_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="its rows or batches no input_ids"):
        trainer_for(model(), settings(tmp_path, max_steps=1), ROWS, data_collator=list).train()
