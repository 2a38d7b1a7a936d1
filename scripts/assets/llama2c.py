"""llama2.c checkpoints as transformers folders: flat weights and scored pieces become a Llama and its tokenizer.

Format: https://github.com/karpathy/llama2.c, run.c (`Config`, `memory_map_weights`, `build_tokenizer`).
Shape letters: D model width, F feed-forward width, L layers, H heads, K key-value heads, V vocabulary, S positions.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path

HEADER = struct.Struct("<7i")
PIECE = struct.Struct("<fi")  # score, length in bytes; the text follows
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
SPACE = "\u2581"  # sentencepiece writes a space so
FIRST_MERGED = 259  # three special pieces and 256 single bytes come before it


def convert(checkpoint: bytes, pieces: bytes, folder: Path) -> None:
    """Write the checkpoint and its tokenizer to `folder`, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    from transformers import LlamaForCausalLM

    config, tensors = read_config(checkpoint), read_tensors(checkpoint)
    model = LlamaForCausalLM(config)
    model.load_state_dict(tensors, strict=True)
    model.save_pretrained(folder)
    save_tokenizer(*read_pieces(pieces, config.vocab_size), folder)


def read_header(checkpoint: bytes) -> tuple[dict[str, int], bool]:
    """The seven integers in front of the weights; the sign of the vocabulary's size tells whether the output head is the embedding."""
    sizes = dict(zip("DFLHKVS", HEADER.unpack_from(checkpoint)))
    return sizes | {"V": abs(sizes["V"])}, sizes["V"] > 0


def read_config(checkpoint: bytes):
    from transformers import LlamaConfig

    sizes, tied = read_header(checkpoint)
    return LlamaConfig(
        hidden_size=sizes["D"], intermediate_size=sizes["F"], num_hidden_layers=sizes["L"], num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["K"], vocab_size=sizes["V"], max_position_embeddings=sizes["S"], rms_norm_eps=1e-5,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def layout(checkpoint: bytes) -> dict[str, tuple[int, ...]]:
    """transformers' names of the tensors, and their shapes, in the order of the file. A * stands for the number of the layer."""
    sizes, tied = read_header(checkpoint)
    D, F, L, H, K, V, S = sizes.values()
    size = D // H
    layers = {
        "input_layernorm": (D,), "self_attn.q_proj": (H * size, D), "self_attn.k_proj": (K * size, D), "self_attn.v_proj": (K * size, D),
        "self_attn.o_proj": (D, H * size), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.down_proj": (D, F),
        "mlp.up_proj": (F, D),
    }  # fmt: skip
    found = {"model.embed_tokens.weight": (V, D)} | {f"model.layers.*.{name}.weight": (L, *shape) for name, shape in layers.items()}
    found |= {"model.norm.weight": (D,), "cosines": (S, size // 2), "sines": (S, size // 2)}  # which transformers computes itself
    return found if tied else found | {"lm_head.weight": (V, D)}


def read_tensors(checkpoint: bytes) -> dict:
    """The checkpoint's tensors as a state dict; raises ValueError unless they fill the file exactly."""
    import torch

    flat, shapes = torch.frombuffer(bytearray(checkpoint), dtype=torch.float32, offset=HEADER.size), layout(checkpoint)
    if sum(map(prod, shapes.values())) != flat.numel():
        raise ValueError(f"checkpoint: {flat.numel()} floats, its header promises {sum(map(prod, shapes.values()))}")
    found, sizes = {}, read_header(checkpoint)[0]
    for (name, shape), part in zip(shapes.items(), flat.split([prod(shape) for shape in shapes.values()])):
        if name in ("cosines", "sines"):
            continue
        whole = part.view(shape)
        if "q_proj" in name or "k_proj" in name:
            whole = halves_from_pairs(whole, sizes["D"] // sizes["H"])
        found |= {name.replace("*", str(n)): whole[n] for n in range(sizes["L"])} if "*" in name else {name: whole}
    return {"lm_head.weight": found["model.embed_tokens.weight"]} | found


def halves_from_pairs(weight_LOD, head_dim: int):
    """Reorder each head's rows: llama2.c rotates neighbours (2i, 2i+1), transformers rotates (i, i + head_dim/2)."""
    layers, rows, width = weight_LOD.shape
    pairs = weight_LOD.view(layers, rows // head_dim, head_dim // 2, 2, width)
    return pairs.transpose(2, 3).reshape(layers, rows, width)


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
    if index < FIRST_MERGED:
        return (UNKNOWN, BOS, EOS)[index] if index < 3 else f"<0x{index - 3:02X}>"
    return text.replace(" ", SPACE)


def save_tokenizer(pieces: list[str], scores: list[float], folder: Path) -> None:
    """Spaces as sentencepiece treats them (one in front, written visibly), and the sequence start in front of all."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"piece list: {len(pieces) - len(vocab)} pieces occur twice")
    tokenizer = Tokenizer(models.BPE(vocab, merges(vocab, scores), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)])
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": EOS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that make each merged piece, best score first: the order in which llama2.c merges greedily."""
    ranked = []
    for piece, index in vocab.items():
        if index >= FIRST_MERGED:
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(left, right) for left, right in splits if left in vocab and right in vocab]
            ranked += [(scores[index], pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    return [pair for _, pair in sorted(ranked, key=lambda entry: -entry[0])]
