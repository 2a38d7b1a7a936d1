"""(a) The gradient of exact streaming against that of plain training in float32, by kernel, dtype, chunk, order, and where keys and values lie.

All parameters of a small Llama with random weights that bfloat16 can hold. An error is the norm of the difference relative to that of the
float32 gradient. In float32 streaming may differ by rounding alone; in bfloat16 it may be no further off than plain training is, but for
what one more rounding of sums does.
"""

import time
from collections.abc import Iterator
from itertools import product

import torch
from bench_precision import gradients, relative_error
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from gpu.machine import Machine
from hf_memtune import Streaming, StreamingConfig
from hf_memtune.settings.streaming import STREAM_ORDERS

BEYOND_PLAIN = 1.25  # times the error of plain training in the same dtype
ROUNDINGS = 1000  # of float32, relative to the whole gradient
BFLOAT16, FLOAT32 = "bfloat16", "float32"


class Exactness:
    name, share = "exactness", 0.14
    described = {"rows": 1, "trained": "every parameter"}

    def __init__(self, machine: Machine):
        self._machine = machine
        self._plain: dict[tuple, dict[str, Tensor]] = {}
        self._longest = 0.0  # seconds of a run so far

    def runs(self) -> Iterator[dict]:
        for kernel, dtypes in self._kernels().items():
            for dtype in dtypes:
                run = {"kernel": kernel, "dtype": dtype, "tokens": self._machine.sizes.exact_tokens}
                for chunk, order, offloaded in product(self._machine.sizes.exact_chunks, STREAM_ORDERS, (False, True)):
                    yield run | {"chunk": chunk, "order": order, "offloaded": offloaded}

    def expected_seconds(self, run: dict) -> float:
        return self._longest

    def measured(self, run: dict, seconds: float) -> dict:
        """Both errors, and whether that of streaming is within its bound."""
        began = time.perf_counter()
        found = self._compared(run)
        self._longest = max(self._longest, time.perf_counter() - began)
        return found

    def _compared(self, run: dict) -> dict:
        kernel, dtype = run["kernel"], run["dtype"]
        exact, plain = self._gradients_of_plain("sdpa", FLOAT32), self._gradients_of_plain(kernel, dtype)
        model = self._model(kernel, dtype)
        config = StreamingConfig(sequence_chunk_size=run["chunk"], stream_order=run["order"], kv_offload=run["offloaded"])
        with Streaming(model, config):
            error = relative_error(gradients(model, self._batch()), exact)
        of_plain = relative_error(plain, exact)
        bound = max(BEYOND_PLAIN * of_plain, ROUNDINGS * torch.finfo(torch.float32).eps)
        return {"error": error, "error_of_plain": of_plain, "bound": bound, "exact": bool(error <= bound)}

    def _kernels(self) -> dict[str, tuple[str, ...]]:
        """Those installed, each with the dtypes that it takes. Compiled ones last."""
        both, cuda = (BFLOAT16, FLOAT32), self._machine.device.type == "cuda"
        found = {"sdpa": both}
        if not cuda:
            return found | {"eager": both}
        if is_flash_attn_2_available():
            found["flash_attention_2"] = (BFLOAT16,)
        if is_torch_flex_attn_available():
            found["flex_attention"] = both
        return found

    def _gradients_of_plain(self, kernel: str, dtype: str) -> dict[str, Tensor]:
        if (kernel, dtype) not in self._plain:
            self._plain[kernel, dtype] = gradients(self._model(kernel, dtype), self._batch())
        return self._plain[kernel, dtype]

    def _model(self, kernel: str, dtype: str) -> nn.Module:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self._machine.sizes.exact_model, dtype=torch.float32, attn_implementation=kernel)
        return model.to(torch.bfloat16).to(self._machine.device, getattr(torch, dtype)).train()

    def _batch(self) -> dict[str, Tensor]:
        sizes, generator = self._machine.sizes, torch.Generator().manual_seed(1)
        ids = torch.randint(sizes.exact_model.vocab_size, (1, sizes.exact_tokens), generator=generator).to(self._machine.device)
        return {"input_ids": ids, "labels": ids}
