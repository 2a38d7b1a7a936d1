"""Exact streaming on a model that FSDP2 shards: `accelerate launch ... fsdp_script.py FOLDER`, by two processes.

First single steps on models that `fully_shard` was called on, laid out in several ways; the rows of process 0 are longer than those of
process 1. Then short runs of trainers under accelerate's FSDP2. Process 0 leaves what was found in FOLDER.
"""

import gc
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments, Streaming, StreamingCallback, StreamingConfig  # noqa: E402
from hf_memtune.core.head_call import HeadOnDemand  # noqa: E402
from hf_memtune.methods.streaming import sharded  # noqa: E402
from tests.support.patience import COLLECTIVE  # noqa: E402
from tests.support.runs import arguments, exact_model, text_rows, trainer_for  # noqa: E402
from tests.support.tiny_models import VOCABULARY, tiny_model  # noqa: E402

PROCESSES, CHUNK = 2, 7

# -- single steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One optimizer step.

    layout: which modules are units. calls: for each micro-batch the calls of the model, and of each call the tokens of a row in process 0
    and in process 1. defers: whether only the last micro-batch reduces. is_sharded_first: before the method comes.
    """

    model: str = "gpt2"
    layout: str = "accelerate"
    reshard: bool = True
    calls: tuple = (((24, 15),),)
    defers: bool = False
    is_sharded_first: bool = False
    takes_own_loss: bool = False
    checkpointing: str | None = None
    dropout: float = 0.0
    is_replicated: bool = False
    offloads: bool = False
    keeps_attention: bool = False
    changed: dict = field(default_factory=dict)


TWO = (((24, 15), (12, 20)),)
CASES = {
    "whole": Case(),
    "whole kept": Case(reshard=False),
    "sharded first": Case(is_sharded_first=True),
    "untied": Case("llama"),
    "tied llama": Case("llama", changed={"tie_word_embeddings": True}, reshard=False),
    "lora": Case("lora"),
    "lora sharded first, kept": Case("lora", reshard=False, is_sharded_first=True),
    "layers": Case("llama", "layers"),
    "parts of layers": Case("llama", "parts"),
    "body": Case("llama", "body"),
    "body kept": Case("llama", "body", reshard=False),
    "root alone": Case("llama", "root"),
    "head freed": Case("llama", "head"),
    "accumulated": Case(calls=(((24, 15),), ((9, 21),))),
    "accumulated, deferred": Case(calls=(((24, 15),), ((9, 21),)), defers=True),
    "checkpointed": Case("llama", checkpointing="transformers"),
    "checkpointed, kept": Case("llama", checkpointing="transformers", reshard=False),
    "lora checkpointed": Case("lora", checkpointing="transformers"),
    "layers in wrappers": Case("llama", checkpointing="torch"),
    "two calls": Case(calls=TWO),
    "two calls kept": Case("llama", calls=TWO, reshard=False),
    "two calls, lora, deferred": Case("lora", calls=TWO + (((10, 10), (17, 17)),), defers=True),
    "a short call first": Case("llama", calls=(((6, 5), (24, 15)),)),
    "a short call last": Case("llama", calls=(((24, 15), (6, 5)),)),
    "short calls": Case("llama", calls=(((6, 5),),)),
    "one chunk in one process": Case(calls=(((24, 6),),)),
    "one chunk in one process, kept": Case("llama", calls=(((24, 6),),), reshard=False),
    "embeddings given": Case("prompt", calls=TWO),
    "embeddings given, kept": Case("prompt", calls=TWO, reshard=False),
    "encoder and decoder": Case("bart", "layers"),
    "encoder and decoder, kept": Case("bart", "layers", reshard=False),
    "own loss": Case(takes_own_loss=True),
    "own loss, root alone": Case("llama", "root", takes_own_loss=True),
    "replicated": Case("llama", is_replicated=True, calls=(((24, 6), (5, 7)),)),
    "offloaded": Case(offloads=True),
    "attention kept": Case("llama", calls=TWO, keeps_attention=True),
    "attention kept, checkpointed": Case("llama", checkpointing="transformers", keeps_attention=True),
    "dropout": Case("llama", dropout=0.3),
    "dropout kept": Case("llama", dropout=0.3, reshard=False),
}


def lora_model() -> nn.Module:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), config)  # which seeds


class Prompted(nn.Module):
    """Embeds its tokens, and a trained prompt before them, in front of the model: as multimodal ones do."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.prompt = inner, nn.Parameter(torch.randn(1, 5, 32, dtype=torch.float64))

    def forward(self, input_ids):
        embedded = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=torch.cat([self.prompt.expand(len(input_ids), -1, -1), embedded], 1))


def model_of(case: Case) -> nn.Module:
    if case.model == "lora":
        model = lora_model()
    else:
        names = {"prompt": "llama"}
        model = tiny_model(names.get(case.model, case.model), attention_dropout=case.dropout, **case.changed)
    if case.checkpointing == "transformers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if case.model == "lora":
            model.enable_input_require_grads()
    return Prompted(model).train() if case.model == "prompt" else model.train()


def causal_of(model: nn.Module) -> nn.Module:
    """The transformers model with its head."""
    return model.get_base_model() if hasattr(model, "peft_config") else getattr(model, "inner", model)


def layers_of(body: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == 3]
    return [(layers, number) for layers in lists for number in range(len(layers))]


def shard(model: nn.Module, case: Case, **policy) -> nn.Module:
    """As accelerate lays units out, or in another way. Returns the model."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shape = {"mesh_shape": (PROCESSES,)}
    if case.is_replicated:
        shape = {"mesh_shape": (PROCESSES, 1), "mesh_dim_names": ("copies", "shards")}
    mesh = init_device_mesh("cpu", **shape)
    part = partial(fully_shard, mesh=mesh, reshard_after_forward=case.reshard, **policy)
    causal = causal_of(model)
    body, head, embedding = causal.base_model, causal.get_output_embeddings(), causal.get_input_embeddings()
    for layers, number in [] if case.layout == "root" else layers_of(body):
        layer = layers[number]
        if case.checkpointing == "torch":
            layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
        if case.layout == "parts":
            part(layer.mlp)
        part(layer)
    if case.layout == "accelerate":
        norm = getattr(body, "norm", getattr(body, "ln_f", None))
        tied = head.weight is embedding.weight
        if not tied:
            part(embedding)
        tail = [module for module in (norm, embedding if tied else None, head) if module is not None]
        fully_shard(tail, mesh=mesh, reshard_after_forward=False, **policy)
    if case.layout == "body":
        part(body)
    if case.layout == "head":
        part(head)
    return fully_shard(model, mesh=mesh, **policy)


def batch_of(case: Case, process: int, call: tuple[int, int], number: int) -> dict:
    generator = torch.Generator().manual_seed(100 * number + process)
    ids = torch.randint(5, VOCABULARY, (2, call[process]), generator=generator)
    return {"input_ids": ids[:, :5], "decoder_input_ids": ids} if case.model == "bart" else {"input_ids": ids}


def loss_of(model: nn.Module, case: Case, process: int, calls: tuple, number: int) -> torch.Tensor:
    """Of one call, its cross entropy in float64; of two, something of both that is no sum over tokens."""
    losses = []
    for each, call in enumerate(calls):
        batch = batch_of(case, process, call, 10 * number + each)
        target = batch.get("decoder_input_ids", batch["input_ids"])[:, 1:].flatten()
        if case.takes_own_loss:
            losses.append(model(**batch, labels=batch["input_ids"]).loss)
            continue
        logits = model(**batch).logits
        losses.append(F.cross_entropy(logits[:, -call[process] : -1].flatten(0, 1), target))
    if len(losses) == 1:
        return losses[0]
    with torch.no_grad():
        model(**batch)  # a pass without gradient in between: of a reference model, say
    return losses[0] * losses[1] - F.logsigmoid(0.3 * (losses[0] - losses[1]))


def learn(model: nn.Module, case: Case, process: int) -> None:
    for number, calls in enumerate(case.calls):
        if case.defers and dist.is_initialized():
            model.set_requires_gradient_sync(number == len(case.calls) - 1)
        loss_of(model, case, process, calls, number).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def gradients_of(model: nn.Module) -> dict:
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters() if p.grad is not None)
    return {name: whole(p.grad) for name, p in named}


def expected_of(case: Case, seeds: bool = False) -> dict:
    """By one process, plainly, of the mean of both processes' losses. seeds: streamed, with the random numbers that each of them has."""
    total: dict = {}
    for process in range(PROCESSES):
        model = model_of(case)
        with streaming_on(causal_of(model)) if seeds else nullcontext():
            torch.manual_seed(process)
            for number, calls in enumerate(case.calls):
                (loss_of(model, case, process, calls, number) / PROCESSES).backward()
        for name, gradient in gradients_of(model).items():
            total[name] = total[name] + gradient if name in total else gradient
    return total


def streaming_on(model: nn.Module, **settings) -> Streaming:
    return Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK, **settings))


@dataclass
class Seen:
    """What FSDP2 did: reductions of a unit's gradients, gathers of its parameters, and the most units that were gathered at a time.

    dtypes: in which gradients were summed when they came to be reduced. losses: those that were taken without logits.
    """

    reductions: int = 0
    gathers: int = 0
    gathered: int = 0
    now: int = 0
    losses: int = 0
    dtypes: list[str] = field(default_factory=list)


@contextmanager
def watching():
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    seen, kind, lose = Seen(), module.FSDPParamGroup, HeadOnDemand.cross_entropy
    reduce, gather, to_unsharded, to_sharded = module.foreach_reduce, module.foreach_all_gather, kind._to_unsharded, kind._to_sharded

    def reducing(parameters, gradients, *args, **kwargs):
        seen.reductions += 1
        seen.dtypes = sorted({*seen.dtypes, *(str(gradient.dtype) for gradient in gradients)})
        return reduce(parameters, gradients, *args, **kwargs)

    def gathering(*args, **kwargs):
        seen.gathers += 1
        return gather(*args, **kwargs)

    def losing(*args):
        seen.losses += 1
        return lose(*args)

    def unsharded(self):
        seen.now += not self.is_unsharded
        seen.gathered = max(seen.gathered, seen.now)
        to_unsharded(self)

    def resharded(self):
        seen.now -= self.is_unsharded
        to_sharded(self)

    module.foreach_reduce, module.foreach_all_gather, kind._to_unsharded, kind._to_sharded = reducing, gathering, unsharded, resharded
    HeadOnDemand.cross_entropy = losing
    try:
        yield seen
    finally:
        HeadOnDemand.cross_entropy = lose
        module.foreach_reduce, module.foreach_all_gather, kind._to_unsharded, kind._to_sharded = reduce, gather, to_unsharded, to_sharded


def step(case: Case, process: int, streams: bool = True) -> dict:
    """Gradients of two steps alike, and what was seen in the second; streamed, or as FSDP2 does it plainly."""
    model = model_of(case)
    if case.is_sharded_first:
        shard(model, case)
    settings = {"kv_offload": case.offloads, "keep_attention_outputs": case.keeps_attention}
    method = streaming_on(model if case.is_sharded_first else causal_of(model), **settings) if streams else None
    if not case.is_sharded_first:
        shard(model, case)
    steps = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(process)
        with watching() as seen:
            learn(model, case, process)
        steps.append(gradients_of(model))
    units = [m for m in model.modules() if hasattr(m, "unshard")]
    groups = {group: None for m in units for group in m._get_fsdp_state()._fsdp_param_groups}
    trained = sum(any(p.sharded_param.requires_grad for p in group.fsdp_params) for group in groups)
    if method is not None:
        method.remove()
    return {"gradients": steps, "seen": vars(seen), "groups": len(groups), "trained": trained}


# -- more steps ----------------------------------------------------------------------------------------------------------


def failing_step(process: int, drops: bool) -> dict:
    """A step after one whose second chunk failed in backward. drops: whether the sums of the one that failed are dropped."""
    case, run, calls = CASES["whole"], sharded.ShardedStream._run, []
    model = model_of(case)
    method = streaming_on(model)
    shard(model, case)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room for a chunk")
        return run(*args, **kwargs)

    gathered = sharded.Units._gathered_parameters
    sharded.ShardedStream._run = fails
    sharded.Units._gathered_parameters = gathered if drops else lambda self: iter(())
    try:
        learn(model, replace(case, calls=(((24, 24),),)), process)
        raise AssertionError("no chunk failed")
    except MemoryError:
        pass
    finally:
        sharded.ShardedStream._run, sharded.Units._gathered_parameters = run, gathered
    model.reset_iter_state()
    model.zero_grad()
    learn(model, case, process)
    method.remove()
    return gradients_of(model)


def half_precision(process: int) -> dict:
    """Computed in bfloat16, reduced in float32: how far gradients are from those in float64, by the norm of all, and their sums' dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    case, found = Case("llama", calls=(((60, 45),),)), {}
    expected = expected_of(case)
    for name, streams in (("plain", False), ("streamed", True)):
        model = model_of(case).float()
        method = streaming_on(model) if streams else None
        shard(model, case, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        with watching() as seen:
            learn(model, case, process)
        gradients = gradients_of(model)
        apart = sum((gradients[name].double() - expected[name]).square().sum() for name in expected)
        found[name] = {"apart": float((apart / sum(g.square().sum() for g in expected.values())).sqrt()), "summed in": seen.dtypes}
        if method is not None:
            method.remove()
    return found


def late_logits() -> str:
    """What the values of logits say that are asked for after backward."""
    case = CASES["whole"]
    model = model_of(case)
    method = streaming_on(model)
    shard(model, case)
    outputs = model(**batch_of(case, 0, (24, 24), 0))
    outputs.logits[:, -1].sum().backward()  # values that are made before are kept
    kept = outputs.logits[0, 0, 0].item()
    outputs = model(**batch_of(case, 0, (24, 24), 0))
    F.cross_entropy(outputs.logits.flatten(0, 1), batch_of(case, 0, (24, 24), 0)["input_ids"].flatten()).backward()
    try:
        outputs.logits.sum()
    except Exception as error:
        return f"{kept == kept} {type(error).__name__}: {error}"
    finally:
        method.remove()
    return "nothing"


# -- trainers ------------------------------------------------------------------------------------------------------------

SHORT, LONG = text_rows(8, shortest=3, longest=6), text_rows(8, seed=5, shortest=20, longest=24)
ROWS = [*SHORT[:4], *LONG[:4], *LONG[4:], *SHORT[4:]]  # in the first step those of process 0 are one chunk, in the second those of 1
# model, accumulation, environment of accelerate
RUNS = {
    "whole": (exact_model, 1, {}),
    "kept": (exact_model, 1, {"FSDP_RESHARD_AFTER_FORWARD": "false"}),
    "accumulated": (exact_model, 2, {}),
    "lora": (lora_model, 2, {}),
    "checkpointed": (exact_model, 1, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}),
}


class Recorder(TrainerCallback):
    """The gradients with which each optimizer step is taken, and how often units were reduced for it."""

    def __init__(self, seen: Seen):
        self.seen, self.steps, self.reductions = seen, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(gradients_of(model))
        self.reductions.append(self.seen.reductions - sum(self.reductions))


def run(kind: str, name: str, folder: Path, resume: str | None = None, **settings) -> dict:
    """kind: plain, callback (a plain Trainer with it) or trainer (MemEfficientTrainer)."""
    from accelerate import DistributedType, PartialState

    make_model, accumulation, environment = RUNS[name]
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    own = {"cls": MemEfficientTrainingArguments, "sequence_chunk_size": CHUNK} if kind == "trainer" else {}
    args = arguments(folder, False, train_sampling_strategy="sequential", **sizes, **own, **settings)
    # accelerate 1.15 turns FSDP on for GPUs of every make, and leaves CPUs to DistributedDataParallel without a word
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(environment)
    try:
        with watching() as seen:
            recorder = Recorder(seen)
            method = [StreamingCallback(sequence_chunk_size=CHUNK)] if kind == "callback" else []
            cls = MemEfficientTrainer if kind == "trainer" else Trainer
            trainer = trainer_for(make_model(), args, ROWS, cls, callbacks=[recorder, *method])
            trainer.train(resume_from_checkpoint=resume)
    finally:
        for variable in environment:
            os.environ[variable] = OUTSIDE.get(variable, "")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = {name: whole(p.detach()) for name, p in trainer.model.named_parameters()}
    units = sum(hasattr(m, "unshard") for m in trainer.model.modules())
    if "save_strategy" in settings and resume is None:
        trainer.save_model(str(folder / "final"))
    return {
        "gradients": recorder.steps, "reductions": recorder.reductions, "losses": losses, "parameters": parameters, "units": units,
        "gathers": seen.gathers, "fused": seen.losses,
    }  # fmt: skip


OUTSIDE = dict(os.environ)


def trainer_runs(folder: Path) -> dict:
    found = {name: {kind: run(kind, name, folder / kind / name) for kind in ("plain", "trainer")} for name in RUNS}
    found["whole"]["callback"] = run("callback", "whole", folder / "callback")
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
    found["saved"] = run("trainer", "whole", folder / "saved", **saving)
    found["saved plainly"] = run("plain", "whole", folder / "saved plainly", **saving)
    dist.barrier()
    found["resumed"] = run("trainer", "whole", folder / "saved", str(folder / "saved" / "checkpoint-1"), **saving)
    saving.pop("save_strategy")
    found["not resumed"] = run("trainer", "whole", folder / "not resumed", max_steps=1, **saving)
    return found


def main(folder: Path) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every run
    state = PartialState(cpu=True, timeout=timedelta(seconds=COLLECTIVE))  # processes that wait for each other in vain fail
    process, found = state.process_index, {"processes": state.num_processes}
    names = sys.argv[2:]
    found["steps"] = {name: step(case, process) for name, case in CASES.items() if not names or name in names}
    if not names:
        found["plain"] = {name: step(CASES[name], process, streams=False) for name in ("whole", "whole kept", "lora", "accumulated")}
        found["after a failure"] = {drops: failing_step(process, drops) for drops in (True, False)}
        found["half precision"], found["late logits"] = half_precision(process), late_logits()
        found["runs"] = trainer_runs(folder)
    if process == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()  # or a thread of it may outlive the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
