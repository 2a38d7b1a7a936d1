"""The pass over all tokens without gradient, chunk by chunk, that leaves keys and values behind for the passes after it."""

from contextlib import ExitStack, nullcontext

import torch

from hf_memtune.core.rng import RandomTape
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.outputs import BodyOutputs
from hf_memtune.methods.attention.passes import ContextPass, Records
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.overrides import evaluating, not_checkpointing


def context_pass(
    router: Router,
    call: BodyCall,
    store: KeyValueStore,
    records: Records,
    chunk: int,
    chunks: range,
    into: BodyOutputs,
    tape: RandomTape | None = None,
    together: int = 1,
) -> None:
    """Run the chunks with these numbers, each `chunk` tokens of every row, storing keys and values.

    tape: dropout stays on, and the random state at the beginning of each chunk is kept on it, for a pass that runs the chunk
    again; without one, dropout is off. into: what keeps the outputs. together: how many chunks may run at once, after the first, if no
    random numbers are drawn, whose order would be another.
    """
    length = call.decoder.length
    base = router.architecture.base
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(not_checkpointing(base) if tape else evaluating(base))
        stack.enter_context(records.of_last_blocks(router.architecture) if records.wanted else nullcontext())
        number, count = chunks.start, 1
        while number < chunks.stop:
            if tape is not None:
                tape.record(number)
            spans = {name: rows.whole() for name, rows in call.rows.items()}
            spans["decoder"] = call.decoder.chunk(number * chunk, min((number + count) * chunk, length))
            running = ContextPass(spans, store, router.places, records, router.kernel_knows_causal)
            with router.running(running), at_positions(router.architecture, call, spans):
                output = call.forward(**call.at(spans))
            if together > 1 and tape is not None and tape.has_moved(number):
                together = 1
                if count > 1:  # each of these chunks will run again by itself, and must draw what it drew here
                    tape.replay(number)
                    count = 1
                    continue
            into.put(output, spans["decoder"])
            number += count
            count = min(together, chunks.stop - number)
