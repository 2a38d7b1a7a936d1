"""Configurations of well-known models, true in every size that memory depends on, for tracing without their weights."""

from collections.abc import Callable

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config


def _llama(layers: int, hidden: int, mlp: int, heads: int, head_dim: int, tied: bool) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )


def _qwen2(layers: int, hidden: int, mlp: int, heads: int, key_heads: int) -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=151936,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


def _qwen3(layers: int, hidden: int, mlp: int, heads: int) -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen2.5-0.5B": lambda: _qwen2(24, 896, 4864, 14, 2),
    "Llama-3.2-1B": lambda: _llama(16, 2048, 8192, 32, 64, tied=True),
    "Llama-3.2-3B": lambda: _llama(28, 3072, 8192, 24, 128, tied=True),
    "Llama-3.1-8B": lambda: _llama(32, 4096, 14336, 32, 128, tied=False),
    "Qwen3-4B": lambda: _qwen3(36, 2560, 9728, 32),
}
