"""One training step of exact streaming: all tokens learn, the activations of one chunk are alive at a time."""

from torch import Tensor

from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from hf_memtune.methods.model_step import ModelStep
from hf_memtune.methods.attention.passes import Records


class StreamingStep(ModelStep):
    """The state of one step. Made by `Streaming.step`."""

    def begin(self, call: BodyCall) -> None:
        self.stream = ChunkStream(self.strategy, call, self.config.stream_chunk_size)
        per_row = not self.architecture.task.loss_per_token
        self._context_output = self.stream.store_context(Records({}, wanted=False), last_too=per_row, keep_output=per_row)
        self.learned_target = self.target

    def next_turn(self, call: BodyCall):
        return self.stream_turn(self.target, None, self._context_output)

    def token_counts(self) -> dict[str, Tensor | int]:
        """Tokens of this step, for the logs: real ones."""
        return {"seen": sum(rows.real_tokens() for rows in self._call.rows.values())}
