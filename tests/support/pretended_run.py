"""A step of one method after the other on a pretended CUDA device, against the same on the CPU: a line of JSON each. See `pretended_cuda`."""

import copy
import json
import sys
from tempfile import TemporaryDirectory

import torch
import torch._inductor  # which asks for more of CUDA than is pretended
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from hf_memtune import (
    MemEfficientTrainer,
    MemEfficientTrainingArguments,
    ReversibleConfig,
    Streaming,
    StreamingConfig,
    TokenSeeking,
    TokenSeekingConfig,
    checkpoint_in_two_levels,
    make_reversible,
)  # fmt: skip
from tests.support.pretended_cuda import SYNCS, OnCuda, chosen, moved, pretended
from tests.support.runs import llama, pad_right, text_rows

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
    "offloaded by chunks": (checkpointed(streaming(kv_offload=True, stream_order="chunks")), "as they are", torch.float32),
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


def losses(device: str | None = None) -> list[float]:
    """Of a MemEfficientTrainer with streaming and all that is on by itself on a GPU, such as a preflight; and of a plain one on the CPU."""
    settings = {"sequence_chunk_size": 8} if device else {"use_cpu": True}
    with TemporaryDirectory() as folder:
        fixed = {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "report_to": [],
        }
        arguments = MemEfficientTrainingArguments(folder, disable_tqdm=True, dataloader_pin_memory=False, **fixed, **settings)
        trainer = MemEfficientTrainer(model=llama(), args=arguments, train_dataset=text_rows(8), data_collator=pad_right)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    assert device is None or arguments.device.type == device and trainer.preflight.report is not None
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainers() -> dict:
    on_cpu = losses()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pretended(), chosen():
        return {"case": "trainer", "cpu": on_cpu, "cuda": losses("cuda")}


def refused() -> str:
    with pretended():
        try:
            moved(torch.ones(3)) + torch.ones(3)
        except RuntimeError as error:
            return str(error)
    return "nothing"


if __name__ == "__main__":
    print(json.dumps({"refused": refused()}))
    print(json.dumps(trainers()))
    for each in sys.argv[1:] or CASES:
        print(json.dumps(case(each)), flush=True)
