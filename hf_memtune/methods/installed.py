"""What all strategies that run a model in passes have in common: they are installed on one model, and removed again."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from hf_memtune._compat import forbid_4bit_repacking, has_repacked_4bit
from hf_memtune.architectures import describe
from hf_memtune.settings.methods import StreamingConfig
from hf_memtune.core.offload import HostMemory
from hf_memtune.core.scorers import Scorer
from hf_memtune.errors import MemTuneError, UnsupportedModelError
from hf_memtune.methods.attention.passes import Places
from hf_memtune.methods.attention.routing import Router
from hf_memtune.methods.verify import verify


class InstalledStrategy:
    """A strategy on one model, until `remove()`. Between steps nothing of the model is changed.

    scorer: what ranks tokens, or None. sums_dtype: what the gradients that chunks of a stream owe to one another are summed in; None:
    as they come. context_modules: ids of the modules whose attention is recorded for it, and their stack.
    host: the memory for what is kept off the device.
    Raises UnsupportedModelError before the model is touched.
    """

    scorer: Scorer | None = None
    sums_dtype: torch.dtype | None = None
    context_modules: dict[int, str] = {}

    def __init__(self, model: nn.Module, config: StreamingConfig, check: bool = True):
        self.config, self.architecture, self.host = config, describe(model), HostMemory()
        self.prepare()
        self.places = Places(self.architecture)
        if has_repacked_4bit(model):
            raise UnsupportedModelError(
                f"{self.architecture.name}: its 4-bit weights were repacked by an evaluation on the CPU, and no gradient passes them any "
                "more. Load the model again, and make the trainer (or this object) before the first evaluation."
            )
        self._router: Router | None = Router(self.architecture)
        self._forbidden = forbid_4bit_repacking(model)
        try:
            self.facts = verify(self, check)
            self.require(self.facts)
        except BaseException:
            self.remove()
            raise

    def prepare(self) -> None:
        """What a strategy needs to know of the architecture before anything is installed."""

    def require(self, facts) -> None:
        """Refuse a model that the probe has shown not to suit the settings."""
        if self.config.stream_chunk_size is None:
            return
        name = self.config.streamed_by
        if not facts.decoder_is_causal:
            self._refuse_bidirectional(name)
        problems = [*self._layerdrop(name), *self._hooks(name)]
        if problems:
            raise UnsupportedModelError("\n".join(problems))

    def _refuse_bidirectional(self, name: str) -> None:
        raise UnsupportedModelError(
            f"{self.architecture.name} is bidirectional: each of its tokens attends to later ones, so the last chunk of a row cannot go "
            f"backward before the others have gone forward with it. Expected a causal model for {name}. Leave {name} out, and use "
            "activation checkpointing, or token_seeking with token_gradient=cut."
        )

    def _layerdrop(self, name: str) -> list[str]:
        """Layers left out at random: each chunk would leave out others."""
        names = ("layerdrop", "decoder_layerdrop", "encoder_layerdrop")
        dropping = {n: v for c in self.architecture.configs() for n in names if (v := getattr(c, n, 0))}
        return [
            f"{self.architecture.name}: config.{found} is {value}, and each chunk of {name} would leave out other layers. Expected 0: set "
            f"{found}=0 in the config, and on the modules that copied it, before training."
            for found, value in dropping.items()
        ]

    def _hooks(self, name: str) -> list[str]:
        """What runs on a gradient before it is whole."""
        hooked = [n for n, p in self.architecture.head_model.named_parameters() if getattr(p, "_post_accumulate_grad_hooks", None)]
        return hooked and [
            f"{self.architecture.name}: {len(hooked)} parameters have hooks that run when their gradient is accumulated (the first: {hooked[0]}). "
            f"With {name} it is accumulated once for each chunk, so that an optimizer in such a hook would step in the middle. Remove them."
        ]

    @property
    def kernel_knows_causal(self) -> bool:
        """Whether the attention kernel applies a causal mask by itself where it is given none."""
        return self.router.kernel(self.architecture.base.config) == "sdpa"

    @property
    def router(self) -> Router:
        if self._router is None:
            raise MemTuneError(f"{type(self).__name__} was removed from this model: make a new one.")
        return self._router

    def running(self, active) -> AbstractContextManager:
        return self.router.running(active)

    def remove(self) -> None:
        """Take every trace out of the model and of transformers' interfaces. May be called twice."""
        if self._router is not None:
            self._router.close()
            self._router = None
            for module in self._forbidden:
                module.support_avx512bf16_for_cpu = True
