"""One optimizer step on one very long row of real text: `python scripts/bench_length.py --tokens 16384`. Writes results/length.jsonl.

For each method the loss, the peak of live bytes while forward and backward run (weights are older, and not in it), seconds, and how far its
gradient is from that of the first method of the run. Pre-trained weights; rows may be longer than the model was trained on: what is shown is
that the step is the same, not that the text is understood. Methods of one comparison are named together. What is offloaded lies in host
memory, and is counted apart. --traced finds the bytes alone, without values.

    make assets NAMES="smollm2 alpaca"
"""

import time
from pathlib import Path

import torch
from causal_lm_step import CausalLMStep, trace_causal_lm_step
from methods import LOGIT_FREE, OFFLOADED, options_of, text_ids
from options import one, parse, several
from store import measure
from torch import Tensor, nn

CHUNK, RANK = 1024, 8
CHECKPOINTED = f"exact streaming {CHUNK} + checkpointing"
METHODS = ("plain", "checkpointing", LOGIT_FREE, f"exact streaming {CHUNK}", CHECKPOINTED, CHECKPOINTED + OFFLOADED)


def main(given: list[str] | None = None) -> None:
    options = parse(
        __doc__, "length", given, model=one(Path(".assets/models/smollm2-135m-instruct")), data=one(Path(".assets/data/alpaca/train.jsonl")),
        tokens=one(16384, "of the one row"), methods=several(METHODS, "names as in scripts/methods.py"),
        traced={"action": "store_true", "help": "bytes alone, of tensors without values"},
    )  # fmt: skip
    told = {"model": options.model.name, "tokens": options.tokens, "layers": 0, "traced": options.traced}
    wanted = [told | {"method": name} for name in options.methods]
    described = {"dtype": "float32", "lora_rank": RANK, "threads": torch.get_num_threads(), "rows": 1}
    described |= {} if options.traced else {"data": options.data.parent.name}  # a trace reads none
    measure(options.out, wanted, (_Traced if options.traced else _Run)(options).measured, **described)


class _Traced:
    def __init__(self, options):
        self._config, self._tokens = _config(options), options.tokens

    def measured(self, run: dict) -> dict:
        step = trace_causal_lm_step(self._config, self._tokens, dtype=torch.float32, lora_rank=RANK, **options_of(run["method"]))
        return {"peak_bytes": step.peak_bytes, "host_bytes": step.host_bytes}


class _Run:
    """Steps of one model on one row, and the gradient of the first of them."""

    def __init__(self, options):
        self._model, self._ids = _model(options), text_ids(options.model, options.data, 1, options.tokens)
        self._first: tuple[str, Tensor] | None = None

    def measured(self, run: dict) -> dict:
        losses: list[float] = []
        self._model.zero_grad()
        hook = self._model.register_forward_hook(lambda module, args, output: losses.append(float(output.loss.detach())))
        try:
            with CausalLMStep(self._model, self._ids, **options_of(run["method"])) as step:
                began = time.perf_counter()
                found = step.measure()
                seconds = time.perf_counter() - began
        finally:
            hook.remove()
        gradient = torch.cat([p.grad.flatten() for p in self._model.parameters() if p.requires_grad])
        of, first = self._first = self._first or (run["method"], gradient)
        difference = float((gradient - first).norm() / first.norm())
        told = {"loss": losses[0], "gradient_difference": difference, "against": of, "seconds": round(seconds, 1)}
        return told | {"peak_bytes": found.peak_bytes, "host_bytes": found.host_bytes}


def _config(options):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(options.model)
    config.max_position_embeddings = max(config.max_position_embeddings, options.tokens)
    return config


def _model(options) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, config=_config(options), dtype=torch.float32)
    # as they are by default, half of the gradients would be 0
    adapters = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, adapters).train()


if __name__ == "__main__":
    main()
