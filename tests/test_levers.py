"""The table of levers: what is on can be taken out, what is offered can be taken, and what did nothing is named."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_memtune import MemEfficientTrainingArguments
from hf_memtune.levers.facts import Run, Seen
from hf_memtune.levers.table import (
    LEVERS,
    REVERSIBLE,
    idle_levers,
    least_offers,
    offers_of,
    refusals,
    refusals_of_arguments,
    written_levers,
)

ON = {
    "sequence_chunk_size": {"sequence_chunk_size": 8},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "optim": {"optim": "adamw_8bit"},
    "token_seeking": {"token_seeking": True},
    "checkpoint_levels": {"checkpoint_levels": 2},
    "reversible": {"reversible": "centred"},
}
WORKED = Seen(
    True, recomputed=3, chunks=2, seen=40, kept=4, row_length=20, longest_row=20, host_bytes=8,
    optimizer_state={torch.nn.Parameter(torch.zeros(5000)): {"state1": torch.zeros(5000, dtype=torch.uint8)}},
)  # fmt: skip
OF_THE_COMMAND = {"lora_r", "load_in_4bit"}


@pytest.fixture
def arguments(tmp_path):
    return partial(MemEfficientTrainingArguments, str(tmp_path), use_cpu=True, report_to=[])


def changed(args, changes):
    found = copy.copy(args)
    vars(found).update(changes)
    return found


@pytest.mark.parametrize("name", ON)
def test_what_is_on_is_seen_written_and_taken_out(arguments, name):
    args = arguments(**ON[name])
    (lever,) = [lever for lever in LEVERS if lever.is_on(args)]
    assert lever.name == name and lever.written(args)
    assert not [lever for lever in LEVERS if lever.is_on(arguments())]
    if lever is not REVERSIBLE:
        assert not lever.is_on(changed(args, lever.off(args)))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, []),
        ({"sequence_chunk_size": 8, "activation_checkpointing": True}, ["activation_checkpointing", "sequence_chunk_size=8"]),
        ({"token_seeking": True}, ["token_seeking, token_ratio=0.3, token_gradient=cut"]),
        (
            {"token_seeking": True, "token_scorer": "context", "token_gradient": "skip"},
            ["token_seeking, token_ratio=0.3, token_scorer=context, token_gradient=skip, sequence_chunk_size=64"],
        ),
    ],
)
def test_a_run_is_described_by_what_is_on(arguments, settings, expected):
    assert written_levers(arguments(**settings)) == expected


def test_what_lies_in_host_memory_is_said(arguments):
    for settings in ({"sequence_chunk_size": 8}, {"token_seeking": True, "token_gradient": "stream"}):
        streamed = arguments(**settings)  # on the CPU the setting is refused
        assert [f"{written}, kv_offload" for written in written_levers(streamed)] == written_levers(changed(streamed, {"kv_offload": True}))
    assert not written_levers(changed(arguments(), {"kv_offload": True}))


@pytest.mark.parametrize("name", ON)
def test_what_acted_is_not_named_and_what_did_not_is(arguments, name):
    args = arguments(**ON[name])
    assert not list(idle_levers(args, WORKED))
    nothing = replace(
        WORKED, recomputed=0, chunks=1, kept=40, optimizer_state={torch.nn.Parameter(torch.zeros(5000)): {"m": torch.zeros(5000)}}
    )
    (idle,) = idle_levers(args, nothing)
    assert idle.message.startswith(name) and not idle.is_short
    assert not list(idle_levers(arguments(), nothing))


def test_short_rows_are_told_apart(arguments):
    short = replace(WORKED, chunks=1, row_length=6, longest_row=6)
    (idle,) = idle_levers(arguments(sequence_chunk_size=8), short)
    assert idle.is_short


@pytest.mark.parametrize(
    "more, saved",
    [
        ({}, "so only the logits are saved."),
        ({"activation_checkpointing": True}, "so the logits are saved, and what activation_checkpointing saves."),
    ],
)
def test_what_one_chunk_saves_is_said(arguments, more, saved):
    """Sibling: a row that is longer than a chunk should have run in several."""
    args = arguments(sequence_chunk_size=8, **more)
    (short,) = idle_levers(args, replace(WORKED, chunks=1, row_length=6, longest_row=6))
    assert saved in short.message and "leave it out" not in short.message
    (long,) = idle_levers(args, replace(WORKED, chunks=1))
    assert "leave it out" in long.message and "logits" not in long.message


def test_rows_of_one_chunk_have_nothing_to_offload(arguments):
    """The first batch may be short: training goes on. Sibling: longer rows of which nothing was moved."""
    args = changed(arguments(sequence_chunk_size=8), {"kv_offload": True})
    short = replace(WORKED, is_longest=False, chunks=1, row_length=6, longest_row=6, host_bytes=0)
    assert all(idle.is_short for idle in idle_levers(args, short)) and list(idle_levers(args, short))
    assert [idle.is_short for idle in idle_levers(args, replace(WORKED, host_bytes=0))] == [False]


def test_a_chunk_of_the_longest_row_is_meant_so(arguments):
    """It is the loss without logits. A longer chunk, or that of a first batch, is told."""
    row = replace(WORKED, chunks=1, row_length=8, longest_row=8)
    assert not list(idle_levers(arguments(sequence_chunk_size=8), row))
    assert list(idle_levers(arguments(sequence_chunk_size=9), row)) and list(
        idle_levers(arguments(sequence_chunk_size=8), replace(row, is_longest=False))
    )


def test_adapters_are_judged_by_what_is_in_the_model(arguments):
    whole = replace(WORKED, has_adapters=True, trained=10, total=10)
    assert [idle.message[:5] for idle in idle_levers(arguments(), whole)] == ["peft:"]
    assert not list(idle_levers(arguments(), replace(whole, trained=1)))


def test_an_offer_that_is_taken_is_not_made_again(arguments):
    args = arguments(per_device_train_batch_size=4)
    run = Run(args, 4, 2048)
    for offer in least_offers(run):
        changes = {name: value for name, value in offer.changes.items() if name not in OF_THE_COMMAND}
        then = arguments(**{"per_device_train_batch_size": 4} | changes)
        ranks = {"lora_rank": offer.changes.get("lora_r", 0), "four_bits": offer.changes.get("load_in_4bit", False)}
        after = Run(then, then.per_device_train_batch_size, 2048, **ranks)
        assert offer.name not in [again.name for again in offers_of(after)]


@pytest.mark.parametrize(
    "optim, is_offered", [("adamw_torch", True), ("adamw_torch_fused", True), ("adamw_torch_8bit", False), ("sgd", False)]
)
def test_fewer_bits_are_offered_to_states_that_have_more(arguments, optim, is_offered):
    assert (
        any("optim" in offer.changes and "lora_r" not in offer.changes for offer in offers_of(Run(arguments(optim=optim), 4))) == is_offered
    )


def test_exact_offers_come_first(arguments):
    kinds = [offer.is_exact for offer in offers_of(Run(arguments(), 4, 2048))]
    assert kinds == sorted(kinds, reverse=True) and not all(kinds)


def test_a_problem_of_two_levers_is_named_once(arguments):
    args = changed(arguments(), {"token_seeking": True, "reversible": "centred", "torch_compile": True})
    assert [problem.split(":")[0] for problem in refusals_of_arguments(args)] == ["torch_compile"]
    assert not refusals_of_arguments(changed(args, {"torch_compile": False}))


@pytest.mark.parametrize("version, refused", [(1, True), (2, False)])
def test_streaming_alone_works_with_fsdp2(arguments, version, refused):
    args = changed(arguments(), {"fsdp": "full_shard", "fsdp_config": {"version": version}})
    levers = {lever.name: lever for lever in LEVERS if lever.sharded}
    assert bool(refusals(levers["sequence_chunk_size"], args)) == refused
    assert all(refusals(lever, args) for name, lever in levers.items() if name != "sequence_chunk_size")
