"""The ladder and what is chosen on it, with predictions made up here; and rungs that a model does not have."""

from functools import partial

import pytest

from hf_memtune import ConfigError, MemEfficientTrainingArguments, UnsupportedModelError
from hf_memtune.forecast.ladder import Rung, ladder
from hf_memtune.forecast.plan import make_plan, refusal
from hf_memtune.levers.facts import Run
from hf_memtune.levers.offers import smaller_micro_batches
from hf_memtune.memory.account import CATEGORIES, MemoryAccount, PhaseBytes
from hf_memtune.memory.estimate import MemoryEstimate

RUNGS = [
    Rung("as given", "exact", {}),
    Rung("less", "exact", {"size": 60}),
    Rung("missing", "exact", {"size": 1}, "it is not installed"),
    Rung("refused", "exact", {"refused": True}),
    Rung("another thing", "exact (LoRA)", {"size": 40}),
    Rung("part", "approximate", {"size": 20}),
]


def predict(changes, bytes_as_given=100):
    if "refused" in changes:
        raise UnsupportedModelError("this model cannot")
    size = changes.get("size", bytes_as_given)
    account = MemoryAccount((PhaseBytes("backward", dict.fromkeys(CATEGORIES, 0) | {"weights": size}),))
    return MemoryEstimate(account, {}, flops=2 * (200 - size))


@pytest.mark.parametrize("budget, chosen", [(100, "as given"), (99, "less"), (59, "another thing"), (39, "part"), (19, None)])
def test_the_first_exact_rung_that_fits(budget, chosen):
    plan = make_plan(RUNGS, predict, budget)
    assert (plan.chosen and plan.chosen.rung.name) == chosen
    assert plan.smallest.rung.name == "part" and len(plan.steps) == len(RUNGS)


def test_rungs_that_do_not_apply_say_why():
    reasons = {step.rung.name: step.reason for step in make_plan(RUNGS, predict, 50).steps if step.reason}
    assert reasons == {"missing": "it is not installed", "refused": "this model cannot"}


def test_a_rung_whose_settings_are_refused_is_left_out_before_it_is_traced():
    def floor(changes):
        if changes:
            raise ConfigError(["load_in_4bit: needs bitsandbytes."])
        return 0

    plan = make_plan(RUNGS[:2], predict, 100, floor=floor)
    assert plan.chosen.rung.name == "as given" and plan.steps[1].reason == "load_in_4bit: needs bitsandbytes"
    with pytest.raises(ConfigError):
        make_plan(RUNGS[1:2], predict, 100, floor=floor)


def test_times_are_relative_to_the_settings_as_given():
    steps = {step.rung.name: step.relative_time for step in make_plan(RUNGS, predict, 50).steps}
    assert steps["as given"] == 1 and steps["part"] == 1.8 and steps["refused"] is None


def test_stopping_at_the_first_rung_that_fits():
    assert [step.rung.name for step in make_plan(RUNGS, predict, 60, stop_at_first=True).steps] == ["as given", "less"]


def test_what_the_settings_as_given_raise_is_raised():
    with pytest.raises(UnsupportedModelError):
        make_plan([Rung("as given", "exact", {"refused": True})], predict, 50)


def test_a_refusal_names_the_nearest_thing():
    plan = make_plan(RUNGS[:3], predict, 10)
    error = refusal(plan, (64, predict({"size": 9})))
    assert isinstance(error, ConfigError)
    for part in ("got 10 B", "the least is 60 B, with less", "shorten rows to 64 tokens, which needs 9 B", "allow_approximate"):
        assert part in str(error)
    assert "allow_approximate" not in str(refusal(make_plan(RUNGS, predict, 10), None))
    of_card = str(refusal(plan, None, "t4"))
    assert "gpu: got t4, which leaves 10 B" in of_card and "Take a card that leaves that much" in of_card and "budget" not in of_card


@pytest.mark.parametrize("phase", ["evaluation", "backward"])
def test_a_refusal_names_held_out_rows_where_they_need_most(phase):
    account = MemoryAccount((PhaseBytes(phase, dict.fromkeys(CATEGORIES, 0) | {"weights": 60}),))
    conditions = {"evaluation_rows": 1}
    said = str(refusal(make_plan(RUNGS[:1], lambda changes: MemoryEstimate(account, conditions, flops=1), 10), None))
    assert ("--eval_fraction 0" in said) == (phase == "evaluation")


@pytest.fixture
def arguments(tmp_path):
    return partial(MemEfficientTrainingArguments, str(tmp_path), use_cpu=True, report_to=[])


def test_the_ladder_from_plain_training(arguments):
    rungs = ladder(Run(arguments(per_device_train_batch_size=4), 4, 2048))
    assert [rung.name for rung in rungs] == [
        "as given", "logit-free loss", "activation checkpointing", "streaming, chunks of 512",
        "micro-batch of 2, accumulated 2 times", "micro-batch of 1, accumulated 4 times", "8-bit optimizer state", "LoRA, rank 16",
        "QLoRA, weights in 4 bits", "token seeking, ratio 0.5", "token seeking, ratio 0.3", "token seeking, ratio 0.1",
    ]  # fmt: skip
    first_approximate = next(number for number, rung in enumerate(rungs) if not rung.is_exact)
    assert all(not rung.is_exact for rung in rungs[first_approximate:])
    changes = rungs[-1].changes
    assert changes["token_seeking"] and changes["load_in_4bit"] and changes["gradient_accumulation_steps"] == 4
    assert "sequence_chunk_size" not in changes
    assert {rung.gradient for rung in rungs} == {"exact", "exact (8-bit optimizer)", "exact (LoRA)", "exact (QLoRA)", "approximate"}


def test_what_streaming_alone_has_is_off_where_tokens_are_sought_in_its_place(arguments):
    """On a CPU the setting is refused; the rungs are those of a card."""
    args = arguments(sequence_chunk_size=512, keep_attention_outputs=True)
    args.kv_offload = True
    rungs = ladder(Run(args, 1, 2048, lora_rank=4, four_bits=True))
    sought = [rung for rung in rungs if not rung.is_exact]
    assert sought and all(rung.changes["kv_offload"] is rung.changes["keep_attention_outputs"] is False for rung in sought)
    assert not any("kv_offload" in rung.changes for rung in rungs if rung.is_exact)


def test_no_rung_builds_on_one_that_is_missing(arguments, monkeypatch):
    run = Run(arguments(per_device_train_batch_size=2), 2, 2048)
    assert any("8bit" in str(rung.changes) for rung in ladder(run)) and ladder(run)[-1].changes["load_in_4bit"]
    monkeypatch.setattr("hf_memtune.levers.offers.find_spec", lambda name: None)
    rungs = ladder(run)
    assert [rung.name for rung in rungs if rung.missing] == ["8-bit optimizer state", "QLoRA, weights in 4 bits"]
    assert not [rung for rung in rungs if not rung.missing and ("8bit" in str(rung.changes) or "load_in_4bit" in rung.changes)]
    assert rungs[-1].changes["lora_r"] and rungs[-1].changes["token_seeking"]
    assert {rung.gradient for rung in rungs if not rung.missing} == {"exact", "exact (LoRA)", "approximate"}


def test_every_rung_is_settings_that_hold_together(arguments):
    model, rungs = {"lora_r", "load_in_4bit"}, ladder(Run(arguments(per_device_train_batch_size=2), 2, 256))
    assert rungs
    for rung in rungs:
        arguments(**{"per_device_train_batch_size": 2} | {name: value for name, value in rung.changes.items() if name not in model})


@pytest.mark.parametrize(
    "given, absent",
    [
        ({"token_seeking": True}, ("streaming", "logit-free", "token seeking, ratio 0.5", "token seeking, ratio 0.3")),
        ({"reversible": "centred"}, ("streaming", "logit-free", "activation checkpointing")),
        ({"sequence_chunk_size": 64}, ("streaming", "logit-free")),
        ({"activation_checkpointing": True}, ("activation checkpointing",)),
        ({"optim": "sgd"}, ("8-bit",)),
        ({"per_device_train_batch_size": 1}, ("micro-batch",)),
    ],
)
def test_what_is_given_is_no_rung(given, absent, arguments):
    args = arguments(**given)
    names = [rung.name for rung in ladder(Run(args, args.per_device_train_batch_size, 1024))]
    assert not [name for name in names if name.startswith(absent)]
    assert len(names) > 2


@pytest.mark.parametrize("rows, expected", [(3, [(1, 3)]), (6, [(3, 2), (1, 6)]), (8, [(4, 2), (2, 4), (1, 8)])])
def test_smaller_micro_batches_have_as_many_rows_in_a_step(rows, expected, arguments):
    offered = [offer.changes for offer in smaller_micro_batches(Run(arguments(), rows))]
    assert [(each["per_device_train_batch_size"], each["gradient_accumulation_steps"]) for each in offered] == expected


def test_adapters_that_are_there_are_no_rung(arguments):
    names = [rung.name for rung in ladder(Run(arguments(), 8, 64, lora_rank=8, four_bits=True))]
    assert not [name for name in names if "LoRA" in name]
    assert not [rung for rung in ladder(Run(arguments(token_seeking=True), 8, 64)) if rung.is_exact]
