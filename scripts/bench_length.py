"""One optimizer step on one very long row of real text: `python scripts/bench_length.py --tokens 16384`. Writes results/length.jsonl.

For each method the loss, the peak of live bytes while forward and backward run (weights are older, and not in it), seconds, and how far its
gradient is from that of the first method, which is kept. Pre-trained weights; rows may be longer than the model was trained on: what is
shown is that the step is the same, not that the text is understood. Methods of one comparison are named together.

    make assets NAMES="smollm2 alpaca"
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from bench_gradient import gradient as flat_gradient
from bench_speed import checkpointed
from options import one, parse, some_of
from store import measure
from torch import Tensor, nn

from hf_memtune import LiveBytes, Streaming, StreamingConfig

CHUNK = 1024
METHODS: dict[str, tuple[int | None, bool]] = {  # tokens of a chunk, whether activations are checkpointed
    "plain": (None, False),
    "checkpointing": (None, True),
    "checkpointing + logit-free loss": (2**20, True),
    f"exact streaming {CHUNK}": (CHUNK, False),
    f"exact streaming {CHUNK} + checkpointing": (CHUNK, True),
}


def main(given: list[str] | None = None) -> None:
    options = parse(
        __doc__, "length", given, model=one(Path(".assets/models/smollm2-135m-instruct")), data=one(Path(".assets/data/alpaca/train.jsonl")),
        tokens=one(16384, "of the one row"), layers=one(0, "of the model, the lowest; 0 is all"), methods=some_of(METHODS),
    )  # fmt: skip
    model, batch = load(options), row_of(options)
    kept: list[Tensor] = []
    wanted = [{"model": options.model.name, "tokens": options.tokens, "layers": options.layers, "method": name} for name in options.methods]
    described = {"dtype": "float32", "lora_rank": 8, "threads": torch.get_num_threads(), "rows": 1}
    measure(options.out, wanted, lambda run: measured(model, batch, kept, *METHODS[run["method"]]), **described)


def load(options) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(options.model)
    if options.layers:
        config.num_hidden_layers = options.layers
        config.layer_types = config.layer_types[: options.layers] if getattr(config, "layer_types", None) else None
    model = AutoModelForCausalLM.from_pretrained(options.model, config=config, dtype=torch.float32)
    adapters = LoraConfig(
        r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )  # or half of the gradients would be 0
    torch.manual_seed(0)
    return get_peft_model(model, adapters).train()


def row_of(options) -> dict[str, Tensor]:
    """The texts of the data, end to end, and from the beginning again where they are too short."""
    from transformers import AutoTokenizer

    lines = map(json.loads, options.data.read_text().splitlines())
    text = "\n\n".join("\n".join(str(value) for value in line.values()) for line in lines)
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text[: 40 * options.tokens])["input_ids"])
    ids = ids.repeat(-(-options.tokens // len(ids)))[None, : options.tokens]
    return {"input_ids": ids, "labels": ids}


def measured(model: nn.Module, batch: dict, kept: list[Tensor], chunk: int | None, is_checkpointed: bool) -> dict:
    """One step. kept: the gradient of the first method, once there is one."""
    losses: list[float] = []
    hook = model.register_forward_hook(lambda module, args, output: losses.append(float(output.loss.detach())))
    began = time.perf_counter()
    try:
        with LiveBytes() as live:
            found = under(model, chunk, is_checkpointed, lambda: flat_gradient(model, batch))
    finally:
        hook.remove()
    seconds = time.perf_counter() - began
    if not kept:
        kept.append(found)
    difference = float((found - kept[0]).norm() / kept[0].norm())
    return {"loss": losses[0], "gradient_difference": difference, "peak_bytes": live.peak_bytes, "seconds": round(seconds, 1)}


def under(model: nn.Module, chunk: int | None, is_checkpointed: bool, step: Callable[[], Tensor]) -> Tensor:
    """The step, with its method on."""
    with ExitStack() as stack:
        stack.enter_context(checkpointed(model, nullcontext) if is_checkpointed else nullcontext())
        if chunk is not None:
            stack.enter_context(Streaming(model, StreamingConfig(sequence_chunk_size=chunk)))
        return step()


if __name__ == "__main__":
    main()
