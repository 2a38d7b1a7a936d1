"""What streaming cannot do exactly, it refuses by name; what plain training refuses or learns, it refuses or learns as well."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from transformers import AttentionInterface

from hf_memtune import ConfigError, MemTuneError, Streaming, StreamingConfig, UnsupportedModelError
from hf_memtune.core.store import KeyValueStore
from hf_memtune.core.unchanged import Unchanged
from hf_memtune.methods.attention.passes import ChunkPass, StreamPass
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from hf_memtune.settings.streaming import STREAM_ORDERS
from tests.support.composition import with_lora
from tests.support.removal import registered, traces
from tests.support.stepping import assert_equal_step, loss_of, model_and_batch, plain_twin, seek_in_stream, seeking_on, stream
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import gradients, worst_difference


def streaming_on(model, chunk=5) -> Streaming:
    return Streaming(model, StreamingConfig(sequence_chunk_size=chunk))


def own_step(model, batch):
    """Loss and gradients of the model's own loss, which transformers takes in float32."""
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


def assert_learns_as_plain(model, batch, other):
    """In a stream, as without one; other: a loss and gradients that must not pass for these."""
    loss, expected = own_step(model, batch)
    with streaming_on(model):
        found_loss, found = own_step(model, batch)
    allowed = tolerance(torch.float32)
    assert abs(found_loss - loss) <= allowed * abs(loss) and worst_difference(found, expected) <= allowed
    assert abs(other[0] - loss) > NOTICED * abs(loss)


def test_an_error_after_the_call_is_not_covered_up():
    model, batch, _ = model_and_batch("llama")
    before = traces(model)
    with pytest.raises(ZeroDivisionError), streaming_on(model):
        model(**batch)
        1 / 0  # noqa: B018
    assert traces(model) == before


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, setting", [("opt", "layerdrop"), ("m2m100", "decoder_layerdrop"), ("bart", "decoder_layerdrop")])
def test_layers_left_out_at_random_are_refused(name, setting):
    with pytest.raises(UnsupportedModelError, match=f"config.{setting} is 0.1"):
        streaming_on(tiny_model(name, **{setting: 0.1}))
    streaming_on(tiny_model(name, **{setting: 0.0})).remove()


@pytest.mark.parametrize("name", ["bart", "m2m100"])
def test_layers_of_an_encoder_may_be_left_out(name):
    """It runs once, as it is: see test_streaming."""
    model = tiny_model(name, encoder_layerdrop=0.1, decoder_layerdrop=0.0)
    streaming = streaming_on(model)
    assert "forward" in vars(model.base_model)
    streaming.remove()
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("order", ["chunks", "layers"])
def test_lookups_that_count_their_tokens_are_refused(order):
    """The gradient of a token would be divided by how often it comes in its chunk, and not in the batch."""
    model, batch, dtype = model_and_batch("llama")
    embedding = model.get_input_embeddings()
    without = plain_twin(model, batch)
    embedding.scale_grad_by_freq = True
    before = traces(model)
    for make in (lambda: stream(model, batch, 5, order), lambda: seeking_on(model)):
        with pytest.raises(UnsupportedModelError, match="embed_tokens: got scale_grad_by_freq=True.*Set scale_grad_by_freq=False"):
            make()
    assert traces(model) == before
    assert worst_difference(plain_twin(model, batch)[1], without[1]) > NOTICED
    embedding.scale_grad_by_freq = False
    assert worst_difference(stream(model, batch, 5, order).gradients, without[1]) <= tolerance(dtype)


def test_a_gap_in_the_store_is_never_read():
    store, chunk = KeyValueStore(), torch.ones(1, 2, 3, 4)
    store.write(0, chunk, chunk, start=0, length=9)
    store.write(0, chunk, chunk, start=6, length=9)
    assert store.prefix(0, 3)[0].shape[2] == 3
    with pytest.raises(MemTuneError, match="3 tokens where 9 are attended to"):
        store.prefix(0, 9)


def test_adapters_that_look_at_whole_rows_are_refused():
    activated = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    ordinary = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="activated LoRA"):
        streaming_on(peft.get_peft_model(tiny_model("llama"), activated))
    streaming_on(peft.get_peft_model(tiny_model("llama"), ordinary)).remove()


def test_an_adapter_that_adds_to_the_loss_is_learned():
    """AdaLoRA: its matrices are to stay orthogonal."""
    model, batch, _ = model_and_batch("llama")
    config = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM", orth_reg_weight=5.0)
    adapted = peft.get_peft_model(model, config)
    assert_learns_as_plain(adapted, batch, own_step(adapted.get_base_model(), batch))


def test_a_loss_function_on_the_model_is_learned():
    model, batch, _ = model_and_batch("llama")
    without = own_step(model, batch)
    model.loss_function = lambda logits, labels, **kwargs: logits.square().mean() + logits[:, -1].sum() / 100
    assert_learns_as_plain(model, batch, without)


# -- what changes between a call and its backward ------------------------------------------------------------------------

METHODS = {
    "chunks": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="chunks")),
    "layers": lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=5, stream_order="layers")),
    "cut": lambda model: seeking_on(model, token_scorer="random"),
    "stream": lambda model: seeking_on(model, token_scorer="random", token_gradient="stream", sequence_chunk_size=5),
}


def adapted(name="llama"):
    """A model with frozen weights, adapters with dropout, and a buffer; and a batch with all that a call may be given."""
    model, batch, _ = model_and_batch(name)
    model.model.norm.register_buffer("scale", torch.full((), 1.5, dtype=torch.float64))
    model.model.norm.register_forward_hook(lambda module, args, output: module.scale * output)
    model = with_lora(model, lora_dropout=0.3)
    mask = batch["attention_mask"].bool()
    return model, batch | {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def embedded(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    return {name: value for name, value in batch.items() if name != "input_ids"} | {"inputs_embeds": embeds}


@torch.no_grad()
def double(tensor):
    tensor.mul_(2)


CHANGES = {
    "evaluation": (lambda model, batch: model.eval(), r"training \(got False, expected True"),
    "merged": (lambda model, batch: model.merge_adapter(), "merged_adapters"),
    "hooked": (lambda model, batch: inner(model).layers[1].register_forward_hook(lambda m, args, out: 2 * out), "layers.1: .*hooks"),
    "ids": (lambda model, batch: batch["input_ids"].copy_(batch["input_ids"].flip(1)), r"input_ids was changed in place.*input_ids.clone\(\)"),
    "embeddings": (lambda model, batch: double(batch["inputs_embeds"]), "inputs_embeds was changed"),
    "mask": (lambda model, batch: batch["attention_mask"].narrow(1, 2, 3).fill_(False), "attention_mask was changed"),
    "positions": (lambda model, batch: batch["position_ids"].narrow(1, 2, 3).add_(3), "position_ids was changed"),
    "frozen": (lambda model, batch: double(inner(model).layers[1].mlp.up_proj.base_layer.weight), "frozen weights were changed"),
    "trained": (lambda model, batch: double(inner(model).layers[1].mlp.up_proj.lora_A["default"].weight), "lora_A.default.weight was changed"),
    "buffer": (lambda model, batch: double(inner(model).norm.scale), "buffer norm.scale was changed"),
}  # fmt: skip


def inner(model):
    return model.get_base_model().model


def step_with(change, method):
    """The gradients of a call after which something changes. A batch of embeddings where these are what changes."""
    model, batch = adapted()
    batch = embedded(model, batch) if change == "embeddings" else batch
    del batch["labels"]
    with METHODS[method](model):
        torch.manual_seed(0)
        loss = model(**batch).logits.square().mean()  # with "cut", tokens are then chosen in backward
        if change is not None:
            CHANGES[change][0](model, batch)
        return gradients(model, loss)


@pytest.mark.parametrize("method", ["chunks", "layers", "cut"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_call_read_must_be_the_same_in_its_backward(change, method):
    with pytest.raises(MemTuneError, match=CHANGES[change][1]):
        step_with(change, method)


@pytest.mark.parametrize("method", ["chunks", "layers"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_would_be_another_gradient(change, method, monkeypatch):
    """The sibling: without the refusal."""
    expected = step_with(None, method)
    monkeypatch.setattr(Unchanged, "check", lambda self: None)
    assert worst_difference(step_with(None, method), expected) == 0
    try:
        assert worst_difference(step_with(change, method), expected) > NOTICED
    except RuntimeError as error:  # what the last chunk saved is looked at by autograd
        assert "modified by an inplace operation" in str(error)


def test_tokens_that_run_when_the_loss_is_taken_need_the_model_of_the_call():
    model, batch = adapted()
    labels = batch.pop("labels")
    with METHODS["cut"](model):
        logits = model(**batch).logits
        model.eval()
        with pytest.raises(MemTuneError, match=CHANGES["evaluation"][1]):
            model.get_base_model().loss_function(logits, labels, vocab_size=logits.shape[-1])
        model.train()
        model.get_base_model().loss_function(logits, labels, vocab_size=logits.shape[-1]).backward()


def test_the_remedies_help():
    model, batch = adapted()
    with METHODS["chunks"](model):
        torch.manual_seed(0)
        expected = gradients(model, model(**batch).loss)
        torch.manual_seed(0)
        ids, positions = batch["input_ids"].clone(), batch["position_ids"].clone()
        loss = model(**batch | {"input_ids": ids.clone(), "position_ids": positions.clone()}).loss
        ids.zero_(), positions.zero_()
        model.eval()
        model.train()
        assert worst_difference(gradients(model, loss), expected) == 0


@pytest.mark.parametrize("method", METHODS)
def test_what_may_change_in_between(method):
    """Passes of other kinds, gradients, statistics that a call counts itself, a buffer and weights between two steps, copies of weights."""
    model, batch = adapted()
    norm = inner(model).norm
    norm.register_buffer("calls", torch.zeros((), dtype=torch.long))
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with METHODS[method](model):
        norm.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)  # before, it would be refused
        for _ in range(2):
            first, second = model(**batch).loss, model(**batch).loss
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=2)
                model.eval()(**batch)
                model.train()(**batch)
            with model.disable_adapter():
                model(**batch)
            average.update_parameters(model)
            (first + second).backward()
            optimizer.step()
            optimizer.zero_grad()
            double(norm.scale)
    assert norm.calls > 4


@pytest.mark.parametrize("copies", [True, False])
def test_buffers_that_data_parallelism_copies_may_be_written_over(copies, monkeypatch):
    """DistributedDataParallel copies those of the first process before every call: a second one comes before the backward of the first."""
    model, batch, _ = model_and_batch("llama")
    buffer = model.model.rotary_emb.inv_freq
    with METHODS["chunks"](model):
        with monkeypatch.context() as patch:
            patch.setattr(DistributedDataParallel, "_active_ddp_module", SimpleNamespace(forward_sync_buffers=copies))
            loss = model(**batch).loss
        buffer.copy_(buffer.clone())
        with nullcontext() if copies else pytest.raises(MemTuneError, match="buffer rotary_emb.inv_freq"):
            loss.backward()


@pytest.mark.parametrize("order", ["chunks", "layers"])
def test_rows_that_a_lookup_shortens_may_be_frozen(order):
    """max_norm: the call itself changes the weights."""
    model, batch, dtype = model_and_batch("llama")
    embedding = model.get_input_embeddings()
    embedding.max_norm = 0.5
    embedding.weight.requires_grad_(False)

    def step():
        return gradients(model, loss_of(model, batch)[0] + loss_of(model, batch)[0])

    expected = step()
    with METHODS[order](model):
        assert worst_difference(step(), expected) <= tolerance(dtype)


# -- weights that are made of others -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_parametrized_weights_are_made_anew_by_every_pass(method):
    """torch.nn.utils.parametrize.cached() would keep what a pass without gradient has made of them."""
    model, batch, dtype = model_and_batch("llama")
    for layer in model.model.layers:
        parametrizations.weight_norm(layer.mlp.up_proj)
    expected = plain_twin(model, batch)[1]
    with METHODS[method](model):
        with pytest.raises(MemTuneError, match=r"parametrized.*outside of cached\(\)"), parametrize.cached():
            model(**batch)
        loss = loss_of(model, batch)[0]
        if method != "cut":
            with pytest.raises(MemTuneError, match=r"parametrized.*outside of cached\(\)"), parametrize.cached():
                loss.backward()
        found = gradients(model, loss_of(model, batch)[0])
        if method in ("chunks", "layers"):
            assert worst_difference(found, expected) <= tolerance(dtype)
    with METHODS[method](without := model_and_batch("llama")[0]), parametrize.cached():  # a model without any
        assert gradients(without, loss_of(without, batch)[0])


@pytest.mark.parametrize("order", ["chunks", "layers"])
def test_weights_that_are_kept_would_learn_nothing(order, monkeypatch):
    """The sibling: without the refusal."""
    model, batch, _ = model_and_batch("llama")
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    monkeypatch.setattr(Unchanged, "_require_made_anew", lambda self: None)
    with METHODS[order](model), parametrize.cached():
        found = gradients(model, loss_of(model, batch)[0])
    assert not any("up_proj.parametrizations" in name and "layers.1" in name for name in found)


# -- hooks on parameters -------------------------------------------------------------------------------------------------


def go_backward(model, batch, streams: bool) -> None:
    """One loss, with or without streaming."""
    with streaming_on(model) if streams else nullcontext():
        loss_of(model, batch)[0].backward()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_hook_on_accumulated_gradients_fires_once_with_the_whole_gradient(tied, there):
    """An optimizer may step in backward. there: whether gradients of an earlier batch are there, to which these are added."""
    model, batch, _ = model_and_batch("llama", tie_word_embeddings=tied)

    def heard(streams):
        seen = {name: [] for name, _ in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, 0.5) if there else None
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))
            for name, parameter in model.named_parameters()
        ]
        go_backward(model, batch, streams)
        for hook in hooks:
            hook.remove()
        assert all(len(gradients) == 1 for gradients in seen.values())
        return {name: gradient for name, (gradient,) in seen.items()}

    found, expected = heard(True), heard(False)
    assert worst_difference(found, expected) <= tolerance(torch.float64)
    assert worst_difference({name: gradient * 0.99 for name, gradient in found.items()}, expected) > NOTICED


def test_an_optimizer_may_step_in_backward():
    """Parameters change when their gradient is whole, and so after every chunk has gone backward."""
    model, batch, _ = model_and_batch("llama")
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def stepped(streams):
        model.load_state_dict(start)
        model.zero_grad(set_to_none=True)
        hooks = [p.register_post_accumulate_grad_hook(_step) for p in model.parameters()]
        for _ in range(2):
            go_backward(model, batch, streams)
        for hook in hooks:
            hook.remove()
        return {name: value - start[name] for name, value in model.state_dict().items()}

    assert worst_difference(stepped(True), stepped(False)) <= tolerance(torch.float64)
    assert worst_difference(stepped(True), {name: -value for name, value in stepped(False).items()}) > NOTICED


@torch.no_grad()
def _step(parameter):
    parameter.sub_(0.1 * parameter.grad)
    parameter.grad = None


# -- settings and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["many", 2.5, True, 0, [1]])
def test_a_chunk_size_is_a_whole_number(size):
    with pytest.raises(ConfigError, match="sequence_chunk_size: got"):
        StreamingConfig(sequence_chunk_size=size)


def test_a_batch_without_labels_has_logits_and_no_loss():
    model, batch, dtype = model_and_batch("llama")
    del batch["labels"]
    expected = gradients(model, model(**batch).logits.square().mean())
    with streaming_on(model):
        outputs = model(**batch)
        assert outputs.loss is None
        found = gradients(model, outputs.logits.square().mean())
    assert worst_difference(found, expected) <= tolerance(dtype)
    assert worst_difference({name: g * 0.99 for name, g in found.items()}, expected) > NOTICED


def test_positions_without_a_batch_dimension_are_those_of_every_row():
    model, batch, dtype = model_and_batch("gpt2", lengths=(13, 13))
    positions = torch.arange(13).flip(0)
    with_mask = {k: v for k, v in batch.items() if k != "position_ids"}
    loss, expected = plain_twin(model, with_mask | {"position_ids": positions[None]})
    for given in (positions, positions[None]):
        assert_equal_step(stream(model, with_mask | {"position_ids": given}, 5), loss, expected, dtype)
    assert worst_difference(stream(model, with_mask, 5).gradients, expected) > NOTICED  # without any, they count up


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_3"])
@pytest.mark.parametrize("method", [streaming_on, seeking_on])
def test_sinks_that_the_kernel_in_place_does_not_know_are_refused(method, kernel):
    """sdpa, which runs in place of flash and flex, would leave them out without a word. Eager attention has them."""
    model, _, _ = model_and_batch("gpt-oss")
    method(model).remove()
    model.config._attn_implementation_internal = kernel
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match=f"got '{kernel}' on a model with attention sinks.*attn_implementation='eager'"):
        method(model)
    assert traces(model) == before


def test_flash_attention_on_float32_weights_is_probed_without_it(monkeypatch):
    """It takes them under autocast alone, as training does and the probe does not."""

    def flash(module, query, *args, **kwargs):
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stream(model, batch, 5)
    model.config._attn_implementation_internal = "flash_attention_2"
    with torch.autocast("cpu", torch.bfloat16):
        found = stream(model, batch, 5)
    assert worst_difference(found.gradients, expected.gradients) == 0 and model.config._attn_implementation == "flash_attention_2"
    with pytest.raises(RuntimeError, match="fp16 and bf16"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "plain", lambda self: nullcontext())
        streaming_on(model)


def test_a_head_that_somebody_runs_another_forward_in(monkeypatch):
    """Its logits are not those of its weight and bias, by which losses are taken of a plain one."""
    model, batch, _ = model_and_batch("llama")
    plain = own_step(model, batch)
    model.lm_head.forward = lambda hidden: 3 * torch.nn.functional.linear(hidden, model.lm_head.weight)
    loss, expected = own_step(model, batch)
    for on in (streaming_on, partial(seeking_on, token_ratio=0.999)):
        with on(model):
            found_loss, found = own_step(model, batch)
        assert worst_difference(found, expected) <= 1e-5 and abs(found_loss - loss) <= 1e-5 * loss
    assert worst_difference(plain[1], expected) > NOTICED and abs(plain[0] - loss) > NOTICED


# -- padding that sees nothing -------------------------------------------------------------------------------------------


def left_padded(attention):
    """Rows of 13 and 9 tokens, whose first tokens have labels, which the padding before the shorter one is to predict."""
    model, batch, dtype = model_and_batch("llama", "left", _attn_implementation=attention)
    assert (batch["labels"][1] != -100).sum() == 9
    dtype = torch.float32 if attention == "eager" else dtype  # whose softmax is in float32, and float64's smallest number -inf there
    return model.to(dtype), batch, dtype


@pytest.mark.parametrize("order", STREAM_ORDERS)
@pytest.mark.parametrize("chunk", [3, 5])
def test_a_loss_of_padding_that_eager_attention_lets_see_the_whole_row_is_refused(chunk, order):
    model, batch, dtype = left_padded("eager")
    with pytest.raises(MemTuneError, match="padding that sees no token.*Pad rows on the right"):
        stream(model, batch, chunk, order)
    batch["labels"][:, 1:][batch["attention_mask"][:, :-1] == 0] = -100
    assert worst_difference(stream(model, batch, chunk, order).gradients, plain_twin(model, batch)[1]) <= tolerance(dtype)


def test_where_it_would_be_right_it_is_not_refused():
    """In one chunk, without padding on the left, and with attention that lets it see nothing."""
    for model, batch, dtype, chunk in (
        (*left_padded("eager"), 13),
        (*model_and_batch("llama", "right", _attn_implementation="eager")[:2], torch.float32, 5),
        (*left_padded("sdpa"), 5),
    ):
        assert worst_difference(stream(model, batch, chunk).gradients, plain_twin(model, batch)[1]) <= tolerance(dtype)


def test_what_eager_attention_makes_of_it_would_be_wrong(monkeypatch):
    """The sibling: without the refusal."""
    model, batch, _ = left_padded("eager")
    monkeypatch.setattr(StreamPass, "give", ChunkPass.give)
    assert worst_difference(stream(model, batch, 5).gradients, plain_twin(model, batch)[1]) > NOTICED


@pytest.mark.parametrize("token_gradient", ["stream", "skip"])
def test_token_seeking_keeps_no_padding(token_gradient):
    model, batch, _ = left_padded("eager")
    taken = seek_in_stream(model, batch, 5, token_gradient=token_gradient, token_ratio=0.9, always_keep="none")
    assert not (taken.kept["decoder"] & (batch["attention_mask"] == 0)).any()


# -- nothing outlives a call -------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    """Weak references to all streams that were made, while no garbage is collected."""
    made, init = [], ChunkStream.__init__

    def noting(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(ChunkStream, "__init__", noting)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize("head, chunk", [("causal_lm", 5), ("sequence_classification", 5)])
def test_nothing_of_a_step_outlives_it(head, chunk, streams):
    """Neither its keys and values nor itself, without waiting for a collection of garbage."""
    model, batch, _ = model_and_batch("llama", head=head)
    stream(model, batch, chunk)
    assert streams and not any(made() for made in streams)


def test_an_output_that_is_dropped_leaves_nothing(streams):
    model, batch, _ = model_and_batch("llama")
    names = registered()
    with streaming_on(model):
        outputs = model(**batch)
        assert streams[-1]() is not None
        del outputs
        assert streams[-1]() is None
    assert registered() <= names
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_embedding_that_looks_at_places_is_refused():
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: torch.cat([output[:, :1] * 5, output[:, 1:]], dim=1))
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match="its embedding"):
        streaming_on(model)
    assert traces(model) == before
