"""Exact gradients in a stream, for any causal transformers model: near the memory of inference, at the cost of checkpointing.

    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=512))
    with streaming.step(batch) as step:
        for _ in step.turns():
            outputs = model(**step.inputs)
            (step.loss_sum(outputs) / step.loss_tokens).backward()
    ...
    streaming.remove()

The gradients of all parameters equal those of plain backpropagation. Alive at a time: the weights, keys and values of all tokens,
what is owed to them, and the activations of one chunk.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from hf_memtune.settings.methods import StreamingConfig
from hf_memtune.errors import ConfigError
from hf_memtune.methods.installed import InstalledStrategy
from hf_memtune.methods.streaming.streaming_step import StreamingStep


class Streaming(InstalledStrategy):
    """Exact streaming on one model, until `remove()`. Between steps nothing of the model is changed.

    model: a causal transformers model with a head, an encoder-decoder model (its decoder streams), or a PEFT model around one.
    sums_dtype: dtype of the sums of gradients that chunks owe to the keys and values of earlier ones; None: as they come, which in
    bfloat16 is as exact as plain training in bfloat16 (results/precision.jsonl), at half the bytes of float32.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    def __init__(
        self, model: nn.Module, config: StreamingConfig, check: bool = True, sums_dtype: torch.dtype | None = None
    ):
        if config.sequence_chunk_size is None:
            raise ConfigError(["sequence_chunk_size: got None, expected the tokens of a chunk, such as 512."])
        self.sums_dtype = sums_dtype
        super().__init__(model, config, check)

    def step(
        self, inputs: dict[str, Any], label_smoothing: float = 0.0, whole_logits: bool = False
    ) -> AbstractContextManager[StreamingStep]:
        """Open one step for a batch. Inside it, each of the step's `turns` calls the model (wrapped or not) with `step.inputs`.

        whole_logits: return logits instead of fusing head and loss (for loss functions of one's own).
        """
        self.router  # raises when removed
        return StreamingStep(self, inputs, label_smoothing, whole_logits).open()
