"""The device that is measured, and the model on it: one at a time."""

import gc

import torch
from causal_lm_step import CausalLMStep, random_causal_lm
from methods import options_of
from torch import Tensor, nn

from gpu.sizes import Sizes


class Machine:
    """device: of CUDA, or the CPU, on which the same is run in small. name: of the card, as CUDA gives it. memory_bytes: of the whole card."""

    def __init__(self, device: torch.device, sizes: Sizes):
        self.device, self.sizes = device, sizes
        cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        self.name = cuda.name if cuda else "none"
        self.memory_bytes = cuda.total_memory if cuda else None
        self._model: tuple[str, nn.Module] | None = None

    def model(self, name: str) -> nn.Module:
        """LoRA, bfloat16, random weights."""
        if self._model is None or self._model[0] != name:
            self.clear()
            self._model = (name, random_causal_lm(self.sizes.models[name](), self.device))
            with self.step(name, 16, "plain") as step:
                step.seconds()  # what libraries keep of the device from their first call on is then no part of a measured step
        return self._model[1]

    def step(self, name: str, tokens: int, method: str) -> CausalLMStep:
        model = self.model(name)
        return CausalLMStep(model, self._ids(model.config.vocab_size, tokens), **options_of(method))

    def clear(self) -> None:
        """Leave the whole device to what comes next."""
        self._model = None
        self.empty()

    def empty(self) -> None:
        """Give back what no tensor uses, and what a failed step left in circles. Elsewhere than on CUDA nothing is limited."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _ids(self, vocabulary: int, tokens: int) -> Tensor:
        return torch.randint(vocabulary, (1, tokens), device=self.device)
