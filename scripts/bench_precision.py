"""Whether gradients summed up in bfloat16 from chunk to chunk lose anything: `python scripts/bench_precision.py`.

The gradient of one long row of real text, in bfloat16, against that of the same weights in float32: of plain training, and of exact
streaming in ever smaller chunks, whose owed gradients are summed in bfloat16 or in float32. Writes results/precision.jsonl.

    make assets
"""

import argparse
import copy
import json
import warnings
from pathlib import Path

import torch
from conditions import conditions
from store import append
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_memtune import Streaming, StreamingConfig

CHUNKS = (256, 64, 16)


def main() -> None:
    options = _options()
    batch = _batch(options)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).train()
    exact = gradients(copy.deepcopy(model).float(), batch)
    _write(options, "plain", None, None, gradients(model, batch), exact)
    for chunk in CHUNKS:
        for sums in (torch.bfloat16, torch.float32):
            _write(options, "exact streaming", chunk, sums, _streamed(model, batch, chunk, sums), exact)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".assets/models/smollm2-135m-instruct"))
    parser.add_argument("--data", type=Path, default=Path(".assets/data/alpaca/train.jsonl"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("results/precision.jsonl"))
    return parser.parse_args()


def _batch(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    rows = map(json.loads, options.data.read_text().splitlines())
    text = "\n\n".join(f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows)
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text[: 20 * options.tokens])["input_ids"][: options.tokens])[None]
    return {"input_ids": ids, "labels": ids}


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model(**batch, use_cache=False).loss.backward()
    return _taken(model)


def _streamed(model: torch.nn.Module, batch: dict, chunk: int, sums: torch.dtype) -> dict[str, torch.Tensor]:
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk), sums_dtype=sums):
        return gradients(model, batch)


def _taken(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found: dict, exact: dict, part: tuple[str, ...] = ("",)) -> float:
    """Norm of the difference relative to that of the exact gradient, over parameters whose name has one of the parts."""
    names = [name for name in exact if any(word in name for word in part)]
    squares = [((found[name] - exact[name]).square().sum(), exact[name].square().sum()) for name in names]
    return float((sum(d for d, _ in squares) / sum(e for _, e in squares)).sqrt())


def _write(options, method: str, chunk: int | None, sums: torch.dtype | None, found: dict, exact: dict) -> None:
    row = {
        "model": options.model.name, "tokens": options.tokens, "method": method, "chunk": chunk,
        "sums": None if sums is None else str(sums).removeprefix("torch."),
        "error": round(relative_error(found, exact), 5), "error_of_keys_and_values": round(relative_error(found, exact, ("k_proj", "v_proj")), 5),
        "conditions": conditions(device="cpu", dtype="bfloat16"),
    }  # fmt: skip
    append(options.out, row)
    print(
        f"{method:16} {chunk or '':4} {row['sums'] or '':9} all {row['error']:.4f}  keys and values {row['error_of_keys_and_values']:.4f}"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    main()
