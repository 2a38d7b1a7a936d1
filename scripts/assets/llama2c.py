"""llama2.c checkpoints as transformers folders: flat weights and scored pieces become a Llama and its tokenizer.

Format: https://github.com/karpathy/llama2.c, run.c (`Config`, `memory_map_weights`, `build_tokenizer`).
Shape letters: D model width, F feed-forward width, L layers, H heads, K key-value heads, V vocabulary, S positions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fi")  # score, length in bytes; the text follows
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "\u2581"  # sentencepiece writes a space so
FIRST_MERGED = 259  # three special pieces and 256 single bytes come before it


@dataclass(frozen=True)
class Header:
    """The seven integers in front of the weights."""

    D: int
    F: int
    L: int
    H: int
    K: int
    V: int
    S: int
    tied: bool

    @classmethod
    def read(cls, checkpoint: bytes) -> Header:
        # the sign of the vocabulary's size tells whether the output head is the embedding
        D, F, L, H, K, signed_V, S = HEADER.unpack_from(checkpoint)
        return cls(D, F, L, H, K, abs(signed_V), S, tied=signed_V > 0)

    @property
    def head_dim(self) -> int:
        return self.D // self.H

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor, in the order of the file."""
        D, F, L, V, half = self.D, self.F, self.L, self.V, self.head_dim // 2
        queries, keys = self.H * self.head_dim, self.K * self.head_dim
        yield "embedding", (V, D)
        yield "attention_norm", (L, D)
        yield "q", (L, queries, D)
        yield "k", (L, keys, D)
        yield "v", (L, keys, D)
        yield "o", (L, D, queries)
        yield "mlp_norm", (L, D)
        yield "gate", (L, F, D)
        yield "down", (L, D, F)
        yield "up", (L, F, D)
        yield "norm", (D,)
        yield "rope_cos", (self.S, half)  # both are tables that transformers computes itself
        yield "rope_sin", (self.S, half)
        if not self.tied:
            yield "head", (V, D)


def convert(checkpoint: bytes, pieces: bytes, folder: Path) -> None:
    """Write the checkpoint and its tokenizer to `folder`, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    header = Header.read(checkpoint)
    save_model(header, read_tensors(header, checkpoint), folder)
    save_tokenizer(*read_pieces(pieces, header.V), folder)


def read_tensors(header: Header, checkpoint: bytes) -> dict:
    """The checkpoint's tensors by name; raises ValueError unless they fill the file exactly."""
    import torch

    flat = torch.frombuffer(bytearray(checkpoint), dtype=torch.float32, offset=HEADER.size)
    shapes = dict(header.tensors())
    if sum(map(prod, shapes.values())) != flat.numel():
        raise ValueError(f"checkpoint: {flat.numel()} floats, its header promises {sum(map(prod, shapes.values()))}")
    parts = flat.split([prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}


def save_model(header: Header, tensors: dict, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama_config(header))
    model.load_state_dict(state_dict(header, tensors), strict=True)
    model.save_pretrained(folder)


def llama_config(header: Header):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=header.V,
        hidden_size=header.D,
        intermediate_size=header.F,
        num_hidden_layers=header.L,
        num_attention_heads=header.H,
        num_key_value_heads=header.K,
        max_position_embeddings=header.S,
        rms_norm_eps=1e-5,
        tie_word_embeddings=header.tied,
        bos_token_id=1,
        eos_token_id=2,
    )


def state_dict(header: Header, tensors: dict) -> dict:
    """The tensors under transformers' names."""
    named = {
        "model.embed_tokens.weight": tensors["embedding"],
        "model.norm.weight": tensors["norm"],
        "lm_head.weight": tensors.get("head", tensors["embedding"]),
    }
    for layer in range(header.L):
        for name, tensor in layer_tensors(header, tensors, layer):
            named[f"model.layers.{layer}.{name}.weight"] = tensor
    return named


def layer_tensors(header: Header, tensors: dict, layer: int) -> Iterator[tuple[str, object]]:
    yield "self_attn.q_proj", halves_from_pairs(tensors["q"][layer], header.head_dim)
    yield "self_attn.k_proj", halves_from_pairs(tensors["k"][layer], header.head_dim)
    yield "self_attn.v_proj", tensors["v"][layer]
    yield "self_attn.o_proj", tensors["o"][layer]
    yield "mlp.gate_proj", tensors["gate"][layer]
    yield "mlp.down_proj", tensors["down"][layer]
    yield "mlp.up_proj", tensors["up"][layer]
    yield "input_layernorm", tensors["attention_norm"][layer]
    yield "post_attention_layernorm", tensors["mlp_norm"][layer]


def halves_from_pairs(weight_OD, head_dim: int):
    """Reorder each head's rows: llama2.c rotates neighbours (2i, 2i+1), transformers rotates (i, i + head_dim/2)."""
    rows, width = weight_OD.shape
    pairs = weight_OD.view(rows // head_dim, head_dim // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def read_pieces(raw: bytes, count: int) -> tuple[list[str], list[float]]:
    """The vocabulary in id order and the score of each piece; raises ValueError unless the file ends with the last."""
    texts, scores, offset = [], [], 4  # the first four bytes hold the longest piece's length
    for _ in range(count):
        score, length = PIECE.unpack_from(raw, offset)
        offset += PIECE.size
        texts.append(raw[offset : offset + length].decode("utf-8"))
        scores.append(score)
        offset += length
    if offset != len(raw):
        raise ValueError(f"piece list: {len(raw)} bytes, {count} pieces take {offset}")
    return [piece_name(i, text) for i, text in enumerate(texts)], scores


def piece_name(index: int, text: str) -> str:
    """How sentencepiece names the piece that llama2.c stores as `text`."""
    if index < 3:
        return (UNKNOWN, BOS, EOS)[index]
    if index < FIRST_MERGED:
        return f"<0x{index - 3:02X}>"
    return text.replace(" ", SPACE)


def save_tokenizer(pieces: list[str], scores: list[float], folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"piece list: {len(pieces) - len(vocab)} pieces occur twice")
    bpe = models.BPE(vocab, merges(vocab, scores), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = with_sentencepiece_spaces(Tokenizer(bpe))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, pad_token=EOS).save_pretrained(
        folder
    )


def merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that make each merged piece, best score first: the order in which llama2.c merges greedily."""
    ranked = []
    for piece, index in vocab.items():
        if index < FIRST_MERGED:
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked += [(scores[index], pair) for pair in known]
    ranked.sort(key=lambda entry: -entry[0])
    return [pair for _, pair in ranked]


def with_sentencepiece_spaces(tokenizer):
    """Spaces as sentencepiece treats them (one in front, written visibly), and the sequence start in front of all."""
    from tokenizers import AddedToken, decoders, normalizers, processors

    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)])
    return tokenizer
