"""What streaming cannot do exactly, it refuses by name; a step that is not gone through to its end is an error."""

import gc
import weakref

import peft
import pytest
import torch

from hf_memtune import ConfigError, MemTuneError, Streaming, StreamingConfig, UnsupportedModelError
from hf_memtune.core.store import KeyValueStore
from hf_memtune.methods.model_step import ModelStep
from tests.methods.stepping import model_and_batch, stream
from tests.methods.tiny_models import tiny_model


def streaming_on(model, chunk=5) -> Streaming:
    return Streaming(model, StreamingConfig(sequence_chunk_size=chunk))


@pytest.mark.parametrize("turns", [0, 1])
def test_a_step_that_ends_before_its_chunks_is_an_error(turns):
    """One call is right without streaming, and an easy mistake with it."""
    model, batch, _ = model_and_batch("llama")
    streaming = streaming_on(model)
    with pytest.raises(MemTuneError, match="before all chunks went backward"), streaming.step(batch) as step:
        if not turns:
            model(**step.inputs)
        for _ in zip(range(turns), step.turns()):
            step.loss_sum(model(**step.inputs)).backward()
    streaming.remove()


def test_another_error_in_a_step_is_not_covered_up():
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(ZeroDivisionError), streaming_on(model).step(batch) as step:
        model(**step.inputs)
        1 / 0  # noqa: B018


@pytest.mark.parametrize("name, setting", [("opt", "layerdrop"), ("m2m100", "decoder_layerdrop"), ("bart", "encoder_layerdrop")])
def test_layers_left_out_at_random_are_refused(name, setting):
    with pytest.raises(UnsupportedModelError, match=f"config.{setting} is 0.1"):
        streaming_on(tiny_model(name, **{setting: 0.1}))
    streaming_on(tiny_model(name, **{setting: 0.0})).remove()


def test_a_gap_in_the_store_is_never_read():
    store, chunk = KeyValueStore(), torch.ones(1, 2, 3, 4)
    store.write(0, chunk, chunk, start=0, length=9)
    store.write(0, chunk, chunk, start=6, length=9)
    assert store.prefix(0, 3)[0].shape[2] == 3
    with pytest.raises(MemTuneError, match="3 tokens where 9 are attended to"):
        store.prefix(0, 9)


def test_adapters_that_look_at_whole_rows_or_change_the_loss_are_refused():
    activated = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    adaptive = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    ordinary = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config, reason in ((activated, "activated LoRA"), (adaptive, "AdaLoRA")):
        with pytest.raises(UnsupportedModelError, match=reason):
            streaming_on(peft.get_peft_model(tiny_model("llama"), config))
    streaming_on(peft.get_peft_model(tiny_model("llama"), ordinary)).remove()


def test_a_loss_function_on_the_model_is_refused():
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(UnsupportedModelError, match="loss_function was replaced"):
        streaming_on(model)


def test_hooks_on_accumulated_gradients_are_refused():
    model = tiny_model("llama")
    hook = next(model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UnsupportedModelError, match="1 parameters have hooks"):
        streaming_on(model)
    hook.remove()
    streaming_on(model).remove()


@pytest.mark.parametrize("size", ["512", 2.5, True, 0, [1]])
def test_a_chunk_size_is_a_whole_number(size):
    with pytest.raises(ConfigError, match="sequence_chunk_size: got"):
        StreamingConfig(sequence_chunk_size=size)


def test_a_batch_without_labels_is_refused():
    model, batch, _ = model_and_batch("llama")
    del batch["labels"]
    with pytest.raises(MemTuneError, match="no labels"):
        stream(model, batch, 5)


def test_positions_without_a_batch_dimension_are_those_of_every_row():
    model, batch, _ = model_and_batch("gpt2", lengths=(13, 13))
    positions = torch.arange(13)
    with_mask = {k: v for k, v in batch.items() if k != "position_ids"}
    flat, shaped = stream(model, with_mask | {"position_ids": positions}, 5), stream(model, with_mask | {"position_ids": positions[None]}, 5)
    assert flat.loss == shaped.loss


@pytest.mark.parametrize("head, chunk", [("causal_lm", 5), ("sequence_classification", 5)])
def test_nothing_of_a_step_outlives_it(head, chunk, monkeypatch):
    """Neither its keys and values nor itself, without waiting for a collection of garbage."""
    steps, begin = [], ModelStep.open

    def noting(step):
        steps.append(weakref.ref(step))
        return begin(step)

    monkeypatch.setattr(ModelStep, "open", noting)
    gc.collect()
    gc.disable()
    try:
        model, batch, _ = model_and_batch("llama", head=head)
        stream(model, batch, chunk)
        assert steps and not any(step() for step in steps)
    finally:
        gc.enable()
