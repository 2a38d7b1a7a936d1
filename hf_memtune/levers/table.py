"""The table: every lever, exact ones first. Refusals, the ladder of a budget, advice, savings and the watch over a step read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hf_memtune.levers import judgements, offers
from hf_memtune.levers.facts import Idle, Run, Seen, Settings, checkpoint_names, checkpoints, optimizer_name
from hf_memtune.levers.lever import Lever, Offer

DATA_PARALLEL = "use plain data parallelism (accelerate launch --multi_gpu)"
_FSDP1 = (
    "version 1 reduces a gradient, and frees it, as soon as one chunk has found its part of it; set fsdp_version to 2 (accelerate to-fsdp2 "
    f"rewrites a config), or {DATA_PARALLEL}"
)
_FSDP_SEEKING = (
    "each process runs as many passes as its own tokens need, and single layers by themselves to score them, while FSDP gathers "
    f"parameters in all processes in step; use sequence_chunk_size without token_seeking, which works with FSDP2, or {DATA_PARALLEL}"
)
_FSDP_LAYERS = f"gradients under FSDP2 are tested, but saving and resuming of sharded adapters and layers are not written; {DATA_PARALLEL}"
OF_METHODS = {
    "deepspeed": f"it keeps parameters and gradients in ways of its own, under which no method has been shown to be exact; {DATA_PARALLEL}",
    "parallelism_config": DATA_PARALLEL,
    "torch_compile": "leave it out: compiled code would keep the model's own forward, or be compiled anew for every chunk",
    "use_liger_kernel": "leave it out: the head and its loss are fused here, and its kernels have not been shown to be exact in chunks",
    "neftune_noise_alpha": "leave it out: its noise is scaled by the number of tokens that run at a time, which is another one in chunks",
}
_ALREADY = "set it to False: the layers keep no activations as it is"
_OF_LAYERS = {
    "deepspeed": DATA_PARALLEL,
    "parallelism_config": DATA_PARALLEL,
    "torch_compile": "leave it out",
    "use_liger_kernel": "leave it out: it changes what runs inside the layers",
    "activation_checkpointing": _ALREADY,
    "gradient_checkpointing": _ALREADY,
}
_STREAMED_LAYERS = (
    "streaming runs each layer once a chunk, and what is rounded in a chunk has not been shown to be what is rounded in the whole row; "
    "leave one out (token_gradient=cut works with reversible)"
)
_NO_STREAM = {"sequence_chunk_size": None, "stream_order": None, "kv_offload": False, "keep_attention_outputs": False}


def _offloaded(args: Settings) -> str:
    return ", kv_offload" if args.kv_offload and args.streams else ""


def _seeking(args: Settings) -> str:
    """A scorer that was left open is another one for some models."""
    is_open = args.preset is None and "token_scorer" not in args.given
    scorer = "" if is_open else f", token_scorer={args.token_scorer}"
    kept = f"token_ratio={args.token_ratio:g}{scorer}" + ("" if args.threshold is None else f", profit_threshold={args.threshold:g}")
    if args.token_selection == "labelled":
        kept = "token_selection=labelled"
    weight = "" if args.token_weight == "none" else f", token_weight={args.token_weight}"
    return f"token_seeking, {kept}, token_gradient={args.token_gradient}{weight}"


def _order(args: Settings) -> str:
    order = f", stream_order={args.stream_order}" if args.stream_order else ""
    return order + (", keep_attention_outputs" if args.keep_attention_outputs else "")


STREAMING = Lever(
    "sequence_chunk_size",
    is_on=lambda args: args.streams and not args.token_seeking,
    written=lambda args: f"sequence_chunk_size={args.sequence_chunk_size}" + _order(args) + _offloaded(args),
    off=lambda args: _NO_STREAM,
    offers=offers.streaming,
    judge=judgements.ran_in_chunks,
    excludes=lambda args: OF_METHODS,
    sharded=_FSDP1,
    fsdp2=True,
)
SEEKING = Lever(
    "token_seeking",
    is_on=lambda args: args.token_seeking,
    written=lambda args: _seeking(args) + (f", sequence_chunk_size={args.stream_chunk_size}" if args.streams else "") + _offloaded(args),
    off=lambda args: {"token_seeking": False} | _NO_STREAM,
    offers=offers.token_seeking,
    judge=judgements.left_tokens_out,
    excludes=lambda args: OF_METHODS,
    sharded=_FSDP_SEEKING,
)
REVERSIBLE = Lever(
    "reversible",
    is_on=lambda args: args.is_reversible,
    written=lambda args: f"reversible={args.reversible}",
    judge=judgements.runs_again("reversible"),
    excludes=lambda args: _OF_LAYERS | ({by: _STREAMED_LAYERS} if (by := getattr(args, "streamed_by", None)) else {}),
    sharded=_FSDP_LAYERS,
)
CHECKPOINT_LEVELS = Lever(
    "checkpoint_levels",
    is_on=lambda args: bool(args.checkpoint_levels),
    written=lambda args: f"checkpoint_levels={args.checkpoint_levels}",
    off=lambda args: {"checkpoint_levels": None},
    judge=judgements.runs_again("checkpoint_levels"),
    excludes=lambda args: (
        _OF_LAYERS | ({"reversible": "it keeps no inputs; leave one out"} if getattr(args, "is_reversible", False) else {})
    ),
    sharded=_FSDP_LAYERS,
)
LEVERS = (
    Lever("sequence_chunk_size", offers=offers.one_chunk),  # the same setting as streaming, of which it is the least
    Lever(
        "gradient_checkpointing",
        is_on=checkpoints,
        written=lambda args: checkpoint_names(args)[0],
        off=lambda args: dict.fromkeys(checkpoint_names(args), False),
        offers=offers.activation_checkpointing,
        judge=judgements.runs_again("gradient_checkpointing"),
    ),
    STREAMING,
    Lever("kv_offload", is_on=lambda args: args.kv_offload and args.streams, judge=judgements.moved_to_host),
    Lever("per_device_train_batch_size", offers=offers.smaller_micro_batches),
    Lever(
        "optim",
        is_on=lambda args: "8bit" in optimizer_name(args),
        written=lambda args: f"optim={optimizer_name(args)}",
        off=lambda args: {"optim": "adamw_torch"},
        offers=offers.optimizer_state,
        judge=judgements.kept_state_in_8_bits,
    ),
    Lever("lora_r", offers=offers.what_is_trained, judge=judgements.trains_adapters),
    CHECKPOINT_LEVELS,
    REVERSIBLE,
    SEEKING,
)
_BY_SWITCH = {lever.name: lever for lever in (STREAMING, SEEKING, REVERSIBLE, CHECKPOINT_LEVELS)}


def lever_of(switch: str) -> Lever:
    """The row of a method, by the setting that turns it on."""
    return _BY_SWITCH[switch]


def offers_of(run: Run) -> Iterator[Offer]:
    """What is left to try, exact changes first."""
    for lever in LEVERS:
        yield from lever.offers(run)


def least_offers(run: Run) -> list[Offer]:
    """What to try first: the least change of each lever, where nothing that it needs is missing."""
    first = (next(iter(lever.offers(run)), None) for lever in LEVERS)
    return [offer for offer in first if offer is not None and offer.missing is None]


def written_levers(args: Settings) -> list[str]:
    """Every lever that is on, as it stands in the settings."""
    return [written for lever in LEVERS if lever.is_on(args) and (written := lever.written(args))]


def idle_levers(args: Settings, seen: Seen) -> Iterator[Idle]:
    """Every lever that is on and did not act. The settings of reversible layers that were loaded lie elsewhere: what is in the model counts."""
    for lever in LEVERS:
        in_model = lever is REVERSIBLE and seen.has_reversible or lever.name == "lora_r"
        if in_model or lever.is_on(args):
            yield from lever.judge(args, seen)


# -- refusals


def refusals_of_arguments(args: Any) -> list[str]:
    """Arguments under which a lever that is on does not work, one message each; of two levers the first names it."""
    found: dict[str, str] = {}
    for lever in (STREAMING, SEEKING, REVERSIBLE, CHECKPOINT_LEVELS):
        if lever.is_on(args):
            for name, message in _refused(lever, args):
                found.setdefault(name, message)
    if "activation_checkpointing" in found:  # the newer of two names of one argument
        found.pop("gradient_checkpointing", None)
    return list(found.values())


def refusals(lever: Lever, args: Any) -> list[str]:
    """Arguments of any Trainer, which need not have been set up yet, under which this lever does not work, one message each."""
    return [message for _, message in _refused(lever, args)]


def _refused(lever: Lever, args: Any) -> Iterator[tuple[str, str]]:
    remedies = dict(lever.excludes(args))
    if not (lever.fsdp2 and fsdp_version(args) == 2):
        remedies["fsdp"] = lever.sharded
    for name, remedy in remedies.items():
        if value := getattr(args, name, None):
            yield name, f"{name}: got {value!r} with {lever.name}, which does not support it; {remedy}."


def fsdp_version(args: Any) -> int | None:
    """The version that the arguments ask for, as transformers reads them: 2 where they do not say; None for that of XLA."""
    config = getattr(args, "fsdp_config", None) or {}
    if isinstance(config, str):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
    return None if config.get("xla") else int(config.get("version", config.get("fsdp_version", 2)))
