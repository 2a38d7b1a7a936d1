"""Exact gradients in a stream, for any causal transformers model: near the memory of inference, at the cost of checkpointing.

    with Streaming(model, StreamingConfig(sequence_chunk_size=512)):
        any_loss(model(**batch), model(**other)).backward()

The gradients of all parameters equal those of plain backpropagation, whatever the loss. Alive at a time: the weights, keys and values of
all tokens, what is owed to them, the last hidden states and their gradient, and the activations of one chunk. By layers (stream_order), it is
the weights, the inputs of the layers, the gradient of one of them, keys and values of one layer, and its activations of one chunk.
"""

from typing import Any

import torch
from torch import nn

from hf_memtune.architectures import is_sharded
from hf_memtune.core.replay import replayed
from hf_memtune.errors import ConfigError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.head import Head
from hf_memtune.methods.method import Method
from hf_memtune.methods.streaming.chunk_stream import ChunkStream, Means
from hf_memtune.methods.streaming.encoder import encode
from hf_memtune.methods.streaming.layer_facts import all_checkpointing, layers_of
from hf_memtune.methods.streaming.layer_stream import LayerStream, wants_router_logits
from hf_memtune.methods.streaming.sharded import ShardedHead, sharded_stream, within_root_call
from hf_memtune.methods.tied import is_tied
from hf_memtune.settings.streaming import StreamingConfig


class Streaming(Method[StreamingConfig]):
    """Exact streaming on one model, until `remove()`.

    model: a causal transformers model with a head, an encoder-decoder model (its decoder streams), or a PEFT model around one. It may be
    sharded by `fully_shard` (FSDP2), before or after: see sharded.py.
    config: StreamingConfig, its sequence_chunk_size a number. check: False leaves out what of the probe needs tensors with values.
    sums_dtype: dtype of the sums of gradients that chunks owe to the keys and values of earlier ones; None: as they come, which in
    bfloat16 is as exact as plain training in bfloat16 (results/precision.jsonl), at half the bytes of float32.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    def __init__(self, model: nn.Module, config: StreamingConfig, check: bool = True, sums_dtype: torch.dtype | None = None):
        if config.stream_chunk_size is None:
            remedy = " auto is for MemEfficientTrainer, which knows the rows." if config.chunk_is_open else ""
            raise ConfigError(
                [f"sequence_chunk_size: got {config.sequence_chunk_size}, expected the tokens of a chunk, such as 512.{remedy}"]
            )
        self.sums_dtype = sums_dtype
        super().__init__(model, config, check)

    def require_gathered(self) -> None:
        """Of what spreads parameters over processes, FSDP2 is known."""
        if not is_sharded(self._given):
            super().require_gathered()

    def probe(self, check: bool) -> Facts:
        self._compares = check
        return within_root_call(self._given, lambda: super(Streaming, self).probe(check))

    def require(self, facts: Facts) -> None:
        super().require(facts)
        self._layers = layers_of(self.router, self._compares, self.config.stream_order)

    def make_head(self, inputs: dict[str, Any]) -> Head:
        if is_sharded(self._given):
            return ShardedHead(self._given, self.architecture.output_head, inputs)
        return super().make_head(inputs)

    def run(self, call: BodyCall, head: Head | None) -> Any:
        """One call of the body. Rows of one chunk take the model's own way, which is plain training, where nothing is saved by a stream of it."""
        means, rows = means_of(self, head), call.decoder
        stream: ChunkStream | None = None
        if is_sharded(self._given):
            stream = sharded_stream(self._given, means, call)
        elif self.config.stream_order == "layers" or rows.length > means.chunk or self._saves_in_one_chunk(means):
            stream = self._stream(means, encode(call))
        self.listeners.tell("shaped", stream.count if stream else 1, rows)
        self.listeners.tell("counted", seen=sum(rows.real_tokens() for rows in call.rows.values()))
        if stream is None:
            return None
        self.listeners.tell("context_begins", stream.stored)
        stream.run_forward(Records({}, wanted=False))
        self.listeners.tell("context_ends")
        stream.run_last()
        return connected(stream, head)

    def _stream(self, means: Means, call: BodyCall) -> ChunkStream:
        """By layers where that was asked for, or where layers are checkpointed, of which it runs each one time less."""
        asked = self.config.stream_order
        if asked == "layers" or (asked is None and self._layers and all_checkpointing(self.architecture) and not wants_router_logits(call)):
            assert self._layers is not None
            return LayerStream(means, call, self._layers.return_tuple)
        return ChunkStream(means, call)

    def _saves_in_one_chunk(self, means: Means) -> bool:
        """Whether embedding and head are one matrix that is trained, of whose gradient autograd has three, and a stream one."""
        architecture = self.architecture
        return means.shares_head and means.host is None and is_tied(architecture) and architecture.head.weight.requires_grad


def means_of(method: Method[Any], head: Head | None) -> Means:
    """What the streams of a method run with, in a call of the model with this head, or of the body alone."""
    config = method.config
    host = method.host if config.kv_offload else None
    assert config.stream_chunk_size is not None, "only a method that streams has streams"
    keeps = config.keeps_attention
    return Means(method.router, config.stream_chunk_size, host, method.sums_dtype, keeps, head is not None, method.listeners)


def connected(stream: ChunkStream, head: Head | None) -> Any:
    """The output of the body, whose backward is the stream's; the head is given the matrix that it shares with the embedding."""
    outputs = list(replayed(stream))
    if stream.shares_matrix:
        assert head is not None  # who shares it
        head.matrix = outputs.pop()
    return stream.outputs.rebuilt(outputs, stream.call.encoder_output)
