"""The pass over all tokens without gradient, chunk by chunk, that leaves keys and values behind for the passes after it."""

from contextlib import ExitStack, nullcontext

import torch

from hf_memtune.core.kept_attention import KeptAttention
from hf_memtune.core.recompute import forget_casts
from hf_memtune.core.rng import RandomTape
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.outputs import BodyOutputs
from hf_memtune.methods.attention.passes import ContextPass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.attention.spans import Chunks
from hf_memtune.methods.attention.states import States
from hf_memtune.methods.overrides import evaluating, not_checkpointing


def context_pass(
    router: Router,
    call: BodyCall,
    store: KeyValueStore,
    records: Records,
    chunks: Chunks,
    until: int,
    states: States,
    into: BodyOutputs,
    tape: RandomTape | None = None,
    together: int = 1,
    kept_attention: KeptAttention | None = None,
) -> None:
    """Run the chunks before number `until`, storing keys and values, and the states that the next one begins with.

    tape: dropout stays on, and the random state at the beginning of each chunk is kept on it, for a pass that runs the chunk
    again; without one, dropout is off. into: what keeps the outputs. together: how many chunks may run at once, after the first, if no
    random numbers are drawn, whose order would be another. kept_attention: what keeps the attention of the decoder to itself.
    """
    base = router.architecture.base
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(not_checkpointing(base) if tape else evaluating(base))
        stack.enter_context(records.of_last_blocks(router.architecture) if records.wanted else nullcontext())
        number, count = 0, 1
        while number < until:
            if tape is not None:
                tape.record(number)
            start, stop = chunks.bounds(number, count)
            spans = call.spans(call.decoder.chunk(start, stop))
            running = ContextPass(spans, store, router.places, records, router.kernel_facts, kept_attention)
            cache = states.begin(number, start, running)
            with router.running(running, cache), at_positions(router.architecture, call, spans):
                output = call.forward(**call.at(spans, running, cache=cache))
            states.end(number, cache)
            if together > 1 and tape is not None and tape.has_moved(number):
                together = 1
                if count > 1:  # each of these chunks will run again by itself, and must draw what it drew here
                    tape.replay(number)
                    count = 1
                    continue
            into.put(output, spans["decoder"])
            number += count
            count = min(together, until - number)
    forget_casts()
