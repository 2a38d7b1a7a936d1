"""Steps whose keys, values and owed gradients are at home in host memory: the gradients are those without, bit for bit."""

import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core import pieces
from hf_memtune.core.offload import Fetched, HostTensor, OffloadedStore, OffloadedSums
from hf_memtune.methods.attention import passes
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from tests.support.stepping import lm_head, model_and_batch, seeking_on, step_on
from tests.support.tiny_models import batch_for
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import worst_difference

CHUNK, LENGTHS = 4, (13, 9)
NAMES = ["llama", "qwen2-sliding", "gpt2", "gemma2", "bart"]
STRATEGIES = ["exact", "stream", "skip"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def strategy_on(model, kind="exact", offload=True):
    """Also of checkpointed layers, whose inputs a stream by layers would offload: test_layer_order.py has these."""
    if kind == "exact":
        return Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK, kv_offload=offload, stream_order="chunks"))
    more = {"skip_threshold": 0.05} if kind == "skip" else {}
    return seeking_on(model, token_gradient=kind, sequence_chunk_size=CHUNK, kv_offload=offload, **more)


def step(model, batch, kind="exact", offload=True):
    with strategy_on(model, kind, offload) as strategy:
        return step_on(model, strategy, batch)


def made(name="llama", side="right", checkpointing=None, lora=False, dtype=torch.float64, **overrides):
    """A tiny model and its batch. checkpointing: None, or whether it is reentrant."""
    model, batch, _ = model_and_batch(name, side, lengths=LENGTHS, dtype=dtype, **overrides)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train(), batch


def same(found, expected) -> bool:
    """Bit for bit."""
    ours, theirs = found.gradients, expected.gradients
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def assert_same_as_without(model, batch, kind="exact"):
    stores, init = [], OffloadedStore.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadedStore, "__init__", _noting(init, stores))
        found = step(model, batch, kind)
        assert len(stores) == 1
        expected = step(model, batch, kind, offload=False)
        assert len(stores) == 1
    assert same(found, expected) and torch.equal(found.loss, expected.loss) and found.heard.chunks == expected.heard.chunks != [1]


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_without(name, checkpointing, dtype):
    assert_same_as_without(*made(name, checkpointing=checkpointing, dtype=dtype))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("name", ["llama", "qwen2-sliding", "gpt2"])
def test_so_they_are_with_lora_padding_and_seeking(name, checkpointing, kind, side):
    assert_same_as_without(*made(name, side, checkpointing, lora=True), kind)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_rows_without_padding_and_dropout(kind):
    """Without padding the first chunk needs no mask, and goes another way through the kernel; dropout is drawn again in each pass."""
    model, _ = made("llama", attention_dropout=0.0)
    assert_same_as_without(model, batch_for(model, lm_head("llama"), lengths=(13, 13)), kind)
    model, batch = made("gpt2", resid_pdrop=0.2, attn_pdrop=0.2)
    results = []
    for offload in (True, False):
        torch.manual_seed(3)
        results.append(step(model, batch, kind, offload))
    assert same(*results)


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("which", ["keys and values", "sums"])
def test_a_home_that_changes_between_passes_is_noticed(monkeypatch, kind, which):
    """What the comparisons above must notice: that the homes are really read."""
    model, batch = made()
    expected = step(model, batch, kind, offload=False)
    kinds = {"keys and values": OffloadedStore, "sums": OffloadedSums}
    send = HostTensor.send

    def corrupting(self, part, start):
        send(self, part + 0.1 * part.abs().max() if id(self) in homes() else part, start)

    strategy, opened = strategy_on(model, kind), []
    homes = lambda: {id(h) for s in opened for h in _homes_of(s, kinds[which])}  # noqa: E731
    monkeypatch.setattr(kinds[which], "__init__", _noting(kinds[which].__init__, opened))
    monkeypatch.setattr(HostTensor, "send", corrupting)
    found = step_on(model, strategy, batch)
    strategy.remove()
    assert opened and worst_difference(found.gradients, expected.gradients) > NOTICED


def _noting(init, opened):
    def run(self, *args):
        init(self, *args)
        opened.append(self)

    return run


def _homes_of(holder, kind) -> list[HostTensor]:
    homes = holder._homes.values()
    return [home for pair in homes for home in pair] if kind is OffloadedStore else list(homes)


# -- copies that arrive late -----------------------------------------------------------------------------------------


class Late:
    """The arrival of a copy, as late as can be: when the present stream waits for it."""

    def __init__(self, arrive):
        self.arrive, self.waited = arrive, 0

    def wait(self):
        if not self.waited:
            self.arrive()
        self.waited += 1


@pytest.fixture
def late(monkeypatch):
    """Copies that are fetched ahead are not there before they are waited for, as on CUDA."""
    made = []

    def fetch_ahead(self, start, stop):
        room = self._room(start, stop).fill_(torch.nan)
        made.append(Late(partial(self._copied, room, start)))
        return Fetched(room, made[-1])

    monkeypatch.setattr(HostTensor, "fetch_ahead", fetch_ahead)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=Late.wait))
    return made


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_copies_are_waited_for_before_they_are_used_and_before_they_are_dropped(late, monkeypatch, kind, checkpointing):
    monkeypatch.setattr(pieces, "BLOCK", 3)
    model, batch = made(checkpointing=checkpointing, num_hidden_layers=6)
    found, expected = step(model, batch, kind), step(model, batch, kind, offload=False)
    assert same(found, expected)
    del found
    assert len(late) > 6 and all(arrival.waited for arrival in late)


def test_a_copy_that_is_not_waited_for_is_noticed(late, monkeypatch):
    model, batch = made()
    monkeypatch.setattr(Fetched, "ready", lambda self: self._copy)
    monkeypatch.setattr(Fetched, "__del__", lambda self: None)  # waits, too
    assert any(gradient.isnan().any() for gradient in step(model, batch).gradients.values())


# -- what is on the device -------------------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch):
    """Weak references to the storages of all copies that were made on the device."""
    noted, fetch = [], HostTensor.fetch

    def noting(self, start, stop):
        found = fetch(self, start, stop)
        noted.append(weakref.ref(found.ready().untyped_storage()))
        return found

    monkeypatch.setattr(HostTensor, "fetch", noting)
    return noted


def most_alive_after_forward(model, batch, fetched) -> int:
    """Copies on the device when a chunk has gone forward, with gradient, and is about to go backward."""
    counts, run = [], ChunkStream._run

    def counting(self, *args, **kwargs):
        ran = run(self, *args, **kwargs)
        if model.training:  # and not in the probe before
            counts.append(sum(reference() is not None for reference in fetched))
        return ran

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkStream, "_run", counting)
        step(model, batch)
    assert len(counts) == 4
    return max(counts)


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])  # gemma2: attention of the model's own, which computes again in backward
def test_a_chunk_that_went_forward_leaves_nothing_on_the_device(name, checkpointing, fetched):
    model, batch = made(name, checkpointing=checkpointing)
    assert most_alive_after_forward(model, batch, fetched) == 0 and fetched


def test_what_autograd_saved_would_stay(monkeypatch, fetched):
    """The sibling: the count does see it."""
    monkeypatch.setattr(passes.ChunkPass, "prefix_of", lambda *args, **kwargs: None)
    monkeypatch.setattr(passes, "checkpoint", lambda run, *args, **kwargs: run(*args))
    model, batch = made("llama")
    assert most_alive_after_forward(model, batch, fetched) >= 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_on_the_device_do_not_grow_with_the_row(name, monkeypatch, fetched):
    """At any time of a step two blocks of keys and values are there, whatever the number of layers and tokens."""
    monkeypatch.setattr(pieces, "BLOCK", 3)
    counts, fetch = [], HostTensor.fetch

    def counting(self, start, stop):
        found = fetch(self, start, stop)
        counts.append(sum(reference() is not None for reference in fetched))
        return found

    monkeypatch.setattr(HostTensor, "fetch", counting)
    model, batch = made(name, num_hidden_layers=6)
    step(model, batch)
    assert max(counts) <= 2 * 2 + 1  # and the sum that something is added to


@on_gpu
@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_on_a_gpu_copies_arrive_in_time(kind, checkpointing):
    """Several steps in a row, so that memory is used again while copies are on their way."""
    model, batch = made(checkpointing=checkpointing, num_hidden_layers=6)
    model, batch = model.cuda(), {name: value.cuda() for name, value in batch.items()}
    expected = step(model, batch, kind, offload=False)
    for _ in range(5):
        assert worst_difference(step(model, batch, kind).gradients, expected.gradients) <= tolerance(torch.float64)
