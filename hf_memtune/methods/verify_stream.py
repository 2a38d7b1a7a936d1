"""Before the first step: does a stream of chunks give, on this very model, the gradient of plain backpropagation?"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hf_memtune.architectures import is_sharded, tables
from hf_memtune.architectures.trials import computing_dtypes
from hf_memtune.core.graph import leaf_of, nodes_behind
from hf_memtune.core.replay import replayed
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.followed import made_template
from hf_memtune.methods.streaming.chunk_stream import ChunkStream, Means
from hf_memtune.methods.streaming.encoder import encode
from hf_memtune.methods.verify_parts import FAILURES, deviation_of

CHUNK = 3
# Relative to the size of the gradient: parts of models compute in float32 whatever they are called in, and sum in another order.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_FAILURES = (MemTuneError, *FAILURES)


def verify_stream(router: Router, call: BodyCall) -> None:
    """Compare the gradients of the embeddings of the probe's tokens. `router` then follows layers in the way that gives the right one.

    Raises UnsupportedModelError where none does.
    """
    if is_sharded(router.architecture.base):
        return  # FSDP2 lets no part of a model go backward by itself
    _require_embedding_by_token(router, call)
    make = partial(_by_chunks, router)
    with _probing(router, call) as foreign:
        embedded, expected = _plain(router, call, foreign)
        if expected is None:  # this body looks at more than the embeddings of its tokens
            _compare_forward(router, call)
            return
        problem = _problem(router, embedded, expected, make)
        if problem is not None and (by_hand := _all_by_hand(router, call)) is not None:
            earlier = router.cache
            router.follow_by(by_hand)
            if _problem(router, embedded, expected, make) is None:
                return
            router.follow_by(earlier)
    if problem is not None:
        raise UnsupportedModelError(f"{router.architecture.name} {problem}. {_reason(router)} {tables.REMEDY}")


def _require_embedding_by_token(router: Router, call: BodyCall) -> None:
    """Refuse an embedding that makes something else of a part of a row: what comes after it is compared on what it has made of a whole one."""
    embedding, ids = router.architecture.base.get_input_embeddings(), call.input_ids("decoder")
    assert ids is not None  # a probe has them
    with torch.no_grad():
        whole, parts = embedding(ids), torch.cat([embedding(part) for part in ids.split(CHUNK, dim=1)], dim=1)
    if whole.shape != parts.shape or not deviation_of(parts, whole) <= _allowed(router, whole):
        raise UnsupportedModelError(
            f"{router.architecture.name}: its embedding ({type(embedding).__name__}, with its hooks) gives tokens other vectors in chunks of {CHUNK} than "
            f"in a whole row: it looks at where they are, or at their neighbours. {tables.REMEDY}"
        )


def problem_of(router: Router, call: BodyCall, make: Callable[[BodyCall], ChunkStream]) -> str | None:
    """What is wrong with the gradient that the stream which `make` makes of a call finds; None: nothing, or it cannot be told."""
    with _probing(router, call) as foreign:
        embedded, expected = _plain(router, call, foreign)
        return None if expected is None else _problem(router, embedded, expected, make)


Foreign = list[tuple[Tensor, Tensor | None]]
"""Tensors that the body learns and does not own, a vector that a hook adds for one, and the gradient that each had."""


@contextmanager
def _probing(router: Router, call: BodyCall) -> Iterator[Foreign]:
    device, foreign = call.decoder.positions.device, Foreign()
    try:
        with _frozen(router.architecture.base), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield foreign
    finally:
        for tensor, gradient in foreign:
            tensor.grad = gradient


def _by_chunks(router: Router, call: BodyCall) -> ChunkStream:
    return ChunkStream(Means(router, CHUNK), call)


def _plain(router: Router, call: BodyCall, foreign: Foreign) -> tuple[BodyCall, Tensor | None]:
    """The call on embeddings in place of ids, and its gradient without a stream. foreign: what else it learns; without a gradient from here on."""
    architecture = router.architecture
    prefix = "decoder_" if architecture.is_encoder_decoder else ""
    embedded = architecture.base.get_input_embeddings()(call.input_ids("decoder")).detach().requires_grad_()
    arguments = {name: value for name, value in call.arguments.items() if name != f"{prefix}input_ids"}
    arguments |= {f"{prefix}inputs_embeds": embedded}
    try:
        with router.plain():
            plain = architecture.base.forward(**arguments | {"use_cache": False}).last_hidden_state
        for tensor in map(leaf_of, nodes_behind([plain])):
            if tensor is not None and tensor is not embedded:
                foreign.append((tensor, tensor.grad))
                tensor.grad = None
        (gradient,) = torch.autograd.grad(plain, embedded, _toward(plain))
    except _FAILURES:
        return call, None
    return BodyCall(architecture, architecture.base.forward, (), arguments), gradient


def _toward(hidden: Tensor) -> Tensor:
    return torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view(hidden.shape).to(hidden.dtype)


def _problem(router: Router, call: BodyCall, expected: Tensor, make: Callable[[BodyCall], ChunkStream]) -> str | None:
    """What is wrong with the gradient that a stream finds; None: nothing."""
    again = BodyCall(router.architecture, call.forward, (), call.given)
    try:
        stream = make(encode(again))
        stream.run_forward(Records({}, wanted=False))
        stream.run_last()
        hidden = replayed(stream)[0]
        (found,) = torch.autograd.grad(hidden, again.inputs[0], _toward(hidden))
    except _FAILURES as error:
        return f"cannot run on a part of its tokens ({error})"
    deviation = deviation_of(found, expected)
    allowed = _allowed(router, expected)
    if deviation <= allowed:
        return None
    tokens = call.decoder.length
    return (
        f"has another gradient in chunks: that of {tokens} tokens in chunks of {CHUNK} differs from that of plain backpropagation by "
        f"{deviation:.1e} (relative), expected at most {allowed:.0e}"
    )


def _compare_forward(router: Router, call: BodyCall) -> None:
    """The hidden states alone, by chunks and plain."""
    with torch.no_grad():
        with router.plain():
            expected = router.architecture.base.forward(**call.arguments | {"use_cache": False}).last_hidden_state
        stream = ChunkStream(Means(router, CHUNK), encode(call), keeps_last=False)
        try:
            stream.run_forward(Records({}, wanted=False))
        except _FAILURES as error:
            raise UnsupportedModelError(
                f"{router.architecture.name} cannot run on a part of its tokens ({error}). {tables.REMEDY}"
            ) from error
        found = stream.take_outputs()[0]
    if found.shape != expected.shape or not (deviation := deviation_of(found, expected)) <= _allowed(router, expected):
        seen = (
            f"differ by {deviation:.1e} (relative)"
            if found.shape == expected.shape
            else f"are {tuple(found.shape)}, not {tuple(expected.shape)}"
        )
        raise UnsupportedModelError(
            f"{router.architecture.name} has other hidden states in chunks: they {seen}. {_reason(router)} {tables.REMEDY}"
        )


def _allowed(router: Router, like: Tensor) -> float:
    """By the coarsest of the numbers that the body computes in."""
    return max(TOLERANCE.get(dtype, 0.0) for dtype in {like.dtype, *computing_dtypes(router.architecture.base)})


def _all_by_hand(router: Router, call: BodyCall):
    """The way for attention that makes more of its keys and values than the interface tells: all of them through the cache."""
    try:
        with torch.no_grad():
            template = made_template(router.architecture, call)
    except _FAILURES:
        return None
    if template is None or template.odd is not None:
        return None
    layers = range(len(router.architecture.decoder.layers))
    template.by_hand.update(number for number in layers if template.attends(number))
    return template if template.by_hand else None


def _reason(router: Router) -> str:
    if router.cache is not None and router.cache.has_states:
        return (
            "Some of its layers do not begin with what they are given of earlier tokens (the scan of Mamba-1 takes no state, for one), so that their "
            "rows cannot be cut."
        )
    return "Something in it depends on earlier tokens outside attention and the states of its layers."


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """While open, no parameter wants a gradient."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
