"""Settings of exact streaming, as flat dataclass fields: they become CLI flags and YAML keys under the same names.

Each help text says the unit and what a larger value does. `problems()` lists everything that cannot work.
"""

from dataclasses import dataclass

from hf_memtune.settings.protocol import MethodSettings, setting
from hf_memtune.units import parse_bytes

AUTO = "auto"
STREAM_ORDERS = ("chunks", "layers")


@dataclass
class StreamingConfig(MethodSettings):
    """Settings of exact streaming: backward of a causal model in chunks of its rows."""

    sequence_chunk_size: int | str | None = setting(
        None,
        "Exact streaming backward of causal models: forward in chunks of this many tokens of each row, backward from the last "
        "chunk to the first, so that the activations of one chunk are alive at a time. Gradients equal those of plain training. "
        "Smaller: less memory, more kernel launches. A row that is no longer than a chunk runs whole, and its loss is computed without the logits of all tokens. auto: the fastest size whose step on the "
        "longest batch is predicted to fit (chunk_budget), timed before step 0; a resumed run keeps it. Default: off.",
    )
    chunk_budget: str | None = setting(
        None,
        "With sequence_chunk_size=auto: most bytes that the tensors of a step may take, weights and optimizer included, such as 8GiB. "
        "Default: what is free, less an allowance.",
    )
    stream_order: str | None = setting(
        None,
        "With sequence_chunk_size, the order of the work. chunks: each chunk runs through all layers; keys, values and their gradients are kept for "
        "all layers. layers: each layer runs for all chunks; the inputs of the layers are kept. With activation_checkpointing a step on a CPU took a tenth to "
        "a quarter less time by layers. Default: layers with activation_checkpointing, if the model's layers can run by themselves and it keeps at "
        "most a quarter more bytes; else chunks.",
        STREAM_ORDERS,
    )
    kv_offload: bool = setting(
        False,
        "With sequence_chunk_size, or token_gradient=stream or skip, on a GPU: keep the keys and values of all tokens, and the "
        "gradients summed for them, in pinned host memory, with two blocks of 2048 tokens of a layer on the GPU. Memory of the GPU then hardly "
        "grows with the row; every chunk copies the keys, values and sums of the tokens before it over the bus. By layers (stream_order): the "
        "inputs of the layers, each of which is copied there once and back three times; keys, values and sums of one layer stay on the GPU, which "
        "needs some 17 KB for each token of an 8B model then.",
    )

    keep_attention_outputs: bool = setting(
        False,
        "With sequence_chunk_size, or token_gradient=stream: keep what attention gave in forward, which backward then does not compute again (selective activation "
        "checkpointing). Of long rows, whose time is mostly attention, a step is shorter, most of all by layers; it needs as many bytes a token more as the hidden "
        "states of all layers take. With kv_offload they are in host memory.",
    )

    def __post_init__(self) -> None:
        self._fill()
        super().__post_init__()

    def _fill(self) -> None:
        """Values as they are used: a parser of a field that may be a word hands numbers on as words."""
        if isinstance(self.sequence_chunk_size, str) and self.sequence_chunk_size.isdecimal():
            self.sequence_chunk_size = int(self.sequence_chunk_size)

    @property
    def streams(self) -> bool:
        """Whether backward goes through the rows in chunks."""
        return self.sequence_chunk_size is not None

    @property
    def chunk_is_open(self) -> bool:
        """Whether the size of chunks is still to be chosen, which a trainer does before step 0."""
        return self.sequence_chunk_size == AUTO

    @property
    def stream_chunk_size(self) -> int | None:
        """Tokens of each row in a chunk of streaming, or None where nothing streams, or the size is still open."""
        return self.sequence_chunk_size if self.streams and isinstance(self.sequence_chunk_size, int) else None

    @property
    def keeps_attention(self) -> bool:
        """Whether what attention gave in forward is kept for backward."""
        return self.keep_attention_outputs and self.streams

    @property
    def switch(self) -> str | None:
        """Name of the setting that turns the strategy on, or None where none is on."""
        return "sequence_chunk_size" if self.streams else None

    @property
    def streamed_by(self) -> str | None:
        """Name of the setting that makes backward stream, or None."""
        return self.switch if self.streams else None

    @property
    def is_mean_of_kept(self) -> bool:
        """Whether the loss is the mean over the tokens kept; streaming keeps all, and a sample stands for all."""
        return False

    def problems(self) -> list[str]:
        size, found = self.sequence_chunk_size, []
        if not (size is None or size == AUTO or (type(size) is int and size >= 1)):
            found.append(f"sequence_chunk_size: got {size!r}, expected 1 token or more, or auto. Leave it out to turn streaming off.")
        try:
            if self.chunk_budget is not None and parse_bytes(self.chunk_budget) <= 0:
                found.append(f"chunk_budget: got {self.chunk_budget!r}, expected more than 0 bytes.")
        except ValueError as error:
            found.append(f"chunk_budget: {error}.")
        if self.stream_order not in (None, *STREAM_ORDERS):
            found.append(f"stream_order: got {self.stream_order!r}, expected one of {STREAM_ORDERS}. Leave it out for the better one.")
        return found + super().problems()

    def ineffective(self) -> dict[str, str]:
        given = (
            ("kv_offload", self.kv_offload),
            ("stream_order", self.stream_order is not None),
            ("keep_attention_outputs", self.keep_attention_outputs),
        )
        own = {name: "without sequence_chunk_size" for name, is_given in given if is_given and not self.streams}
        if self.chunk_budget is not None and not self.chunk_is_open:
            own["chunk_budget"] = "without sequence_chunk_size=auto"
        return own | super().ineffective()
