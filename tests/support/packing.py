"""What the tests of packing share with others."""

import torch

from tests.support.tiny_models import VOCABULARY

SEGMENTS = ((5, 8), (4, 6, 3))  # two rows of 13 tokens


def packed_batch(segments=SEGMENTS):
    """Rows of sequences; the first token of each has no label, or the last of the one before would predict it.

    Transformers looks for packed rows only where it makes no cache, and for training the Trainer turns the cache off.
    """
    torch.manual_seed(3)
    ids = torch.randint(5, VOCABULARY, (len(segments), sum(segments[0])))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in segments])
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100), "use_cache": False}


def unpacked(batch, segments=SEGMENTS):
    """The same sequences, one a row of its own."""
    for row, lengths in enumerate(segments):
        for part in batch["input_ids"][row].split(lengths):
            yield {"input_ids": part[None], "labels": part[None]}
