"""What a model does in training alone, and what it learns beside its parameters: refused, or left as it was found by the probe."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods import method
from tests.support.stepping import model_and_batch, plain_twin, stream
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import worst_difference

METHODS = {
    "chunks": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="chunks")),
    "layers": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")),
    "cut": lambda model: TokenSeeking(model, TokenSeekingConfig(token_seeking=True)),
    "stream": lambda model: TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_gradient="stream", sequence_chunk_size=5)),
}
EVERY_METHOD = pytest.mark.parametrize("put_on", METHODS.values(), ids=METHODS)


class Average(nn.Module):
    """Counts its calls, and averages what it is given."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(32, dtype=torch.float64))

    def forward(self, hidden):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean((0, 1))  # another tensor each time
        return hidden


def beside_the_mlp(model, module):
    """Layer 1 sends the output of its MLP through a module."""
    mlp = model.model.layers[1].mlp
    mlp.add_module("beside", module)
    mlp.register_forward_hook(lambda owner, inputs, output: owner.beside(output))
    return model


class NormOfBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(32, dtype=torch.float64)

    def forward(self, hidden):
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


def power_iteration(model):
    parametrizations.spectral_norm(model.model.layers[1].self_attn.q_proj)
    return model


TRACES = {
    "average": (lambda model: beside_the_mlp(model, Average()), "beside.calls (and 1 more)"),
    "norm of a batch": (lambda model: beside_the_mlp(model, NormOfBatch()), "beside.norm.running_mean (and 2 more)"),
    "spectral norm": (power_iteration, "q_proj.parametrizations.weight.0._u (and 1 more)"),
}


@EVERY_METHOD
@pytest.mark.parametrize("case", TRACES)
def test_what_a_training_forward_writes_into_buffers_is_refused(case, put_on):
    change, named = TRACES[case]
    model = change(model_and_batch("llama")[0])
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as refused:
        put_on(model)
    assert "LlamaForCausalLM: a forward pass in training mode changes its buffer layers.1." in str(refused.value) and named in str(
        refused.value
    )
    after = dict(model.named_buffers())
    assert after.keys() == before.keys() and all(
        after[name] is kept and torch.equal(kept, values) for name, (kept, values) in before.items()
    )
    assert torch.equal(torch.get_rng_state(), state) and [module.training for module in model.modules()] == modes


@EVERY_METHOD
def test_it_is_accepted_in_evaluation_mode(put_on):
    """The remedy: then it changes nothing. Of a model that is still to be put into training mode, modes are those of `train()`."""
    model = beside_the_mlp(model_and_batch("llama")[0], NormOfBatch())
    model.model.layers[1].mlp.beside.eval()
    put_on(model).remove()
    model.eval()
    with pytest.raises(UnsupportedModelError, match="in training mode changes its buffer"):
        put_on(model)


@EVERY_METHOD
def test_what_the_probe_writes_into_buffers_is_taken_back(put_on, monkeypatch):
    """Also of a model that changes them in evaluation, and is not refused."""
    model = beside_the_mlp(model_and_batch("llama")[0], Average())
    monkeypatch.setattr(method, "require_no_trace", lambda architecture: None)
    own = model.model.layers[1].mlp.beside
    calls, mean = own.calls, own.mean
    put_on(model).remove()
    assert own.calls is calls and own.mean is mean and not calls.any() and not mean.any()
    with pytest.MonkeyPatch.context() as patch:  # the sibling
        patch.setattr(method, "buffers_kept", lambda module: patch.context())
        put_on(model).remove()
    assert own.calls > 0


# -- adapters that are left out of a whole call ----------------------------------------------------------------------

PER_CALL = {
    "LoHa": (peft.LoHaConfig, {"module_dropout": 0.5}),
    "LoKr": (peft.LoKrConfig, {"module_dropout": 0.5}),
    "LoHa, ranks": (peft.LoHaConfig, {"rank_dropout": 0.5}),
    "BOFT": (peft.BOFTConfig, {"boft_dropout": 0.5, "boft_block_size": 4}),
}


@pytest.mark.parametrize("case", PER_CALL)
def test_dropout_of_whole_calls_is_refused_in_streams(case):
    kind, settings = PER_CALL[case]
    name = next(iter(settings))

    def adapted(**changed):
        model, batch, dtype = model_and_batch("llama")
        config = kind(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings | changed)
        return peft.get_peft_model(model, config).to(dtype), batch, dtype

    with pytest.raises(UnsupportedModelError, match=rf"layers.0.self_attn.q_proj.{name} leaves an adapter.*Expected 0"):
        stream(adapted()[0], model_and_batch("llama")[1], 5)
    METHODS["cut"](adapted()[0]).remove()  # one pass with gradient: nothing is drawn twice
    model, batch, dtype = adapted(**{name: 0.0})  # the remedy
    assert worst_difference(stream(model, batch, 5).gradients, plain_twin(model, batch)[1]) <= tolerance(dtype)


# -- what is learned beside the parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["chunks", "layers"])
@pytest.mark.parametrize("had", [False, True], ids=["without", "with"])
def test_a_vector_that_a_hook_adds_is_learned_and_the_probe_leaves_no_gradient_in_it(order, had):
    model, batch, dtype = model_and_batch("llama")
    vector = torch.linspace(-1, 1, 32, dtype=dtype).requires_grad_()
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output + vector)
    loss, expected = plain_twin(model, batch)
    plain, vector.grad = vector.grad.clone(), torch.ones_like(vector) if had else None
    there = vector.grad
    with Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order=order)):
        assert vector.grad is there and (there is None or bool((there == 1).all()))
    vector.grad = None
    assert worst_difference(stream(model, batch, 5, order).gradients, expected) <= tolerance(dtype)
    assert worst_difference({"vector": vector.grad}, {"vector": plain}) <= tolerance(dtype)
    assert worst_difference({"vector": 1.01 * vector.grad}, {"vector": plain}) > NOTICED / 10
