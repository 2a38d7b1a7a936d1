"""What is measured on a GPU, and the same in small for a CPU: models, lengths, chunks, methods, cards."""

from collections.abc import Callable
from dataclasses import dataclass

from methods import FUSED_LOSS, LOGIT_FREE, OFFLOADED
from transformers import LlamaConfig, PreTrainedConfig

from hf_memtune.memory.cards import CARDS, CONTEXT_BYTES
from hf_memtune.memory.shapes import SHAPES
from hf_memtune.units import GIB


@dataclass(frozen=True)
class Sizes:
    """models: whose bytes, seconds and longest rows are asked; exact_model: whose gradient. Tokens: of the one row of a batch.

    cards: bytes that the allocator of a process may have there. repeats: timed steps, where a step takes less than a second.
    without: methods that are left out.
    """

    models: dict[str, Callable[[], PreTrainedConfig]]
    exact_model: PreTrainedConfig
    exact_tokens: int
    exact_chunks: tuple[int, ...]
    step_tokens: tuple[int, ...]
    chunks: tuple[int, ...]
    cards: dict[str, int]
    repeats: int = 3
    without: tuple[str, ...] = ()

    @property
    def streamed(self) -> str:
        """The method that stands for streaming where one must."""
        return f"exact streaming {self.chunks[-1]} + checkpointing"

    @property
    def methods(self) -> list[str]:
        """First what is to be known first, should time run out."""
        streamed = [f"exact streaming {chunk}" for chunk in reversed(self.chunks)]
        found = [
            LOGIT_FREE,
            *(f"{name} + checkpointing" for name in streamed),
            "checkpointing",
            FUSED_LOSS,
            "plain",
            "seeking 0.1",
            *streamed,
        ]
        by_chunks = f"{self.streamed}, by chunks"
        found += [f"{self.streamed}, attention kept", self.streamed + OFFLOADED, by_chunks, by_chunks + OFFLOADED]
        return [name for name in found if name not in self.without]


def _card(name: str) -> int:
    """Of a whole card, less what a process loses beside its allocator; the allocator's own share is lost as it is."""
    return CARDS[name] * GIB - CONTEXT_BYTES


def _llama(layers: int, width: int, heads: int, vocabulary: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=131072,
    )  # fmt: skip


LARGE = Sizes(
    models={name: SHAPES[name] for name in ("Llama-3.2-1B", "Llama-3.1-8B")},
    exact_model=_llama(4, 512, 8, 4096),
    exact_tokens=4096,
    exact_chunks=(256, 1000, 2048),  # one that does not divide the row
    step_tokens=(2048, 8192, 16384, 32768, 65536),
    chunks=(512, 1024, 2048),
    cards={"24 GiB": _card("rtx4090"), "80 GiB": _card("h100")},
)
TINY = Sizes(
    models={"tiny": lambda: _llama(2, 32, 4, 64)},
    exact_model=_llama(2, 32, 4, 64),
    exact_tokens=24,
    exact_chunks=(7,),
    step_tokens=(48,),
    chunks=(16,),
    cards={"small": 200_000},
    repeats=1,
    without=("exact streaming 16",),
)
