"""The account of a step: every byte in a phase and a category, and a model that is as it was."""

import json
import weakref

import pytest
import torch

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.memory import CATEGORIES, LiveBytes, MemoryAccount, StepLedger
from hf_memtune.methods.events import Listener
from tests.support.tiny_models import batch_for, tiny_model

ROWS, TOKENS, LAYERS = 2, 32, 3
STORED = 2 * LAYERS * ROWS * TOKENS * 2 * 8 * 4  # keys and values of 2 key heads of 8, float32


def setting():
    model = tiny_model("llama", dtype=torch.float32)
    return model, batch_for(model, lengths=(TOKENS,) * ROWS), torch.optim.AdamW(model.parameters())


def plain(model, batch, optimizer):
    model(**batch, use_cache=False).loss.backward()
    optimizer.step()


class Streams(Listener):
    """Weak references to what the streams of a method store: keys and values when the forward pass is over, and sums."""

    def __init__(self):
        self.kept = []

    def context_begins(self, stored):
        self.stored = weakref.WeakMethod(stored)

    def context_ends(self):
        self.kept.append([weakref.ref(tensor) for tensor in self.stored()()])

    def chunk_ends(self):
        self.context_ends()

    def alive(self):
        return sum(tensor() is not None for tensors in self.kept for tensor in tensors)


def account_of_plain(**options):
    model, batch, optimizer = setting()
    plain(model, batch, optimizer)
    optimizer.zero_grad()
    with StepLedger(model, optimizer, list(batch.values()), **options) as ledger:
        plain(model, batch, optimizer)
    return ledger.account(), model, batch


def test_the_peak_is_that_of_live_bytes():
    model, batch, optimizer = setting()
    plain(model, batch, optimizer)
    optimizer.zero_grad()
    with LiveBytes() as live:
        states = [t for state in optimizer.state.values() for t in state.values()]
        live.track([model, *batch.values(), *states])
        plain(model, batch, optimizer)
    account, *_ = account_of_plain()
    assert account.peak_bytes == live.peak_bytes
    assert account.peak_bytes == max(point.live_bytes for point in account.timeline)


def test_residents_are_counted_to_the_byte():
    account, model, batch = account_of_plain()
    found = account.phase("optimizer").by_category
    parameters = sum(p.nbytes for p in model.parameters())
    assert found["weights"] == parameters + sum({id(b): b.nbytes for b in model.buffers()}.values())
    assert found["gradients"] == parameters
    assert found["optimizer_state"] == 2 * parameters + 4 * len(list(model.parameters()))  # two moments, and a count of steps each
    assert found["batch"] == sum(t.nbytes for t in batch.values())
    assert found["stored_kv"] == found["logits"] == 0


def test_every_phase_has_every_category_and_they_add_up():
    account, *_ = account_of_plain()
    assert [phase.phase for phase in account.phases] == ["forward", "backward", "optimizer"]
    for phase in account.phases:
        assert set(phase.by_category) == set(CATEGORIES) and sum(phase.by_category.values()) == phase.peak_bytes


def test_logits_are_told_by_the_vocabulary():
    account, model, _ = account_of_plain()
    one = ROWS * TOKENS * model.config.vocab_size * 4
    assert account.phase("backward").by_category["logits"] in (2 * one, 3 * one, 4 * one)
    other, *_ = account_of_plain(vocab_size=10**6)
    assert other.peak_bytes == account.peak_bytes and not any(phase.by_category["logits"] for phase in other.phases)


def test_stored_keys_and_values_are_told():
    model, batch, _ = setting()
    with Streaming(model, StreamingConfig(sequence_chunk_size=8)) as streaming:
        with StepLedger(model, None, list(batch.values())) as ledger:
            ledger.watch(streaming)
            model(**batch).loss.backward()
        account = ledger.account()
        owed = STORED * (TOKENS - 8) // TOKENS  # to all but the last chunk
        assert account.phase("context_pass").by_category["stored_kv"] == STORED  # there is room for all tokens from the first chunk on
        assert account.phase("forward").by_category["stored_kv"] == STORED
        assert account.phase("backward").by_category["stored_kv"] == STORED + owed
        assert not streaming.listeners._all  # a closed ledger is told nothing any more


def test_unwatched_keys_and_values_are_not_told():
    """The sibling: what is stored is known from the method alone, and from nothing else."""
    model, batch, _ = setting()
    with Streaming(model, StreamingConfig(sequence_chunk_size=8)), StepLedger(model, None, list(batch.values())) as ledger:
        model(**batch).loss.backward()
    assert [phase.phase for phase in ledger.account().phases] == ["forward", "backward"]
    assert not any(phase.by_category["stored_kv"] for phase in ledger.account().phases)


def test_what_lives_from_forward_to_backward_is_saved():
    """Of a stream the hidden states of all tokens, their gradient, and the graph of the last chunk."""
    model, batch, _ = setting()
    with Streaming(model, StreamingConfig(sequence_chunk_size=8)) as streaming, StepLedger(model, None, list(batch.values())) as ledger:
        ledger.watch(streaming)
        outputs = model(**batch)
        saved_of_context = ROWS * TOKENS * 32 * 4
        outputs.loss.backward()
    context, forward, _ = (phase.by_category["saved_activations"] for phase in ledger.account().phases)
    assert saved_of_context <= context < 1.1 * saved_of_context  # and masks of the last chunk's length
    assert forward > context + ROWS * 8 * 12 * 48 * 4  # the MLPs of the last chunk, in 3 layers


def test_nothing_stored_outlives_the_step():
    model, batch, optimizer = setting()
    with Streaming(model, StreamingConfig(sequence_chunk_size=8)) as streaming:
        streaming.listeners.add(streams := Streams())
        with StepLedger(model, optimizer, list(batch.values())) as ledger:
            ledger.watch(streaming)
            outputs = model(**batch)
            assert streams.alive() == 2 * LAYERS
            outputs.loss.backward()
            assert len(streams.kept) == 1 + TOKENS // 8 and len(streams.kept[1]) == 4 * LAYERS
            assert streams.alive() == 0  # though the outputs are held


def test_the_ledger_changes_nothing():
    def gradients(watched):
        model, batch, optimizer = setting()
        hooks = count_hooks(model)
        if watched:
            with StepLedger(model, optimizer, list(batch.values())):
                model(**batch).loss.backward()
                assert count_hooks(model) > hooks
        else:
            model(**batch).loss.backward()
        assert count_hooks(model) == hooks and not optimizer._optimizer_step_pre_hooks
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False)))


def count_hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_tensors_at_the_peak_have_the_names_of_their_modules():
    account, *_ = account_of_plain()
    names = {(tensor.name, tensor.category) for tensor in account.tensors}
    assert ("model.layers.0.mlp.gate_proj", "saved_activations") in names
    sizes = [tensor.n_bytes for tensor in account.tensors]
    assert sizes == sorted(sizes, reverse=True)


def test_a_phase_can_be_set_by_hand():
    model, batch, _ = setting()
    with StepLedger(model, None, list(batch.values())) as ledger, ledger.phase("evaluation"), torch.no_grad():
        model(**batch)
    account = ledger.account()
    assert account.phase("evaluation").peak_bytes > account.phase("forward").peak_bytes
    with pytest.raises(KeyError):
        account.phase("backward")


def test_an_account_goes_through_json():
    account, *_ = account_of_plain()
    assert MemoryAccount.from_dict(json.loads(json.dumps(account.to_dict()))) == account
