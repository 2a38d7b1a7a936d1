"""Before the first step: does ditching give, on this very model, what the model itself computes?

One short probe, instead of a list of models that are said to work: a context pass and a focus pass over a few tokens must
give the hidden states that a plain forward has at those tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from hf_memtune._compat import is_fake, with_values
from hf_memtune.architectures import Architecture, tables
from hf_memtune.core.selection import Selection
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import ContextPass, FocusPass, Records
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.overrides import evaluating, forward_as
from hf_memtune.methods.seeking.last_block import LastBlock

PROBE_TOKENS, PROBE_KEPT = 8, (1, 4, 6)
# Relative to the size of the hidden states: kernels sum in another order for other shapes, and models called in float64 may
# compute a part of themselves in float32.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


class _ProbingPass(ContextPass):
    """A context pass that also notes which modules attended and whether any mask looks ahead."""

    def __init__(self, *args):
        super().__init__(*args)
        self.attended: set[int] = set()
        self.looks_ahead = False

    def attend(self, module, query, key, value, mask, *args):
        self.attended.add(id(module))
        if self.places.key_stack(module) == "decoder":
            self.looks_ahead |= _looks_ahead(self.rule_of(mask, "decoder"), query)
        return super().attend(module, query, key, value, mask, *args)


def _looks_ahead(mask_function: Callable, like: Tensor) -> bool:
    """Whether a rule lets any of the tokens see a later one."""
    with with_values() if is_fake(like) else nullcontext():
        index, zero = torch.arange(PROBE_TOKENS, device=like.device), torch.zeros(1, 1, dtype=torch.long, device=like.device)
        seen = mask_function(zero, zero, index[:, None], index[None])
        return bool((seen & (index[None] > index[:, None])).any())


def verify(router: Router, check: bool = True, scores_last_block: bool | None = None) -> Facts:
    """Probe the model. Raises UnsupportedModelError, naming the model, the reason and the remedy.

    `check=False` skips the comparison of hidden states, which traced tensors do not have. scores_last_block: whether the last block must
    be able to run alone; None: nobody will ask.
    """
    architecture = router.architecture
    base = architecture.base
    with torch.no_grad(), evaluating(architecture.head_model):
        call = BodyCall(architecture, base.forward, (), _probe_batch(architecture))
        store, records = KeyValueStore(), Records({})
        probing = _ProbingPass({n: r.whole() for n, r in call.rows.items()}, store, router.places, records, router.kernel_knows_causal)
        with _explained(architecture), router.running(probing), records.of_last_blocks(architecture):
            body_output = type(base(**call.at(probing.spans)))
        _require_attention_everywhere(architecture, probing.attended)
        full = base(**call.arguments | {"use_cache": False}).last_hidden_state if check else None
        if check:
            _compare(router, call, store, full)
        tail_problem = _tail_problem(router, call, store, records, full) if check and scores_last_block is not None else None
        if tail_problem and scores_last_block:
            raise UnsupportedModelError(tail_problem)
        plain_head, reads_body = _head_facts(architecture, call, body_output)
    is_causal = not architecture.is_encoder_decoder and not probing.looks_ahead
    return Facts(is_causal, not probing.looks_ahead, plain_head, reads_body, body_output, tail_problem)


def _probe_batch(architecture: Architecture) -> dict[str, Tensor]:
    embedding = architecture.base.get_input_embeddings().weight
    classes = min(embedding.shape[0], architecture.base.config.get_text_config().vocab_size)
    # away from the first ids, which are usually special: padding would change the positions of some models
    ids = torch.arange(PROBE_TOKENS, device=embedding.device)[None] % max(1, classes // 2) + classes // 2
    ids = ids.clamp_max(classes - 1)
    return {"input_ids": ids, "decoder_input_ids": ids} if architecture.is_encoder_decoder else {"input_ids": ids}


def _require_attention_everywhere(architecture: Architecture, attended: set[int]) -> None:
    for stack in architecture.stacks.values():
        for number, layer in enumerate(stack.layers):
            if not any(id(module) in attended for module in layer.modules()):
                raise UnsupportedModelError(
                    f"{architecture.name}: layer {number} of its {stack.name} ({type(layer).__name__}) does not send its attention "
                    f"through transformers' attention interface. {tables.NO_ATTENTION_REMEDY}"
                )


def _compare(router: Router, call: BodyCall, store: KeyValueStore, full: Tensor) -> None:
    architecture = router.architecture
    index = torch.tensor([PROBE_KEPT], device=call.rows["decoder"].positions.device)
    selection = Selection(index, torch.ones_like(index, dtype=torch.bool), (len(PROBE_KEPT),), PROBE_TOKENS)
    spans = {name: rows.kept(selection) for name, rows in call.rows.items()}
    focus = FocusPass(spans, store, router.places)
    with _explained(architecture), router.running(focus), at_positions(architecture, call, spans):
        kept = architecture.base(**call.at(spans)).last_hidden_state
    deviation = _deviation(kept, selection.gather(full))
    if not deviation <= _TOLERANCE.get(full.dtype, 1e-3):
        raise UnsupportedModelError(
            f"{architecture.name}: the hidden states of a pass over {len(PROBE_KEPT)} of {PROBE_TOKENS} tokens differ from those of the "
            f"full forward by {deviation:.1e} (relative), expected at most {_TOLERANCE.get(full.dtype, 1e-3):.0e}. Something in it "
            f"depends on the neighbours of a token outside attention. {_REMEDY}"
        )


def _tail_problem(router: Router, call: BodyCall, store: KeyValueStore, records: Records, full: Tensor) -> str | None:
    """Whether the last block, run alone on its recorded input, gives what the full forward gave."""
    architecture = router.architecture
    try:
        deviation = _deviation(LastBlock(router, call, records, store, PROBE_TOKENS).output(), full)
    except Exception as error:
        found = f"it fails with {type(error).__name__}: {error}"
    else:
        if deviation <= _TOLERANCE.get(full.dtype, 1e-3):
            return None
        found = f"its output differs by {deviation:.1e} (relative)"
    return (
        f"{architecture.name}: the last block cannot run alone on its recorded input ({found}), which gradient scores and token "
        "losses need. Choose token_scorer=context or random, or combined with gradient_weight=0."
    )


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Size of the difference, relative to that of the hidden states."""
    return ((found - expected).double().norm() / expected.double().norm().clamp_min(1e-12)).item()


@contextmanager
def _explained(architecture: Architecture) -> Iterator[None]:
    """A model that does not let its attention be routed fails somewhere inside: say what that means."""
    try:
        yield
    except (MemTuneError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{architecture.name} cannot run on a part of its tokens: {error}. {_REMEDY}") from error


_REMEDY = f"What is computed for a part of the tokens would not be exact on it. {tables.REMEDY}"


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
        plain = type(model).forward(model, **call.arguments).logits is marker
    # the same memory, since traced tensors have no values to compare
    return plain, bool(given) and given[0].untyped_storage()._cdata == hidden.untyped_storage()._cdata
