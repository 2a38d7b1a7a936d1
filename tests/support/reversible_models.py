"""Models of every architecture that reversible layers are claimed for, and the twin under plain autograd."""

import warnings
from contextlib import ExitStack, contextmanager

import torch
import transformers as tf
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

from hf_memtune import ReversibleConfig
from hf_memtune.core.coupling import FloatArithmetic
from hf_memtune.core.fixed_point import FixedPointArithmetic
from hf_memtune.methods.overrides import forward_as
from hf_memtune.methods.reversible.handle import make_reversible
from tests.support import tiny_models
from tests.support.stream_twin import TwinStack
from tests.support.tiny_models import CONFIGS, VOCABULARY, batch_for, lm_head, tiny_model

_IMAGE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4, num_channels=3)
MORE = {
    "gemma": lambda: tf.GemmaConfig(**tiny_models._LLAMA_LIKE, head_dim=8),
    "opt-post-norm": lambda: tf.OPTConfig(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, dropout=0.0, pad_token_id=1, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox-sequential": lambda: tf.GPTNeoXConfig(**tiny_models._SHARED, max_position_embeddings=64, pad_token_id=0, use_parallel_residual=False),
    "t5": lambda: tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0),
    "t5-gated": lambda: tf.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0, feed_forward_proj="gated-gelu"),
    "vit": lambda: tf.ViTConfig(**_IMAGE),
    "deit": lambda: tf.DeiTConfig(**_IMAGE),
}  # fmt: skip
CLAIMED = [
    "bert", "roberta", "distilbert", "bart", "t5", "t5-gated", "opt", "opt-post-norm", "gpt2", "gpt_neox", "gpt_neox-sequential", "llama",
    "qwen2", "qwen2-sliding", "qwen3", "mistral-sliding", "gemma", "gemma2", "gemma3", "vit", "deit",
]  # fmt: skip
PARALLEL = ["gpt_neox"]  # attention and MLP beside each other
COUPLINGS = ["centred", "meft1", "meft2", "meft3"]
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "hidden_dropout", "dropout_rate", "activation_dropout",
)  # fmt: skip


def model_of(name, dtype=torch.float64, dropout=0.0, **overrides):
    """A tiny model in training mode with that dropout everywhere."""
    config = (CONFIGS | MORE)[name]()
    rates = {key: dropout for key in DROPOUTS if isinstance(getattr(config, key, None), (int, float))}
    if name in ("vit", "deit"):
        return _image_model(config, dtype, {**rates, **overrides})
    original = CONFIGS.get(name)
    CONFIGS[name] = lambda: config
    try:
        return tiny_model(name, "seq2seq" if name.startswith("t5") else lm_head(name), dtype=dtype, **rates, **overrides)
    finally:
        CONFIGS[name] = original
        if original is None:
            del CONFIGS[name]


def _image_model(config, dtype, overrides):
    torch.manual_seed(0)
    for key, value in {"num_labels": 3, **overrides}.items():
        setattr(config, key, value)
    cls = tf.DeiTForImageClassification if config.model_type == "deit" else tf.ViTForImageClassification
    model = cls._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def inputs_of(name, model, rows=2, length=9):
    if name in ("vit", "deit"):
        return {"pixel_values": torch.randn(rows, 3, 8, 8, dtype=model.dtype), "labels": torch.arange(rows) % 3}
    lengths = (length + 4, length, length + 2, length + 3)[:rows]
    head = "seq2seq" if name in ("bart", "t5", "t5-gated") else lm_head(name)
    batch = batch_for(model, head, lengths=lengths)
    return {**batch, "use_cache": False} if head in ("causal_lm", "seq2seq") else batch


class InFloat64(TorchFunctionMode):
    """Turns what code does in float32 on purpose, as norms and eager softmaxes of some models do, into float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_widest, args), {name: _widest(value) for name, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


def _widest(value):
    return torch.float64 if value is torch.float32 else value


def widen_norms_and_attention(model):
    """On instances of this model, whose every result then is in float64; a rounding to float32 flips by the least of differences."""
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__ and not list(module.children())
        if is_norm or type(module).__name__.endswith("Attention"):
            module.forward = _InFloat64(module.forward)
    return model


class _InFloat64:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        with InFloat64():
            return self.forward(*args, **kwargs)


def settings(coupling, numerics="float", **changed):
    """Adapters far from zero, so that they count."""
    adapters = {"adapter_rank": 4, "adapter_init_std": 0.2} if changed.get("adapter_rank", 1) else {}
    return ReversibleConfig(reversible=coupling, reversible_numerics=numerics, **adapters | changed)


def reversible_of(model, coupling, numerics="float", **changed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return make_reversible(model, settings(coupling, numerics, **changed))


@contextmanager
def twin(handle):
    """The same coupled network, from the same functions, under plain autograd."""
    with ExitStack() as stack:
        for found, shared in zip(handle.stacks, handle.shared):
            for layer in found.layers[: len(shared.names)]:
                stack.enter_context(forward_as(layer, _TwinLayer(layer.forward.__self__).forward))
        yield


class _TwinLayer:
    def __init__(self, ours):
        self.ours, self.run = ours, TwinStack()

    def forward(self, hidden, *args, **kwargs):
        ours, shared = self.ours, self.ours.stack
        if ours.position == 0:
            bits = shared.fraction_bits
            arithmetic = FloatArithmetic(hidden.dtype) if bits is None else FixedPointArithmetic(hidden.dtype, bits)
            pair, streams = self.run.enter(arithmetic, hidden)
        else:
            pair, streams, arithmetic = hidden
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.view_as(t), ours._arguments(args, kwargs))
        pair, streams, extras = self.run.layer(shared.coupling, arithmetic, ours.functions, pair, streams, args, kwargs)
        last = ours.position + 1 == len(shared.names)
        hidden = self.run.leave(pair, shared.weights) if last else (pair, streams, arithmetic)
        return hidden if extras is None else (hidden, *extras)


def step(model, batch, seed=5, autocast=None, backward_autocast=False):
    """Loss and the gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**batch).loss
        if backward_autocast:
            loss.backward()
    if not backward_autocast:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found
