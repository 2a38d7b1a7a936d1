"""A step of one method after the other on a pretended CUDA device, against the same on the CPU: a line of JSON each. See `pretended_cuda`."""

import copy
import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_memtune import (
    ReversibleConfig,
    Streaming,
    StreamingConfig,
    TokenSeeking,
    TokenSeekingConfig,
    checkpoint_in_two_levels,
    make_reversible,
)  # fmt: skip
from tests.support.pretended_cuda import SYNCS, OnCuda, moved, pretended

TOKENS, CHUNK = 40, 7  # rows of a chunk's mask do not begin where kernels can read


def streaming(**settings):
    return lambda model: Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK, **settings))


def seeking(**settings):
    return lambda model: TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_ratio=0.3, **settings))


def checkpointed(install):
    def go(model):
        model.activation_checkpointing_enable({"use_reentrant": False})
        return install(model)

    return go


def reversible(model):
    torch.manual_seed(5)
    return make_reversible(model, ReversibleConfig(reversible="centred"))


CASES = {
    "plain": (lambda model: None, "padded", torch.float32),
    "streaming by layers": (streaming(stream_order="layers"), "as they are", torch.bfloat16),
    "padded rows by layers": (streaming(stream_order="layers"), "padded", torch.bfloat16),
    "padded rows by chunks": (streaming(stream_order="chunks"), "padded", torch.float32),
    "packed rows": (streaming(), "packed", torch.bfloat16),
    "attention kept": (checkpointed(streaming(keep_attention_outputs=True)), "as they are", torch.bfloat16),
    "offloaded": (checkpointed(streaming(kv_offload=True)), "as they are", torch.float32),
    "token seeking": (seeking(), "padded", torch.float32),
    "token seeking, streamed": (
        seeking(token_scorer="combined", token_gradient="stream", sequence_chunk_size=CHUNK),
        "padded",
        torch.float32,
    ),
    "two levels": (checkpoint_in_two_levels, "padded", torch.float32),
    "reversible layers": (reversible, "padded", torch.float32),
}


def rows(kind: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
    if kind == "padded":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 29:], batch["labels"][1, 29:] = 0, -100
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(17), torch.arange(TOKENS - 17)]).expand(2, -1)
    return batch


def step(model, install, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The second of two: before the first, methods probe the model."""
    install(model.train())
    for _ in range(2):
        SYNCS.clear()
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**batch).loss
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def case(name: str) -> dict:
    """How far loss and gradients are from those on the CPU, relative, and what the processor waited for."""
    install, kind, dtype = CASES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model, batch = LlamaForCausalLM(config).to(dtype), rows(kind)
    loss, gradients = step(copy.deepcopy(model), install, batch)
    with pretended():
        found, on_cuda = step(moved(model), install, {name: moved(value) for name, value in batch.items()})
    assert isinstance(found, OnCuda) and on_cuda.keys() == gradients.keys()
    far = [((on_cuda[name].inner - g).float().norm() / g.float().norm()).item() for name, g in gradients.items()]
    return {"case": name, "loss": abs(found.inner - loss).item(), "gradients": max(far), "syncs": dict(SYNCS)}


def refused() -> str:
    with pretended():
        try:
            moved(torch.ones(3)) + torch.ones(3)
        except RuntimeError as error:
            return str(error)
    return "nothing"


if __name__ == "__main__":
    print(json.dumps({"refused": refused()}))
    for each in sys.argv[1:] or CASES:
        print(json.dumps(case(each)), flush=True)
