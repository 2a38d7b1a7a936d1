"""The pass over all tokens without gradient, chunk by chunk, that leaves keys and values behind for the passes after it."""

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_memtune.core.rng import RandomTape
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.overrides import evaluating, not_checkpointing
from hf_memtune.methods.attention.passes import ContextPass, Records
from hf_memtune.methods.attention.positions import at_positions

if TYPE_CHECKING:
    from hf_memtune.methods.installed import InstalledStrategy


def context_pass(
    strategy: "InstalledStrategy",
    call: BodyCall,
    store: KeyValueStore,
    records: Records,
    chunk: int,
    chunks: range,
    tape: RandomTape | None = None,
    keep_output: bool = False,
    encoded: Tensor | None = None,
    together: int = 1,
) -> Tensor | None:
    """Run the chunks with these numbers, each `chunk` tokens of every row, storing keys and values.

    tape: dropout stays on, and the random state at the beginning of each chunk is kept on it, for a pass that runs the chunk
    again; without one, dropout is off. encoded: the output of the encoder, where there is one and it is known. together: how many
    chunks may run at once, after the first, if no random numbers are drawn, whose order would be another. Returns the last hidden
    states (B, tokens of all chunks, D) if they are to be kept.
    """
    length, outputs = call.rows["decoder"].length, []
    base = strategy.architecture.base
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(not_checkpointing(base) if tape else evaluating(base))
        stack.enter_context(records.of_last_blocks(strategy.architecture) if records.wanted else nullcontext())
        number, count = chunks.start, 1
        while number < chunks.stop:
            if tape is not None:
                tape.record(number)
            spans = {name: rows.whole() for name, rows in call.rows.items()}
            spans["decoder"] = call.rows["decoder"].chunk(number * chunk, min((number + count) * chunk, length))
            running = ContextPass(spans, store, strategy.places, records, strategy.kernel_knows_causal)
            with strategy.running(running), at_positions(strategy.architecture, call, spans):
                output = call.forward(**call.at(spans, encoded)).last_hidden_state
            if together > 1 and tape is not None and tape.has_moved(number):
                together = 1
                if count > 1:  # each of these chunks will run again by itself, and must draw what it drew here
                    tape.replay(number)
                    count = 1
                    continue
            if keep_output:
                outputs.append(output)
            number += count
            count = min(together, chunks.stop - number)
    return torch.cat(outputs, dim=1) if outputs else None
