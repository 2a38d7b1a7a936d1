"""What reversible layers keep for backward, in exact bytes."""

import pytest
import torch

from hf_memtune.memory import LiveBytes
from tests.support.reversible_models import COUPLINGS, inputs_of, model_of, reversible_of

# bits an element and layer: k of the centred coupling's 1/16, of MEFT's 1/8, and both of MEFT3's
STORED_BITS = {"centred": 4, "meft1": 3, "meft2": 3, "meft3": 6}


def live_after_forward(name, depth, coupling, numerics, dtype=torch.float32, dropout=0.0, **changed):
    """Bytes alive after the forward of a model's body, and elements of its hidden states."""
    model = model_of(name, dtype=dtype, dropout=dropout, num_hidden_layers=depth)
    batch = {key: value for key, value in inputs_of(name, model, length=12).items() if key != "labels"}
    if coupling is not None:
        reversible_of(model, coupling, numerics, adapter_init_std=0.02, **changed)
    elif numerics == "checkpointed":
        model.gradient_checkpointing_enable()
    with LiveBytes() as live:
        output = model.base_model(**batch)[0]
        return live.current_bytes, output.numel()


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_float_streams_do_not_grow_with_depth(coupling, name):
    (shallow, _), (deep, _) = (live_after_forward(name, depth, coupling, "float") for depth in (4, 12))
    assert shallow == deep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_exact_streams_grow_by_their_stored_bits(coupling, name, dtype):
    (shallow, elements), (deep, _) = (live_after_forward(name, depth, coupling, "exact", dtype) for depth in (4, 12))
    assert deep - shallow == 8 * elements * STORED_BITS[coupling] // 8


def test_ordinary_layers_grow_by_much_more():
    (shallow, elements), (deep, _) = (live_after_forward("llama", depth, None, "plain") for depth in (4, 12))
    assert deep - shallow > 8 * elements * 4 * 10


def test_the_layers_above_a_part_of_the_stack_grow_as_ever():
    (shallow, elements), (deep, _) = (live_after_forward("llama", depth, "centred", "float", reversible_layers=4) for depth in (4, 12))
    assert deep - shallow > 8 * elements * 4 * 8


def test_dropout_keeps_no_masks():
    """Generator states alone, 5 KB a layer, which the ledger does not see."""
    (shallow, elements), (deep, _) = (live_after_forward("bert", depth, "centred", "float", dropout=0.1) for depth in (4, 12))
    assert deep == shallow


# bytes an element: 4 or 2 a layer, against 8 of the two streams and 32 times 4 (1/16), 3 (1/8) or 6 bits (both of meft3)
SHARES = [
    ("centred", torch.float32, 1 / 16, 24 / 128),
    ("centred", torch.float32, 1 / 8, 20 / 128),
    ("centred", torch.bfloat16, 1 / 8, 20 / 64),
    ("centred", torch.bfloat16, 1 / 16, 24 / 64),  # no third
    ("meft3", torch.bfloat16, 1 / 8, 32 / 64),  # nor is this
]


# transformers 5.23 has a new name for it; both work
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("coupling, dtype, scale, share", SHARES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_share_of_checkpointing_at_32_layers(name, coupling, dtype, scale, share):
    """Of what 32 layers keep; what both keep besides (masks, rotary embeddings, the output) is left out."""
    kept = {}
    for how, numerics in ((None, "checkpointed"), (coupling, "exact")):
        changed = {} if how is None else {"reversible_scale": scale}
        (two, elements), (deep, _) = (live_after_forward(name, depth, how, numerics, dtype, **changed) for depth in (2, 32))
        kept[numerics] = (deep - two) / 30 * 32
    assert kept["checkpointed"] == 32 * elements * dtype.itemsize
    streams = 2 * 4 * elements  # which do not grow
    assert kept["exact"] + streams == share * kept["checkpointed"]
    assert (share <= 1 / 3) == (dtype == torch.float32 or (coupling, scale) == ("centred", 1 / 8))
