"""What reversible layers keep for backward, in exact bytes."""

import pytest
import torch

from hf_memtune.memory import LiveBytes
from tests.strategies.reversible_models import COUPLINGS, inputs_of, model_of, reversible_of

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
    (shallow, elements), (deep, _) = (
        live_after_forward("llama", depth, "centred", "float", reversible_layers=4) for depth in (4, 12)
    )
    assert deep - shallow > 8 * elements * 4 * 8


def test_dropout_keeps_no_masks():
    """Generator states alone, 5 KB a layer, which the ledger does not see."""
    (shallow, elements), (deep, _) = (live_after_forward("bert", depth, "centred", "float", dropout=0.1) for depth in (4, 12))
    assert deep == shallow


# transformers 5.23 has a new name for it; both work
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1 / 16), (torch.float32, 1 / 8), (torch.bfloat16, 1 / 8)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_third_of_checkpointing_at_32_layers(name, dtype, scale):
    """Of what 32 layers keep; what both keep besides (masks, rotary embeddings, the output) is left out."""
    kept = {}
    for coupling, numerics in ((None, "checkpointed"), ("centred", "exact")):
        changed = {} if coupling is None else {"reversible_scale": scale}
        (two, elements), (deep, _) = (live_after_forward(name, depth, coupling, numerics, dtype, **changed) for depth in (2, 32))
        kept[numerics] = (deep - two) / 30 * 32
    assert kept["checkpointed"] == 32 * elements * dtype.itemsize
    assert kept["exact"] + 2 * 4 * elements <= kept["checkpointed"] / 3  # the two streams do not grow
