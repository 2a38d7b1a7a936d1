"""Before the first step: does a pass over some tokens among the stored ones give, on this very model, what the model itself computes?"""

import torch
from torch import Tensor

from hf_memtune.core.selection import Selection
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.passes import FocusPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.seeking.last_block import LastBlock

KEPT = (1, 4, 6)
# Relative to the size of the hidden states: kernels sum in another order for other shapes, and models called in float64 may
# compute a part of themselves in float32.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
FAILURES = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError)
OTHER_SCORERS = "Choose token_scorer=context or random, or combined with gradient_weight=0."


def problem_of_parts(router: Router, call: BodyCall, store: KeyValueStore, full: Tensor) -> str | None:
    """What is wrong with the hidden states of a pass over some tokens, against those of the full forward (1, T, D); None: nothing."""
    index = torch.tensor([KEPT], device=call.rows["decoder"].positions.device)
    selection = Selection(index, torch.ones_like(index, dtype=torch.bool), (len(KEPT),), call.decoder.length)
    spans = call.spans_of(dict.fromkeys(router.architecture.stacks, selection))
    focus = FocusPass(spans, store, router.places)
    try:
        with router.running(focus), at_positions(router.architecture, call, spans):
            kept = router.architecture.base(**call.at(spans, focus)).last_hidden_state
        deviation = deviation_of(kept, selection.gather(full))
    except FAILURES as error:
        return f"cannot run on a part of its tokens alone ({error}): something in it takes them for neighbours"
    if deviation <= _allowed(full):
        return None
    return (
        f"has other hidden states in a pass over {len(KEPT)} of {call.decoder.length} tokens: they differ from those of the full forward by "
        f"{deviation:.1e} (relative), expected at most {_allowed(full):.0e}. Something in it depends on the neighbours of a token outside attention"
    )


def problem_of_last_block(router: Router, call: BodyCall, store: KeyValueStore, records: Records, full: Tensor) -> str | None:
    """Whether the last block, run alone on its recorded input, gives what the full forward gave."""
    try:
        deviation = deviation_of(LastBlock(router, call, records, store, call.decoder.length).output(), full)
    except Exception as error:
        found = f"it fails with {type(error).__name__}: {error}"
    else:
        if deviation <= _allowed(full):
            return None
        found = f"its output differs by {deviation:.1e} (relative)"
    return (
        f"{router.architecture.name}: the last block cannot run alone on its recorded input ({found}), which gradient scores and token "
        f"losses need. {OTHER_SCORERS}"
    )


def _allowed(like: Tensor) -> float:
    return _TOLERANCE.get(like.dtype, 1e-3)


def deviation_of(found: Tensor, expected: Tensor) -> float:
    """Size of the difference, relative to that of the hidden states."""
    return ((found - expected).double().norm() / expected.double().norm().clamp_min(1e-12)).item()
