"""Before the first step: does ditching give, on this very model, what the model itself computes?

One short probe, instead of a list of models that are said to work: a context pass and a focus pass over a few tokens must
give the hidden states that a plain forward has at those tokens, and a stream of chunks the gradient of a plain backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers.masking_utils import bidirectional_mask_function
from transformers.modeling_outputs import BaseModelOutput

from hf_memtune._compat import is_fake, with_values
from hf_memtune.architectures import Architecture, tables
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import ContextPass
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.followed import cache_template
from hf_memtune.methods.overrides import evaluating, forward_as
from hf_memtune.methods.verify_packing import packs_by_positions
from hf_memtune.methods.verify_parts import FAILURES, OTHER_SCORERS, problem_of_last_block, problem_of_parts
from hf_memtune.methods.verify_stream import verify_stream

PROBE_TOKENS, PROBE_ENCODED = 8, 5


class _ProbingPass(ContextPass):
    """A context pass that also notes which modules attended and whether any mask looks ahead."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attended: set[int] = set()
        self.looks_ahead = False

    def attend(self, module, query, key, value, mask, *args):
        self.attended.add(id(module))
        if key.shape[2] != self.spans[self.places.key_stack(module)].index.shape[1]:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends to {key.shape[2]} keys where there are {query.shape[2]} tokens: it puts some together, or its own "
                f"before them, so that a part of the tokens has not its part of the keys. {tables.REMEDY}"
            )
        if self.places.key_stack(module) == "decoder":
            rule = self.rule_of(mask, "decoder") if self.has_rules else bidirectional_mask_function  # of a mask that is written by hand
            self.looks_ahead |= _looks_ahead(rule, query)
        return super().attend(module, query, key, value, mask, *args)


def _looks_ahead(mask_function: Callable, like: Tensor) -> bool:
    """Whether a rule lets any of the tokens see a later one."""
    with with_values() if is_fake(like) else nullcontext():
        index, zero = torch.arange(PROBE_TOKENS, device=like.device), torch.zeros(1, 1, dtype=torch.long, device=like.device)
        seen = mask_function(zero, zero, index[:, None], index[None])
        return bool((seen & (index[None] > index[:, None])).any())


def verify(router: Router, check: bool = True, scores_last_block: bool | None = None, streams: bool = False) -> Facts:
    """Probe the model. Raises UnsupportedModelError, naming the model, the reason and the remedy.

    `check=False` skips comparisons of values, which traced tensors do not have. scores_last_block: whether the last block must be able to
    run alone; None: nobody will ask. streams: whether chunks of rows will go backward; else chosen tokens will.
    """
    _require_no_counting(router.architecture)
    try:
        return _verified(router, check, scores_last_block, streams)
    except MemTuneError:
        if not router.kernel_facts.stands_in:
            raise
    router.makes_masks = True  # its layers may read the masks that they are given, or change them
    router.follow_by(None)
    return _verified(router, check, scores_last_block, streams)


def _verified(router: Router, check: bool, scores_last_block: bool | None, streams: bool) -> Facts:
    architecture = router.architecture
    base = architecture.base
    with torch.no_grad(), evaluating(architecture.head_model):
        call = BodyCall(architecture, base.forward, (), probe_batch(architecture))
        store, records = KeyValueStore(), Records({})
        probing = _ProbingPass(call.spans(), store, router.places, records, router.kernel_facts)
        with explained(architecture), router.running(probing), records.of_last_blocks(architecture):
            body_output = type(base(**call.at(probing.spans, probing)))
        router.packs = packs_by_positions(router) if check and call.accepts_positions else True
        with explained(architecture):
            router.follow_by(cache_template(architecture, call, probing.attended))
        with router.plain():
            full = base(**call.arguments | {"use_cache": False}).last_hidden_state if check else None
        if full is not None and streams and not probing.looks_ahead:
            with explained(architecture):
                verify_stream(router, call)
        elif full is not None and router.cache is None:
            if problem := problem_of_parts(router, call, store, full):
                raise UnsupportedModelError(
                    f"{architecture.name} {problem}. {_instead(not probing.looks_ahead and _streams(router, call))}"
                )
        tail_problem = None
        if router.cache is not None and not router.cache.is_plain(len(architecture.decoder.layers) - 1):
            tail_problem = f"{architecture.name}: the last block needs what a cache hands on to it, and does not run alone. {OTHER_SCORERS}"
        elif full is not None and scores_last_block is not None:
            tail_problem = problem_of_last_block(router, call, store, records, full)
        needs_all = (
            None if router.cache is None else f"{router.cache.why_all_tokens}. {_instead(streams or (check and _streams(router, call)))}"
        )
        if tail_problem and scores_last_block and (streams or needs_all is None):
            raise UnsupportedModelError(tail_problem)
        try:
            plain_head, reads_body = _head_facts(architecture, call, body_output)
        except FAILURES:  # a head that wants more of the body's output than its last hidden state
            plain_head = reads_body = False
    is_causal = not architecture.is_encoder_decoder and not probing.looks_ahead
    return Facts(is_causal, not probing.looks_ahead, plain_head, reads_body, body_output, tail_problem, needs_all)


def _require_no_counting(architecture: Architecture) -> None:
    """Refuse experts that take no more tokens once they are full: the row of a probe is too short for that to be seen."""
    for name, module in architecture.base.named_modules():
        if hasattr(module, tables.CAPACITY_NAME):
            raise UnsupportedModelError(
                f"{architecture.name}: {name} ({type(module).__name__}) counts the tokens that each expert has got, up to {tables.CAPACITY_NAME}="
                f"{getattr(module, tables.CAPACITY_NAME)}: in a part of a row it would count anew. {tables.REMEDY}"
            )


def probe_batch(architecture: Architecture) -> dict[str, Tensor]:
    """A row of a few tokens, as the body takes it."""
    embedding = architecture.base.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    classes = min(embedding.shape[0], architecture.base.config.get_text_config().vocab_size)
    # away from the first ids, which are usually special: padding would change the positions of some models
    ids = torch.arange(PROBE_TOKENS, device=embedding.device)[None] % max(1, classes // 2) + classes // 2
    ids = ids.clamp_max(classes - 1)
    if architecture.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    if not architecture.follows_encoder:
        return {"input_ids": ids}
    shape = (1, PROBE_ENCODED, architecture.base.config.get_text_config().hidden_size)
    states = torch.linspace(-1, 1, shape[1] * shape[2], device=ids.device).view(shape)
    return {"input_ids": ids, "encoder_hidden_states": states.to(embedding.dtype if embedding.is_floating_point() else torch.float32)}


def _streams(router: Router, call: BodyCall) -> bool:
    """Whether a stream gives the gradient of plain backpropagation."""
    try:
        verify_stream(router, call)
    except UnsupportedModelError:
        return False
    return True


def _instead(streams: bool) -> str:
    """What to do with a model none of whose tokens can be left out. streams: whether it is known to stream."""
    if not streams:
        return tables.REMEDY
    return (
        "Set token_gradient=stream and sequence_chunk_size=512; or sequence_chunk_size without token_seeking, for exact gradients; or train with "
        "activation checkpointing alone."
    )


@contextmanager
def explained(architecture: Architecture) -> Iterator[None]:
    """A model that does not let its attention be routed fails somewhere inside: say what that means."""
    try:
        yield
    except (MemTuneError, torch.OutOfMemoryError, DataDependentOutputException, DynamicOutputShapeException):
        raise  # the last two: traced tensors have no values, which is nothing about the model
    except FAILURES as error:
        raise UnsupportedModelError(f"{architecture.name} cannot run on a part of its tokens: {error}. {_REMEDY}") from error


_REMEDY = f"What is computed for a part of the tokens would not be exact on it. {tables.REMEDY}"


def _of_model(architecture: Architecture, call: BodyCall) -> dict:
    """Arguments of the model for those of its body."""
    if not architecture.follows_encoder:
        return call.arguments
    encoded = BaseModelOutput(last_hidden_state=call.arguments["encoder_hidden_states"])
    return {"encoder_outputs": encoded, "decoder_input_ids": call.arguments["input_ids"]}


def _head_facts(architecture: Architecture, call: BodyCall, body_output: type) -> tuple[bool, bool]:
    """Whether the model returns the output of its linear head untouched (no softcap, scale or added bias), and whether that head
    is given the last hidden state untouched (masked language models transform it first)."""
    if architecture.output_head is None:
        return False, False
    marker, model = torch.zeros(1, 1, 1, device=architecture.output_head.weight.device), architecture.head_model
    hidden = torch.zeros(1, 1, architecture.base.config.get_text_config().hidden_size, dtype=model.dtype, device=marker.device)

    def body(*args, **kwargs):
        return body_output(last_hidden_state=hidden)

    given = []

    def head(hidden):
        given.append(hidden)
        return marker

    with forward_as(architecture.base, body), forward_as(architecture.output_head, head):
        plain = type(model).forward(model, **_of_model(architecture, call)).logits is marker
    # the same memory, since traced tensors have no values to compare
    return plain, bool(given) and given[0].untyped_storage()._cdata == hidden.untyped_storage()._cdata
