"""The worst batch first: found, measured, refused where it does not fit, and taken back bit by bit."""

import builtins
import random
from argparse import Namespace
from contextlib import nullcontext
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, set_seed

from hf_memtune import ConfigError, MemEfficientTrainer, MemTuneError, Streaming, StreamingConfig
from hf_memtune.core.selection import select
from hf_memtune.memory import CATEGORIES
from hf_memtune.training.care.preflight import flight, snapshot
from hf_memtune.training.care.preflight.longest import longest_batch, longest_rows, row_lengths
from hf_memtune.training.care.preflight.report import PreflightReport
from hf_memtune.training.care.preflight.watch import LeverWatch
from hf_memtune.training.restorable import keep_plain
from hf_memtune.training.rng import preserved_rng
from tests.support.runs import DrawingRows, Run, arguments, llama, pad_right, same_parameters, text_rows, train, trainer_for
from tests.support.tiny_models import tiny_model

ROWS = text_rows(24)
PLAIN = {"token_seeking": False, "token_ratio": None, "context_normalize": None}
STREAMING = PLAIN | {"sequence_chunk_size": 4}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 1.0, "max_steps": 3}


def drawing():
    """Draws masks in every forward pass."""
    return tiny_model("gpt2", dtype=torch.float32, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)


def with_lora():
    set_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, lora_dropout=0.1)
    return get_peft_model(llama(), config)


def deep():
    return llama(num_hidden_layers=4)


CASES = {
    "plain": (drawing, PLAIN),
    "linear schedule": (drawing, PLAIN | {"lr_scheduler_type": "linear"}),
    "accumulation": (drawing, PLAIN | {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "lora": (with_lora, PLAIN),
    "streaming": (drawing, STREAMING),
    "streaming lora": (with_lora, STREAMING | {"gradient_checkpointing": True}),
    "seeking": (drawing, {}),
    "seeking once": (llama, {"seek_schedule": "once"}),
    "reversible": (deep, PLAIN | {"reversible": "centred"}),
    "two levels": (deep, PLAIN | {"checkpoint_levels": 2}),
    "evaluation": (drawing, PLAIN | {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}),
}


@pytest.fixture(autouse=True)
def no_prediction(request, monkeypatch):
    """A trace without values takes longer than the runs; that it leaves no trace itself is tested below."""
    if "prediction" not in request.fixturenames:
        monkeypatch.setattr(PreflightReport, "predict", lambda self, trainer: None)


@pytest.fixture
def prediction():
    """Asked for by tests that do predict."""


def make_arguments(folder, settings, preflight, **more):
    settings = ADAM | {"memory_report": False} | settings | more
    schedule = settings.pop("lr_scheduler_type", "constant")
    args = arguments(folder, memory_preflight=preflight, **settings)
    args.lr_scheduler_type = schedule
    return args


def run(make, folder, settings, preflight, resume=None, **more) -> Run:
    model = make()
    torch.manual_seed(7)
    held_out = {"eval_dataset": ROWS[:6]} if "eval_strategy" in settings else {}
    return train(model, make_arguments(folder, settings, preflight, **more), ROWS, resume=resume, **held_out)


def logs(found: Run) -> list[dict]:
    """All but what a clock or the process says."""
    clocks = ("seconds", "resident", "runtime", "per_second")
    return [{k: v for k, v in entry.items() if not any(c in k for c in clocks)} for entry in found.trainer.state.log_history]


def same(one: Run, other: Run) -> bool:
    gradients = all(torch.equal(a[name], b[name]) for a, b in zip(one.gradients, other.gradients, strict=True) for name in a | b)
    return same_parameters(one, other) and gradients and logs(one) == logs(other)


# -- taken back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [name for name in CASES if name != "linear schedule"])  # which is a resumed run's
def test_a_run_is_the_same_with_and_without(tmp_path, case):
    make, settings = CASES[case]
    found, expected = (run(make, tmp_path / str(flies), settings, flies) for flies in (True, False))
    assert found.trainer.preflight.report is not None and expected.trainer.preflight.report is None
    assert same(found, expected)


FORGOTTEN = {
    "weights": ("keep_module", lambda module: lambda: None),
    "optimizer": ("keep_optimizer", lambda optimizer: lambda: None),
    "schedule": ("_keep_state_dict", lambda owner: lambda: None),
    "generators": ("preserved_rng", lambda device: nullcontext()),
}


@pytest.mark.parametrize("forgotten", FORGOTTEN)
def test_what_is_not_restored_is_noticed(tmp_path, monkeypatch, forgotten):
    """Sibling: leave one thing out, and the runs differ."""
    make, settings = CASES["linear schedule"]
    expected = run(make, tmp_path, settings, False)
    name, twin = FORGOTTEN[forgotten]
    monkeypatch.setattr(snapshot, name, twin)
    assert not same(run(make, tmp_path, settings, True), expected)


class Uncopied(list):
    def __deepcopy__(self, memo):
        raise AssertionError("rows were copied")


def test_rows_are_not_copied(tmp_path):
    """Of a data set that is a list, nothing tells that it is no counter but its name."""
    args = make_arguments(tmp_path, PLAIN, True, max_steps=1)
    assert train(llama(), args, Uncopied(ROWS), eval_dataset=Uncopied(ROWS[:4])).trainer.preflight.report is not None
    with pytest.raises(AssertionError, match="rows were copied"):  # the sibling: under another name
        keep_plain(Namespace(rows=Uncopied(ROWS)))


def test_what_is_put_back_may_change_again():
    """A step may fail twice: what the second attempt adds to what was put back goes as well."""
    owner = Namespace(metrics={"loss": [1.0]}, count=1)
    restore = keep_plain(owner)
    for _ in range(2):
        owner.metrics["loss"].append(2.0)
        owner.count, owner.new = owner.count + 1, 0
        restore()
        assert vars(owner) == {"metrics": {"loss": [1.0]}, "count": 1}


def test_a_resumed_run_is_the_same(tmp_path):
    """The optimizer comes with its state, which is not made anew."""
    settings = PLAIN | {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    whole = run(drawing, tmp_path, settings, False)
    resumed = run(drawing, tmp_path / "again", settings, True, resume=str(tmp_path / "checkpoint-1"))
    assert same_parameters(resumed, whole)
    assert resumed.losses == whole.losses


def test_a_resumed_optimizer_that_is_not_restored_is_noticed(tmp_path, monkeypatch):
    settings = PLAIN | {"save_strategy": "steps", "save_steps": 1}
    whole = run(drawing, tmp_path, settings, False)
    monkeypatch.setattr(snapshot, *FORGOTTEN["optimizer"])
    assert not same_parameters(run(drawing, tmp_path / "again", settings, True, resume=str(tmp_path / "checkpoint-1")), whole)


def test_a_fresh_optimizer_stays_fresh(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            seen.append((len(optimizer.state), any(p.grad is not None for p in model.parameters())))

    train(llama(), make_arguments(tmp_path, PLAIN, True, max_steps=1), ROWS, callbacks=[Look()])
    assert seen == [(0, False)]


def test_rotary_embeddings_that_grew_with_the_longest_row_are_as_before(tmp_path):
    scaling = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, "max_position_embeddings": 8}
    states = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            rotary = model.model.rotary_emb
            states.append((rotary.max_seq_len_cached, rotary.inv_freq.clone()))

    for flies in (True, False):
        train(llama(**scaling), make_arguments(tmp_path, PLAIN, flies, max_steps=1), ROWS, callbacks=[Look()])
    (ours, frequencies), (theirs, expected) = states
    assert ours == theirs and torch.equal(frequencies, expected)


# -- the longest batch -------------------------------------------------------------------------------------------------


def test_the_longest_rows_are_collated_as_in_training(tmp_path):
    trainer = trainer_for(llama(), arguments(tmp_path, **PLAIN), ROWS)
    found = longest_batch(trainer.get_train_dataloader(), 3)
    lengths = sorted((len(row["input_ids"]) for row in ROWS), reverse=True)
    assert found.tokens == lengths[0] == found.batch["input_ids"].shape[1]
    assert found.batch["attention_mask"].sum(1).tolist() == lengths[:3]


def test_of_equal_rows_one_is_shorter_for_attention_needs_more_with_a_mask():
    """Where some row is; of one row at a time, and of rows that a collator does not pad, none is exchanged."""
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (8, 5, 8, 7, 8, 3)]
    found = longest_batch(torch.utils.data.DataLoader(rows, collate_fn=pad_right), 2)
    assert found.tokens == 8 and found.batch["attention_mask"].sum(1).tolist() == [8, 7]
    for given, count in ((rows[::2], 2), (rows, 1)):
        assert bool(longest_batch(torch.utils.data.DataLoader(given[:3], collate_fn=pad_right), count).batch["attention_mask"].all())
    together = longest_batch(torch.utils.data.DataLoader(rows, collate_fn=lambda rows: {"input_ids": [r["input_ids"] for r in rows]}), 2)
    assert [len(ids) for ids in together.batch["input_ids"]] == [8, 8]


def test_a_collator_that_draws_draws_the_same(tmp_path):
    """The longest batch is collated beside those of training, once."""
    drawn = {}
    for flies in (False, True):

        def masking(rows, found=drawn.setdefault(flies, [])):
            found.append(torch.rand(()).item())
            return pad_right(rows)

        train(llama(), make_arguments(tmp_path / str(flies), PLAIN, flies), ROWS, data_collator=masking)
    without, beside = drawn[False], drawn[True]
    assert any(beside[:n] + beside[n + 1 :] == without for n in range(len(beside)))


class Masking:
    """A collator that draws from a generator of its own, made when it is first needed, as that of transformers for masked language modelling."""

    def __init__(self):
        self.generator, self.drawn = None, []

    def __call__(self, rows):
        self.generator = self.generator or torch.Generator().manual_seed(3)
        self.drawn.append(torch.rand((), generator=self.generator).item())
        return pad_right(rows)


class Around:
    def __init__(self, inner):
        self.inner, self.entropy = inner, random.SystemRandom()

    def __call__(self, rows):
        return self.inner(rows)


def test_a_function_of_a_module_has_no_generators():
    """Its `__self__` is the module, whose functions are nobody's collators."""
    before = dict(vars(builtins))
    with preserved_rng(torch.device("cpu"), len):
        torch.rand(1)
    assert vars(builtins) == before


@pytest.mark.parametrize(
    "given",
    [lambda each: each, lambda each: each.__call__, lambda each: partial(each), lambda each: partial(each.__call__), Around],
    ids=["itself", "a method", "a partial", "a partial of a method", "inside another"],
)
def test_a_collator_with_a_generator_of_its_own_draws_the_same(tmp_path, given):
    drawn = {}
    for flies in (False, True):
        collator = Masking()
        train(llama(), make_arguments(tmp_path / str(flies), PLAIN, flies), ROWS, data_collator=given(collator))
        drawn[flies] = collator.drawn
    without, beside = drawn[False], drawn[True]
    assert len(beside) > len(without) > 1 and [number for number in beside if beside.count(number) == 1] != beside  # some were drawn twice
    assert any(beside[:n] + beside[n + 1 :] == without for n in range(len(beside)))


DRAWN_AT_RANDOM = np.random.default_rng(5)


def from_a_default(rows, generator=np.random.default_rng(5)):
    return generator.random()


def from_the_module(rows):
    return DRAWN_AT_RANDOM.random()


def from_a_closure():
    generator = random.Random(5)
    return lambda rows: generator.random()


class InSlots:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = np.random.RandomState(5)

    def __call__(self, rows):
        return self.generator.random_sample()


class InAList:
    def __init__(self):
        self.generators = {"masks": [torch.Generator().manual_seed(5)]}

    def __call__(self, rows):
        return torch.rand((), generator=self.generators["masks"][0]).item()


class Replacing:
    """Makes its generator anew with every batch."""

    def __init__(self):
        self.generator = random.Random(5)

    def __call__(self, rows):
        drawn = self.generator.random()
        self.generator = random.Random(drawn)
        return drawn


class FromItsModule:
    def __call__(self, rows):
        return from_the_module(rows) + DRAWN_AT_RANDOM.random()


@pytest.mark.parametrize(
    "collator",
    [
        from_a_default,
        from_the_module,
        from_a_closure(),
        InSlots(),
        InAList(),
        Replacing(),
        FromItsModule(),
        partial(from_a_default, generator=random.Random(5)),
    ],
    ids=["a default", "of the module", "a closure", "slots", "a list in a dict", "replaced", "a method's module", "a partial's argument"],
)
def test_generators_wherever_a_collator_has_them(collator):
    """Go on from where they were."""
    with preserved_rng(torch.device("cpu"), Around(collator)):
        meanwhile = [collator([]) for _ in range(3)]
    assert [collator([]) for _ in range(3)] == meanwhile
    assert [collator([]) for _ in range(3)] != meanwhile


def test_a_data_set_that_draws_gives_the_same_rows():
    class Drawing(torch.utils.data.Dataset):
        def __init__(self):
            self.generator = random.Random(5)

        def __getitem__(self, number):
            return self.generator.random()

    rows = torch.utils.data.Subset(Drawing(), [0, 1])
    with preserved_rng(torch.device("cpu"), None, rows):
        meanwhile = rows[0]
    assert rows[0] == meanwhile != rows[0]


@pytest.mark.parametrize("offloads", [False, True])
def test_what_goes_to_host_memory_is_seen(offloads):
    model, batch = llama(), pad_right(text_rows(2, shortest=16))
    with Streaming(model, StreamingConfig(sequence_chunk_size=8, kv_offload=offloads)) as method:
        watch = LeverWatch(Namespace(model=model.train(), method=method), is_longest=True)
        with watch.watching():
            model(**batch).loss.backward()
        asked = watch.saw.host_bytes
        model(**batch).loss.backward()
    assert watch.saw.host_bytes == asked and (asked > 0) == offloads and watch.saw.chunks == 2


def test_rows_that_are_evaluated_draw_the_same(tmp_path):
    draws = []
    for flies in (False, True):
        rows = DrawingRows(ROWS)
        settings = CASES["evaluation"][1]
        train(llama(), make_arguments(tmp_path / str(flies), settings, flies), ROWS, eval_dataset=rows)
        draws.append(rows.next_draw)
    assert draws[0] == draws[1]


@pytest.mark.parametrize("shuffled", [False, True])
def test_lengths_of_a_stored_data_set(shuffled):
    data = Dataset.from_list(ROWS)
    data = data.shuffle(seed=1) if shuffled else data
    assert row_lengths(data)["input_ids"] == [len(row["input_ids"]) for row in data]
    lazy = Dataset.from_list(ROWS).with_transform(lambda batch: {"input_ids": [ids[:4] for ids in batch["input_ids"]]})
    assert set(row_lengths(lazy)["input_ids"]) == {4}


def test_the_longest_of_every_column_is_there():
    """A collator pads inputs and labels each to their own longest."""
    assert sorted(longest_rows({"input_ids": [9, 1, 5, 6], "labels": [1, 8, 5, 6]}, 3)) == [0, 1, 3]
    assert longest_rows({"input_ids": [3, 9, 5]}, 2) == [1, 2]


def test_rows_without_tokens_are_taken_as_they_come():
    data = [{"pixel_values": torch.zeros(2)} for _ in range(5)]
    assert row_lengths(data) == {}
    found = longest_batch(torch.utils.data.DataLoader(data), 2)
    assert found.rows == 2 and found.tokens is None and "no input_ids" in found.why


class Endless(IterableDataset):
    def __iter__(self):
        yield from ROWS


def test_a_data_set_without_length_gives_its_first_batch(tmp_path):
    """Nothing is drawn from it ahead of time, so it goes on as it would have."""
    runs = [train(drawing(), make_arguments(tmp_path, PLAIN, flies), Endless()) for flies in (True, False)]
    report = runs[0].trainer.preflight.report
    assert report.tokens is None and "without length" in report.why and report.rows == 8
    assert same_parameters(*runs)


# -- measured ----------------------------------------------------------------------------------------------------------


def test_the_peak_is_that_of_a_later_step(tmp_path):
    """Optimizer state is there when backward runs, as in every step but the first."""
    report = run(llama, tmp_path, PLAIN, True).trainer.preflight.report
    sizes = sum(p.nbytes for p in llama().parameters())
    backward = report.account.phase("backward").by_category
    assert backward["weights"] >= sizes and backward["optimizer_state"] >= 2 * sizes
    assert set(backward) == set(CATEGORIES) and report.measured_bytes == report.account.peak_bytes > 4 * sizes


def test_evaluation_is_measured(tmp_path):
    make, settings = CASES["evaluation"]
    report = run(make, tmp_path, settings, True).trainer.preflight.report
    evaluation = report.account.phase("evaluation").by_category
    assert evaluation["gradients"] == 0 < evaluation["temporaries"] and evaluation["optimizer_state"] > 0
    assert "evaluation" not in [phase.phase for phase in run(make, tmp_path, PLAIN, True).trainer.preflight.report.account.phases]


@pytest.mark.parametrize("around", [True, False])
def test_evaluation_around_a_training_is_measured_where_somebody_says_it_comes(tmp_path, around):
    trainer = trainer_for(llama(), make_arguments(tmp_path, PLAIN, True), ROWS, eval_dataset=ROWS[:6])
    trainer.measures_held_out = around
    trainer.train()
    assert ("evaluation" in [phase.phase for phase in trainer.preflight.report.account.phases]) == around


@pytest.mark.usefixtures("prediction")
@pytest.mark.parametrize("case", ["accumulation"])
def test_what_was_predicted_is_told_beside_it(tmp_path, case):
    """And predicting draws nothing, nor sets a seed."""
    make, settings = CASES[case]
    found, expected = (run(make, tmp_path / str(flies), settings, flies) for flies in (True, False))
    report = found.trainer.preflight.report
    assert report.measured_bytes <= report.predicted.peak_bytes <= 1.05 * report.measured_bytes
    assert "predicted" in "\n".join(report.lines())
    assert same(found, expected)


def test_what_an_allocator_says_stands_beside_it(tmp_path, monkeypatch):
    """As on a GPU, here from a counter: the highest of each phase, and how much of the device that is."""
    peaks = iter(range(100, 1000))
    monkeypatch.setattr(flight, "peak_device_bytes", lambda device: next(peaks))
    monkeypatch.setattr(flight, "_device_bytes", lambda device: 104)
    report = run(llama, tmp_path, CASES["evaluation"][1], True).trainer.preflight.report
    assert report.allocator_peaks == {"forward and backward": 102, "optimizer": 103, "evaluation": 104}
    assert report.measured_bytes == 104 and "100 % of the device: little is left" in "\n".join(report.lines())


# -- what does not fit -------------------------------------------------------------------------------------------------


class Small(MemEfficientTrainer):
    """Has memory for fewer tokens in a row than the longest has."""

    most = max(len(row["input_ids"]) for row in ROWS) - 1

    def training_step(self, model, inputs, *args):
        if inputs["input_ids"].shape[1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return super().training_step(model, inputs, *args)


def test_what_does_not_fit_stops_in_the_beginning_with_advice(tmp_path):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_for(model, make_arguments(tmp_path, PLAIN, True), ROWS, cls=Small)
    with pytest.raises(MemTuneError, match="8 rows of up to 16 tokens") as caught:
        trainer.train()
    for wanted in ("per_device_train_batch_size=4 with gradient_accumulation_steps=2", "sequence_chunk_size", "LoRA", "token_seeking"):
        assert wanted in str(caught.value)
    assert trainer.state.global_step == 0 and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not trainer.optimizer.state


def test_without_it_the_same_run_fails_later(tmp_path):
    """Sibling: the long row comes when it comes."""
    settings = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "max_steps": -1, "train_sampling_strategy": "sequential"}
    trainer = trainer_for(llama(), make_arguments(tmp_path, PLAIN, False, **settings), ROWS, cls=Small)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.state.global_step > 0


def test_auto_find_batch_size_halves_on_the_worst_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)  # slow in a test session

    class Tight(MemEfficientTrainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    halved = train(drawing(), make_arguments(tmp_path, PLAIN, True, auto_find_batch_size=True), ROWS, cls=Tight)
    assert halved.trainer.preflight.report.rows <= 4 and halved.trainer.state.global_step == 3


def test_optimizers_that_step_in_backward_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="memory_preflight"):
        arguments(tmp_path, memory_preflight=True, optim="lomo", **PLAIN)
    assert not arguments(tmp_path, **PLAIN).preflights  # on a CPU it is off by itself


def test_sharding_that_accelerate_was_told_of_is_refused(tmp_path, monkeypatch):
    """`accelerate launch` says so in the environment; the arguments name nothing."""
    assert arguments(tmp_path, memory_preflight=True, **PLAIN).preflights
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="memory_preflight: got True with fsdp"):
        arguments(tmp_path, memory_preflight=True, **PLAIN)


# -- levers that do not act --------------------------------------------------------------------------------------------


def frozen_below():
    """Reentrant checkpointing of layers whose input has no gradient recomputes nothing."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(("model.norm", "lm_head"))
    return model


REENTRANT = PLAIN | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("flies", [True, False])
def test_checkpointing_that_recomputes_nothing_is_an_error(tmp_path, flies):
    class NoGradientOfInputs(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.disable_input_require_grads()

    trainer = trainer_for(frozen_below(), make_arguments(tmp_path, REENTRANT, flies), ROWS)
    train(frozen_below(), make_arguments(tmp_path, REENTRANT, flies), ROWS)
    trainer.add_callback(NoGradientOfInputs())
    with pytest.raises(ConfigError, match="gradient_checkpointing: it is on, but no module ran again"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("settings", [CASES["reversible"][1], CASES["two levels"][1]], ids=["reversible", "two levels"])
def test_layers_that_do_not_run_again_are_an_error(tmp_path, settings):
    class Undone(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for layer in model.model.layers:
                vars(layer)["forward"] = MethodType(type(layer).forward, layer)

    trainer = trainer_for(deep(), make_arguments(tmp_path, settings, False), ROWS)
    trainer.add_callback(Undone())
    trainer._verify_layers = lambda batches: None  # which would notice as well
    with pytest.raises(ConfigError, match="no module ran again"):
        trainer.train()


@pytest.mark.parametrize("flies", [True, False])
def test_rows_shorter_than_a_chunk_are_a_warning(tmp_path, caplog, flies):
    settings = STREAMING | {"sequence_chunk_size": 64}
    train(llama(), make_arguments(tmp_path, settings, flies), ROWS)
    assert ("the longest row of all has 16 tokens" in caplog.text) == flies


@pytest.mark.parametrize("flies", [True, False])
def test_tokens_that_are_all_kept_are_an_error(tmp_path, monkeypatch, flies):
    """Whatever the ratio says."""
    train(llama(), make_arguments(tmp_path, {}, flies), ROWS)
    monkeypatch.setattr("hf_memtune.methods.seeking.choice.select", lambda values, ratio, *others: select(values, 1.0, *others))
    with pytest.raises(ConfigError, match=r"all \d+ tokens were kept with token_ratio=0.35"):
        train(llama(), make_arguments(tmp_path, {}, flies), ROWS)


def test_short_rows_that_are_kept_whole_are_none(tmp_path, caplog):
    """Nine tenths of nine tokens, rounded up, are nine, however wide the batch is padded."""
    rows = text_rows(16, longest=9)

    def pad_wide(batch):
        fill = {"labels": -100}
        return {name: torch.nn.functional.pad(value, (0, 7), value=fill.get(name, 0)) for name, value in pad_right(batch).items()}

    train(llama(), make_arguments(tmp_path, {"token_ratio": 0.9}, True), rows, data_collator=pad_wide)
    assert "tokens were kept with token_ratio=0.9" in caplog.text


def test_adapters_that_train_the_whole_model_are_an_error(tmp_path):
    model = with_lora()
    for parameter in model.parameters():
        parameter.requires_grad = True
    with pytest.raises(ConfigError, match="peft"):
        train(model, make_arguments(tmp_path, PLAIN, True), ROWS)


def test_eight_bit_states_that_are_not_are_told(tmp_path, caplog):
    """bitsandbytes leaves small parameters in 32 bits: of this model, all."""
    pytest.importorskip("bitsandbytes")
    train(llama(), make_arguments(tmp_path, PLAIN, True, optim="adamw_bnb_8bit"), ROWS)
    assert "no tensor of its state has 8 bits" in caplog.text
    caplog.clear()
    train(llama(hidden_size=64, intermediate_size=128), make_arguments(tmp_path, PLAIN, True, optim="adamw_bnb_8bit"), ROWS)
    assert "8 bits" not in caplog.text
