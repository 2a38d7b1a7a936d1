"""Streaming on a model that FSDP2 shards, in one process: what is learned, and what is refused. Two: tests/training/test_fsdp.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, UnsupportedModelError, checkpoint_in_two_levels
from hf_memtune.core.logits import LazyLogits
from tests.support.removal import traces
from tests.support.stepping import loss_of, model_and_batch
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import gradients, worst_difference

EXACT = RELATIVE[torch.float64]


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def streaming_on(model) -> Streaming:
    return Streaming(model, StreamingConfig(sequence_chunk_size=5))


def seeking_on(model) -> TokenSeeking:
    return TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_ratio=0.5))


def shard(model, **head):
    for layer in model.model.layers:
        fully_shard(layer)
    if head:
        fully_shard(model.lm_head, **head)
    return fully_shard(model)


def step(model, batch) -> dict:
    model.zero_grad()
    loss_of(model, batch)[0].backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def plain(model, batch) -> dict:
    return gradients(model, loss_of(model, batch)[0])


@pytest.mark.parametrize("is_first", [False, True])
def test_it_learns_what_plain_training_learns(is_first):
    """Put on before the model is sharded, or after."""
    model, batch, _ = model_and_batch("llama")
    expected = plain(copy.deepcopy(model), batch)
    method = streaming_on(model) if is_first else None
    shard(model)
    method = method or streaming_on(model)
    assert worst_difference(step(model, batch), expected) <= EXACT
    fewer = {name: value[:, :-2] for name, value in batch.items()}
    assert worst_difference(step(model, fewer), expected) > NOTICED
    method.remove()
    assert worst_difference(step(model, batch), expected) <= EXACT


def test_attention_may_be_a_unit():
    """An eager one lies in the module of its class, which FSDP2 has put another in front of."""
    model, batch, _ = model_and_batch("llama", attn_implementation="eager")
    expected = plain(copy.deepcopy(model), batch)
    for layer in model.model.layers:
        fully_shard(layer.self_attn)
    shard(model)
    with streaming_on(model):
        assert worst_difference(step(model, batch), expected) <= FLOAT32_INSIDE  # its softmax


def test_nothing_of_it_stays():
    model, batch, _ = model_and_batch("llama")
    shard(model)
    step(model, batch)  # in its first call FSDP2 hangs its own hooks on
    before = traces(model)
    with streaming_on(model):
        assert traces(model) != before
        step(model, batch)
    assert traces(model) == before


@pytest.mark.parametrize("head, is_lazy", [({}, True), ({"reshard_after_forward": False}, True), ({"reshard_after_forward": True}, False)])
def test_logits_are_on_demand_where_the_head_stays_gathered(head, is_lazy):
    """FSDP2's own hooks on them do not make them; a hook of the user's does."""
    model, batch, _ = model_and_batch("llama")
    expected = plain(copy.deepcopy(model), batch)
    shard(model, **head)
    with streaming_on(model):
        loss, outputs = loss_of(model, batch)
        assert (type(outputs.logits) is LazyLogits) == is_lazy
        assert not is_lazy or outputs.logits._memory.values is None
        loss.backward()
        assert worst_difference({n: p.grad.full_tensor() for n, p in model.named_parameters()}, expected) <= EXACT
        outputs = model(input_ids=batch["input_ids"])
        outputs.logits.register_hook(lambda gradient: None)
        outputs.logits.square().mean().backward()
        assert not is_lazy or outputs.logits._memory.values is not None


def test_evaluation_and_generation_pass_through():
    model, batch, _ = model_and_batch("llama")
    shard(model)
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
        with streaming_on(model):
            assert torch.equal(model(**batch).logits, logits)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first", [False, True])
def test_token_seeking_is_refused(is_first):
    """Whether the model was sharded before it came or after."""
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    seeking = seeking_on(model) if is_first else None
    shard(model)
    with pytest.raises(UnsupportedModelError, match="spread over processes .* sequence_chunk_size without token_seeking works with FSDP2"):
        model(**batch) if is_first else seeking_on(model)
    if seeking is not None:
        seeking.remove()


def test_tensor_parallelism_is_refused():
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    streaming_on(model).remove()
    projection, mesh = model.model.layers[0].mlp.up_proj, init_device_mesh("cpu", (1,))
    projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(UnsupportedModelError, match="spread over processes"):
        streaming_on(model)


def test_an_older_torch_is_refused(monkeypatch):
    model, _, _ = model_and_batch("llama", dtype=torch.float32)
    shard(model)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(UnsupportedModelError, match="torch 2.12.1.cpu: expected 2.13 or newer"):
        streaming_on(model)
    monkeypatch.setattr(torch, "__version__", "2.14.0a0+gitabc")
    streaming_on(model).remove()


def test_an_fsdp_that_works_in_another_way_is_refused(monkeypatch):
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    model, _, _ = model_and_batch("llama", dtype=torch.float32)
    shard(model)
    monkeypatch.delattr(FSDPParam, "to_accumulated_grad_if_needed")
    with pytest.raises(UnsupportedModelError, match="no FSDPParam.to_accumulated_grad_if_needed"):
        streaming_on(model)


def test_a_part_of_what_was_sharded_is_refused():
    model, _, _ = model_and_batch("llama", dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(UnsupportedModelError, match="Call fully_shard on the model itself last"):
        streaming_on(model)


def test_layers_that_are_changed_are_refused():
    """In one call streams go through them; sharded as well, nobody has shown it."""
    model, batch, _ = model_and_batch("llama", dtype=torch.float32, num_hidden_layers=4)
    checkpoint_in_two_levels(model)
    with streaming_on(model):
        model(**batch).loss.backward()
        shard(model)
        with pytest.raises(UnsupportedModelError, match="reversible, or checkpointed in two levels"):
            model(**batch)
