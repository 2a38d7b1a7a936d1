"""Whether gradients summed up in bfloat16 from chunk to chunk lose anything: `python scripts/bench_precision.py`.

The gradient of one long row of real text, in bfloat16, against that of the same weights in float32: of plain training, and of exact
streaming in ever smaller chunks, whose owed gradients are summed in bfloat16 or in float32. Writes results/precision.jsonl.

    make assets
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from methods import text_ids
from options import one, parse
from store import measure
from transformers import AutoModelForCausalLM

from hf_memtune import Streaming, StreamingConfig


def main(given: list[str] | None = None) -> None:
    assets = Path(".assets")
    options = parse(
        __doc__, "precision", given, model=one(assets / "models/smollm2-135m-instruct"), data=one(assets / "data/alpaca/train.jsonl"),
        tokens=one(1024),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).train()
    ids = text_ids(options.model, options.data, 1, options.tokens)
    batch = {"input_ids": ids, "labels": ids}
    exact = gradients(copy.deepcopy(model).float(), batch)

    def measured(run: dict) -> dict:
        config = run["chunk"] and StreamingConfig(sequence_chunk_size=run["chunk"])
        with Streaming(model, config, sums_dtype=getattr(torch, run["sums"])) if config else nullcontext():
            found = gradients(model, batch)
        of_keys = relative_error(found, exact, ("k_proj", "v_proj"))
        return {"error": round(relative_error(found, exact), 5), "error_of_keys_and_values": round(of_keys, 5)}

    ways = [("plain", None, None)]
    ways += [("exact streaming", chunk, sums) for chunk in (256, 64, 16) for sums in ("bfloat16", "float32")]
    row = {"model": options.model.name, "tokens": options.tokens}
    wanted = [row | {"method": method, "chunk": chunk, "sums": sums} for method, chunk, sums in ways]
    measure(options.out, wanted, measured, device="cpu", dtype="bfloat16")


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """All of them, in float32, by name."""
    model(**batch, use_cache=False).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: dict, exact: dict, part: tuple[str, ...] = ("",)) -> float:
    """Norm of the difference relative to that of the exact gradient, over parameters whose name has one of the parts."""
    names = [name for name in exact if any(word in name for word in part)]
    squares = [((found[name] - exact[name]).square().sum(), exact[name].square().sum()) for name in names]
    return float((sum(d for d, _ in squares) / sum(e for _, e in squares)).sqrt())


if __name__ == "__main__":
    main()
