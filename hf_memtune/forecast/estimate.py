"""How many bytes a training step will need, before there is one: no GPU, no weights, no data.

    estimate(LlamaConfig(...), MemEfficientTrainingArguments("out", sequence_chunk_size=512), sequence_length=2048).peak_bytes

The trainer itself runs one step on tensors without values (`rehearsal`); of a deep model, on two short ones (`memory.depth`).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_memtune.architectures.stacks import layer_stacks
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.forecast.blank_model import batch_shapes, blank_model
from hf_memtune.forecast.rehearsal import MICRO_BATCHES, Rehearsed, Scene, rehearse
from hf_memtune.levers.facts import checkpoints, optimizer_name, steps_in_backward
from hf_memtune.memory.account import MemoryAccount
from hf_memtune.memory.depth import FEWEST, Depths, depths_of, extrapolate, signature_of
from hf_memtune.memory.estimate import MemoryEstimate
from hf_memtune.memory.log import Log

_OF_OTHER_STATE = ("adamw_torch_4bit", "adamw_torch_8bit", "galore", "apollo")  # torchao's, and low-rank projections
MANY = 0.1  # of all parameters: adapters are fewer, and their gradients too small to decide


def estimate(
    model_or_config: nn.Module | PreTrainedConfig,
    args: Any,
    batch_size: int | None = None,
    sequence_length: int = 1024,
    padded: bool | None = None,
    evaluation: bool | None = None,
    every_layer: bool = False,
    evaluation_logits: bool = False,
) -> MemoryEstimate:
    """The bytes of one optimizer step of MemEfficientTrainer, by phase and category, on the longest batch.

    Of one process; where args are of several, with the gradients once more that DistributedDataParallel has in its buckets.

    Args:
        model_or_config: a model, or a PEFT model around one, on any device ("meta" has no weights); or a config, whose model is trained
            whole in the config's dtype. It is not changed.
        args: MemEfficientTrainingArguments: strategies, optimizer, precision, accumulation, checkpointing.
        batch_size: rows of a micro-batch; None: args.per_device_train_batch_size.
        sequence_length: tokens of the longest row.
        padded: whether rows of a batch differ in length, so that attention needs a mask; None: if there is more than one row in it.
        evaluation: whether to account for a batch of evaluation (args.per_device_eval_batch_size rows) too;
            None: if args evaluate during training. Who calls `evaluate` around it says True.
        every_layer: trace all layers, where a few are enough: slower, and the same to the byte.
        evaluation_logits: whether the logits of that batch are wanted beside its loss, as for compute_metrics.

    Raises:
        ConfigError: settings that cannot work, or whose memory depends on values of tensors.
        UnsupportedModelError: a model that cannot run without values (mixtures of experts), or that the strategy does not support.
    """
    rows = args.per_device_train_batch_size if batch_size is None else batch_size
    if found := _problems(args, rows, sequence_length):
        raise ConfigError(found)
    model = blank_model(model_or_config) if isinstance(model_or_config, PreTrainedConfig) else model_or_config
    evaluated = args.eval_strategy != "no" or args.eval_on_start if evaluation is None else evaluation
    sizes = (rows, args.per_device_eval_batch_size)
    of_step, of_evaluation = ((batch_shapes(model, size, sequence_length), size > 1 if padded is None else padded) for size in sizes)
    scene = Scene(*of_step, *((*of_evaluation, evaluation_logits) if evaluated else ()))
    account, flops, how = _traced(model, args, scene, every_layer)
    if args.world_size > 1:
        account = _with_buckets(account, trained_bytes(model, args))
    flops = flops * args.gradient_accumulation_steps // min(args.gradient_accumulation_steps, MICRO_BATCHES)
    conditions = _conditions(model, args, scene, rows, sequence_length)
    if evaluated:
        conditions["evaluation_rows"] = args.per_device_eval_batch_size
    return MemoryEstimate(account, conditions, flops, how)


def trained_bytes(model: nn.Module, args: Any) -> int:
    """Of what a model that is not in a trainer yet will have trained; of adapters in reversible layers, which the trainer puts in, 0."""
    has_adapters = args.is_reversible and args.adapter_rank != 0
    return 0 if has_adapters else sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _with_buckets(account: MemoryAccount, n_bytes: int) -> MemoryAccount:
    phases = [replace(p, by_category=p.by_category | {"gradients": p.by_category["gradients"] + n_bytes}) for p in account.phases]
    return replace(account, phases=tuple(phases))


def _problems(args: Any, rows: int, tokens: int) -> list[str]:
    found = []
    for name, value in (("batch_size", rows), ("sequence_length", tokens)):
        if not isinstance(value, int) or value < 1:
            found.append(f"{name}: got {value!r}, expected 1 or more.")
    if args.token_seeking and args.token_gradient == "skip":
        found.append(
            "token_gradient: got 'skip', whose memory depends on which tokens are skipped, which depends on the data. Expected 'cut' or "
            "'stream'; an estimate of 'stream' with the same sequence_chunk_size holds where hardly anything is skipped."
        )
    if args.token_seeking and args.token_scorer == "excess_loss":
        found.append(
            "token_scorer: got 'excess_loss', whose reference model is not traced. Estimate with 'loss', and add the bytes of its weights."
        )
    for name in ("deepspeed", "fsdp", "parallelism_config", "torch_compile", "use_liger_kernel"):
        if getattr(args, name, None):
            found.append(f"{name}: got {getattr(args, name)!r}, under which other code runs than the trace sees. Estimate without it.")
    name = optimizer_name(args)
    if steps_in_backward(args):
        found.append(f"optim: got {name!r}, which steps in the middle of backward; its memory is not predicted. Choose another one.")
    elif name.startswith(_OF_OTHER_STATE):
        found.append(
            f"optim: got {name!r}, whose state is not predicted: it is packed, or projected, in a way of its own. Choose another one."
        )
    if args.chunk_is_open:
        found.append(
            "sequence_chunk_size: got 'auto', which a trainer chooses on its machine before step 0. Expected the tokens of a chunk, such as 512; "
            "where it is left out, `hf-memtune plan` tries sizes."
        )
    return found


def _traced(model: nn.Module, args: Any, scene: Scene, every_layer: bool) -> tuple[MemoryAccount, int, str | None]:
    depths = None if every_layer else _depths(model, args)
    if depths is not None:
        counts = [depths.shorter, depths.longer, *([depths.third] if _is_ambiguous(model, args) else [])]
        traced = [rehearse(model, args, replace(scene, layers=count)) for count in counts]
        account = _extrapolated(traced, depths.steps)
        if account is not None:
            few, more = (each.step.flops for each in traced[:2])
            how = f"{depths.wanted} layers, from traces of {', '.join(map(str, counts[:-1]))} and {counts[-1]}"
            return account, few + depths.steps * (more - few), how
    whole = rehearse(model, args, scene)
    return _with_evaluation(whole.step.account(), whole.evaluation and whole.evaluation.account()), whole.step.flops, None


def _extrapolated(traced: list[Rehearsed], steps: int) -> MemoryAccount | None:
    def whole(logs: list[Log]) -> MemoryAccount | None:
        return extrapolate(logs[0], logs[1], steps, *logs[2:])

    step = whole([each.step.log for each in traced])
    evaluations = [each.evaluation.log for each in traced if each.evaluation is not None]
    return step if step is None or not evaluations else _with_evaluation(step, whole(evaluations))


def _with_evaluation(step: MemoryAccount, evaluation: MemoryAccount | None) -> MemoryAccount:
    if evaluation is None:
        return step
    (phase,) = (phase for phase in evaluation.phases if phase.phase == "evaluation")
    taken = evaluation if phase.peak_bytes > step.peak_bytes else step
    return replace(step, phases=(*step.phases, phase), tensors=taken.tensors)


def _depths(model: nn.Module, args: Any) -> Depths | None:
    """The layers to trace; None where all must be: what runs in a layer then depends on which one it is, or on how many there are."""
    options = getattr(args, "activation_checkpointing_kwargs", None) or {}
    if args.checkpoint_levels or args.reversible_layers is not None or options.get("every_n_layers", 1) != 1 or options.get("offload"):
        return None
    if args.token_seeking and args.context_layer is not None and args.context_layer >= 0:
        return None
    try:
        stacks = layer_stacks(model)
    except UnsupportedModelError:
        return None
    if len(stacks) != 1:
        return None
    kinds = getattr(stacks[0].config, "layer_types", None) or [None] * len(stacks[0].layers)
    fewest = FEWEST + 2 if args.kv_offload else FEWEST  # the keys and values of two layers are on the device at a time
    is_ambiguous = _is_ambiguous(model, args)
    found = depths_of([signature_of(layer, kind) for layer, kind in zip(stacks[0].layers, kinds)], fewest + is_ambiguous)
    is_more = found is not None and is_ambiguous and found.wanted <= found.shorter + found.longer + found.third
    return None if is_more else found


def _is_ambiguous(model: nn.Module, args: Any) -> bool:
    """Whether two traces may be taken for one another: by layers, the inputs of layers go as the gradients of their parameters come."""
    by_layers = args.stream_order == "layers" or (args.stream_order is None and checkpoints(args))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return args.streams and not args.token_seeking and by_layers and trained > MANY * sum(p.numel() for p in model.parameters())


def _conditions(model: nn.Module, args: Any, scene: Scene, rows: int, tokens: int) -> dict[str, Any]:
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    return {
        "model": type(model).__name__,
        "rows": rows,
        "tokens": tokens,
        "micro_batches": args.gradient_accumulation_steps,
        "padded": scene.padded,
        "weights": dtypes,
        "optimizer": optimizer_name(args),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
