"""One training step of a causal language model, for benches: its bytes, traced on shapes alone or measured, and its seconds.

Counted: every storage that the step makes and that is alive at its peak, apart from gradients of parameters (weights,
gradients and optimizer state are known without tracing). Not seen: temporaries inside one kernel.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_memtune._compat import wait_for
from hf_memtune.core.loss import IGNORED, linear_loss
from hf_memtune.core.offload import HostMemory
from hf_memtune.memory.fake import sdpa_without_padding, use_sdpa
from hf_memtune.memory.live import Entry, LiveBytes
from hf_memtune.methods.method import Method
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.methods.streaming.method import Streaming
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.settings.streaming import StreamingConfig


@dataclass(frozen=True)
class TracedStep:
    """What one step needs, in bytes. peak_bytes: above weights, gradients and optimizer state. host_bytes: in host memory (kv_offload)."""

    peak_bytes: int
    weight_bytes: int
    gradient_bytes: int
    entries: list[Entry]
    host_bytes: int = 0


class CountedHost(HostMemory):
    """Host memory whose bytes are counted, and left out of those of the device where a trace has them in one memory."""

    def __init__(self, device: LiveBytes | None = None):
        super().__init__()
        self.live, self._device = LiveBytes(), device

    def empty(self, *args) -> Tensor:
        with nullcontext() if self._device is None else self._device.paused():
            home = super().empty(*args)
        self.live.track(home)
        return home


def trace_causal_lm_step(
    config: PreTrainedConfig,
    tokens: int,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    lora_rank: int | None = 8,
    checkpointing: bool = False,
    fused_loss: bool = False,
    strategy: StreamingConfig | None = None,
) -> TracedStep:
    """Forward and backward of a causal language model on (rows, tokens) without padding, every token labelled.

    lora_rank: LoRA of that rank on all linears but the head, adapters in `dtype`; None trains everything. fused_loss: the head's
    logits in chunks, recomputed (what the best rivals do). strategy: settings of exact streaming, or of token seeking (both fuse
    the loss themselves). Gradients are there from a step before, and are not counted.
    Attention is torch's SDPA, without a mask where the model's own code would need none.
    """
    model = _meta_model(config, dtype, lora_rank, checkpointing)
    with FakeTensorMode(), sdpa_without_padding() as attention:
        materialise(model, dtype, torch.device("cpu"))
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        installed = _install(model, strategy)
        use_sdpa(model, attention)  # also under a method, which lets some calls go the model's own way
        step = _plain_step(model, ids, fused_loss) if installed is None else _own_step(model, ids)
        weight_bytes, trained = _weights(model)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        with nullcontext() if installed is None else installed, LiveBytes(snapshot=True) as live:
            host = _count_host(installed, live)
            step()
        gradient_bytes = sum(p.nbytes for p in trained)
        return TracedStep(live.peak_bytes, weight_bytes, gradient_bytes, live.peak_entries, host.live.peak_bytes)


def random_causal_lm(
    config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, lora_rank: int | None = 8
) -> nn.Module:
    """The model of `trace_causal_lm_step` with small random weights on a device, and gradients of zeros, as after a step."""
    model = _meta_model(config, dtype, lora_rank, checkpointing=False)
    materialise(model, dtype, device)
    for parameter in _weights(model)[1]:
        parameter.grad = torch.zeros_like(parameter)
    return model


class CausalLMStep:
    """Forward and backward under one method, as often as wanted: a context manager, after which the model is as before but for its gradients.

    model: of `random_causal_lm`. ids: (B, T), on its device; every token is labelled. The rest: as of `trace_causal_lm_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        checkpointing: bool = False,
        fused_loss: bool = False,
        strategy: StreamingConfig | None = None,
    ):
        self._model, self._ids, self._checkpointing, self._fused_loss, self._strategy = model, ids, checkpointing, fused_loss, strategy
        self._installed: Method | None = None

    def __enter__(self) -> "CausalLMStep":
        if self._checkpointing:
            _checkpoint(self._model)
        try:
            self._installed = _install(self._model, self._strategy)
        except BaseException:
            self.__exit__()
            raise
        plain = self._installed is None
        self._run = _plain_step(self._model, self._ids, self._fused_loss) if plain else _own_step(self._model, self._ids)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._installed is not None:
            self._installed.remove()
        if self._checkpointing:
            disable = getattr(self._model, "activation_checkpointing_disable", None) or self._model.gradient_checkpointing_disable
            disable()
            self._model.disable_input_require_grads()

    def measure(self) -> TracedStep:
        """The bytes of one step, which is run."""
        weight_bytes, trained = _weights(self._model)
        measured = self._on_cuda if self._ids.is_cuda else self._counted
        peak_bytes, host_bytes = measured()
        return TracedStep(peak_bytes, weight_bytes, sum(p.nbytes for p in trained), [], host_bytes)

    def seconds(self, then: Callable[[], None] | None = None) -> float:
        """The seconds of one step, which is run, until the device has done it. then: what belongs to it after backward."""
        wait_for(self._ids.device)
        began = time.perf_counter()
        self._run()
        if then is not None:
            then()
        wait_for(self._ids.device)
        return time.perf_counter() - began

    def _on_cuda(self) -> tuple[int, int]:
        device = self._ids.device
        wait_for(self._ids.device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        host = _count_host(self._installed)
        self._run()
        wait_for(self._ids.device)
        return torch.cuda.max_memory_allocated(device) - before, host.live.peak_bytes

    def _counted(self) -> tuple[int, int]:
        with LiveBytes() as live:
            host = _count_host(self._installed, live)
            self._run()
        return live.peak_bytes, host.live.peak_bytes


def _count_host(installed: Method | None, device: LiveBytes | None = None) -> CountedHost:
    host = CountedHost(device)
    if installed is not None:
        installed.host = host
    return host


def _install(model: nn.Module, strategy: StreamingConfig | None) -> Method | None:
    if strategy is None:
        return None
    kind = TokenSeeking if isinstance(strategy, TokenSeekingConfig) else Streaming
    return kind(model, strategy, check=False)


def _meta_model(config: PreTrainedConfig, dtype: torch.dtype, lora_rank: int | None, checkpointing: bool) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return _trainable(model, lora_rank, checkpointing)


def _weights(model: nn.Module) -> tuple[int, list[nn.Parameter]]:
    return sum(p.nbytes for p in model.parameters()), [p for p in model.parameters() if p.requires_grad]


def _trainable(model: nn.Module, lora_rank: int | None, checkpointing: bool) -> nn.Module:
    if lora_rank is not None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        _checkpoint(model)
    return model.train()


def _checkpoint(model: nn.Module) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # hooks that `enable` may have put on: transformers forgets them when it adds others
    model.enable_input_require_grads()


def _own_step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """The model's own loss, without its logits: the method on it sees to that."""

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def _plain_step(model: nn.Module, ids: Tensor, fused_loss: bool) -> Callable[[], None]:
    def step() -> None:
        if not fused_loss:
            return model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        target = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        head = causal_lm.get_output_embeddings()
        (linear_loss(hidden.flatten(0, 1), head.weight, head.bias, target.flatten()) / target.numel()).backward()

    return step


def materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give every parameter (of `dtype`) and buffer a tensor on `device` for its meta tensor; shared ones stay shared.

    Values are random and small where tensors have values at all: what is measured depends on none.
    """
    made: dict[int, Tensor] = {}

    def filled(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        return nn.Parameter(torch.randn(tensor.shape, dtype=dtype, device=device) * 0.02, tensor.requires_grad)

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = filled(tensor)
                held[name] = None if tensor is None else made[id(tensor)]
