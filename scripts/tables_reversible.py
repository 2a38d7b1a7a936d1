"""Tables of docs/reversible.md, and sentences that say where a bound holds, from the result files. ±: standard deviations over texts."""

from collections.abc import Callable

from pages import UNMEASURED, Cell, Rows, by, conditions_of, mib, of, pivot, table, unique

START = {
    "minilm": "all-MiniLM-L6-v2 (BERT, post-norm, 6 layers)",
    "smollm2": "SmolLM2-135M-Instruct (Llama, pre-norm, 30 layers)",
    "stories15m": "stories15M (Llama, pre-norm, 6 layers)",
}
COUPLINGS = ("centred", "meft1", "meft2", "meft3")
FACTORS = {0.25: "1/4", 0.125: "1/8", 0.1: "0.1 (float)", 0.0625: "1/16", 0.03125: "1/32"}
BOUNDS = {"loss_change": 0.02, "state_change": 0.10}
UNITS = {"loss_change": "loss", "state_change": "states"}
EPSILON = 2.0**-23  # of float32

TRACED = {"roberta": "RoBERTa-large", "roberta-eager": "RoBERTa-large, eager attention", "opt": "OPT-1.3B"}
REFERENCE, TWO_LEVELS = "full fine-tuning", "full fine-tuning, two-level checkpointing"
CLAIMED = 0.84  # of the paper
LAYERS = 24


def sections(rows_of: Callable[[str], Rows]) -> dict[str, Callable[[], str]]:
    """What stands between the markers of each name. rows_of: of a result file."""
    start, traced = (lambda: rows_of("start_point")), (lambda: rows_of("reversible_memory"))
    return {
        **{f"start-{model}": lambda model=model: start_table(start(), model) for model in START},
        "start-holds": lambda: where_it_holds(start()),
        "start-outputs": lambda: outputs_table(start()),
        "start-conditions": lambda: conditions_of(start()),
        **{f"bytes-{name}": lambda model=model: bytes_table(of(traced(), model=model, layers=LAYERS)) for name, model in TRACED.items()},
        "bytes-claim": lambda: claim(traced()),
        "bytes-rival": lambda: rival(traced()),
        "bytes-depth": lambda: depth_table(traced()),
        "bytes-conditions": lambda: conditions_of(traced()),
        "inverse": lambda: inverse_table(rows_of("inverse")),
    }


# --- what couplings change before training


def alone(rows: Rows, factor: float, /, **which) -> dict | None:
    """The run of a coupling without adapters: in fixed point, or in float where the factor is no power of two."""
    numerics = "float" if factor == 0.1 else "exact"
    return next(iter(of(rows, factor=factor, numerics=numerics, output=None, adapter_init_std=0.0, **which)), None)


def measure_of(row: dict) -> str:
    """The loss, where there is one."""
    return "loss_change" if row["loss_change"] else "state_change"


def cell(row: dict | None, measure: str) -> str:
    if row is None or row["overflow"]:
        return "-" if row is None else "overflow"
    return f"{row[measure]['mean']:{'+' if measure == 'loss_change' else ''}.3f} ± {row[measure]['deviation']:.3f}"


def start_table(rows: Rows, model: str) -> str:
    """By coupling and factor: relative change of the final states, and of the loss where there is one."""
    rows = of(rows, model=model)
    if not rows:
        return UNMEASURED
    texts = unique(rows, "data")
    measures = ("state_change", "loss_change") if any(row["loss_change"] for row in rows) else ("state_change",)
    lines = []
    for coupling in COUPLINGS:
        for factor, name in FACTORS.items():
            found = [alone(rows, factor, data=data, coupling=coupling) for data in texts]
            if any(found):
                lines.append([coupling, name, *(cell(row, measure) for row in found for measure in measures)])
    heads = ["coupling", "factor", *(f"{data}: {UNITS[measure]}" for data in texts for measure in measures)]
    return "\n".join([table(heads, lines, "ll"), "", *_plain_losses(rows), _numerics(rows), "", _adapters(rows, texts)])


def _plain_losses(rows: Rows) -> list[str]:
    found = by(of(rows, coupling="centred")[::-1], "data", "plain_loss")  # the first of each data set
    losses = [f"{found[data]['mean']:.3f} on {data}" for data in unique(rows, "data") if found.get(data)]
    return [f"Loss without a coupling: {', '.join(losses)}."] if losses else []


def _numerics(rows: Rows) -> str:
    """How far apart fixed point and float are: what the coupling changes is not a matter of rounding."""
    found = by(of(rows, output=None, adapter_init_std=0.0, overflow=None), "data coupling factor numerics", "state_change")
    pairs = [(found.get((*each, "exact")), found.get((*each, "float"))) for each in unique(rows, "data coupling factor")]
    apart = [abs(exact["mean"] / rounded["mean"] - 1) for exact, rounded in pairs if exact and rounded]
    return f"Fixed point and float differ by at most {100 * max(apart):.2g} % of a mean." if apart else ""


def _adapters(rows: Rows, texts: list[str]) -> str:
    """With adapters as they start by default, in fixed point."""
    started, told = of(rows, numerics="exact", adapter_init_std=0.02), []
    for coupling in COUPLINGS:
        each = [row for data in texts for row in of(started, coupling=coupling, data=data)[:1]]
        words = [
            f"overflow ({row['data']})" if row["overflow"] else
            f"{cell(row, measure_of(row))} ({UNITS[measure_of(row)]}, {row['data']})" for row in each
        ]  # fmt: skip
        if each:
            told.append(f"{coupling} {FACTORS[each[0]['factor']]} {' and '.join(words)}")
    return "With adapters as they start (N(0, 0.02²), rank 8), at the default factor: " + "; ".join(told) + "."


def where_it_holds(rows: Rows) -> str:
    """For each model and data set, the largest factor of the centred coupling at which the mean change stays below the bounds."""
    lines = []
    for model, title in START.items():
        for data in unique(of(rows, model=model), "data"):
            by_factor = {factor: alone(rows, factor, model=model, data=data, coupling="centred") for factor in FACTORS if factor != 0.1}
            default, cells = by_factor[1 / 16], []
            for measure in BOUNDS:
                there = default and default[measure]
                cells += [cell(default, measure), _holds_from(by_factor, measure)] if there else ["-", "-"]
            lines.append([title.split(" (")[0], data, *cells])
    heads = (f"change of the {UNITS[measure]} at 1/16 | at most {bound:.2f} from" for measure, bound in BOUNDS.items())
    return table(f"model | texts | {' | '.join(heads)}", lines, "ll")


def _holds_from(by_factor: dict[float, dict | None], measure: str) -> str:
    """The largest factor from which on, downwards, the mean is within the bound."""
    holding = "none measured"
    for factor, row in sorted(by_factor.items()):
        if row is None or row["overflow"] or abs(row[measure]["mean"]) > BOUNDS[measure]:
            break
        holding = FACTORS[factor]
    return holding


def outputs_table(rows: Rows) -> str:
    """MEFT1 with its published factor, by what the layers hand on."""
    outputs, shown = ("newest", "mean", "sum"), lambda row: f"{cell(row, measure_of(row))} ({UNITS[measure_of(row)]})" if row else "-"
    rows = [row for row in of(rows, coupling="meft1", factor=0.1) if row["output"] in outputs]
    lines = [line for model in START for line in pivot(of(rows, model=model), "model data", "output", outputs, None, shown)]
    return table(["model", "texts", *outputs], [[START[model].split(" (")[0], *rest] for model, *rest in lines], "ll")


# --- bytes


def bytes_table(rows: Rows) -> str:
    """By method: what the forward of the body leaves for backward, the peak of the step, and both against full fine-tuning."""
    if not rows:
        return UNMEASURED
    lines = []
    for row in rows:
        cells = [Cell().format("{0:mib} | {1:share}", row[name], saved(rows, name)[row["method"]]) for name in ("kept_bytes", "peak_bytes")]
        lines.append([row["method"], f"{row['trained_parameters'] / 1e6:,.1f} M", *cells])
    heads = "method | trained parameters | kept after forward, MiB | below full | peak of the step, MiB | below full"
    return table(heads, lines)


def saved(rows: Rows, name: str = "peak_bytes") -> dict[str, float | None]:
    """The share of full fine-tuning's bytes that each other method does without."""
    sizes = by(rows, "method", name)
    return {method: None if method == REFERENCE else 1 - size / sizes[REFERENCE] for method, size in sizes.items()}


def claim(rows: Rows) -> str:
    """Whether every reversible method is 84 % below full fine-tuning, and what else is."""
    sentences = []
    for model in TRACED.values():
        shares = saved(of(rows, model=model, layers=LAYERS))
        coupled = [share for method, share in shares.items() if method.split()[0] in COUPLINGS]
        others = [method for method, share in shares.items() if method.split()[0] not in COUPLINGS and (share or 0) >= CLAIMED]
        verdict = "all" if min(coupled) >= CLAIMED else f"{sum(share >= CLAIMED for share in coupled)} of {len(coupled)}"
        sentences.append(
            f"- {model}: at the peak, {verdict} reversible methods are {100 * CLAIMED:.0f} % or more below full fine-tuning "
            f"({100 * min(coupled):.1f} to {100 * max(coupled):.1f} %). So are, without any coupling: {'; '.join(others) or 'none'}."
        )
    return "\n".join(sentences)


def over_depth(rows: Rows) -> tuple[Rows, list[int]]:
    """The rows of RoBERTa-large whose methods were traced at every depth, by method; and the depths."""
    rows = of(rows, model=TRACED["roberta"])
    depths = sorted(unique(rows, "layers"))
    methods = [method for method in unique(of(rows, layers=depths[0]), "method") if len(of(rows, method=method)) == len(depths)]
    return [row for method in methods for row in of(rows, method=method)], depths


def depth_table(rows: Rows) -> str:
    """Kept after forward / peak, by depth."""
    rows, depths = over_depth(rows)
    lines = pivot(rows, "method", "layers", depths, None, lambda row: f"{mib(row['kept_bytes'])} / {mib(row['peak_bytes'])}")
    return table(["method", *(f"{depth} layers" for depth in depths)], lines)


def rival(rows: Rows) -> str:
    """Peaks of two-level checkpointing against reversible layers, by depth."""
    rows, depths = over_depth(rows)
    peaks, sentences = by(rows, "method layers", "peak_bytes"), []
    for method, name in (("centred exact", "exact numerics at c = 1/16"), ("centred float", "float numerics")):
        less = [depth for depth in depths if peaks[TWO_LEVELS, depth] < peaks[method, depth]]
        where = "at every depth that was traced" if less == depths else f"at {' and '.join(map(str, less)) or 'none'} layers alone"
        sentences.append(f"less than {name} {where}")
    return f"At the peak, with layers of RoBERTa-large, two-level checkpointing needs {' and '.join(sentences)}."


# --- what the inverse is off by


def inverse_table(rows: Rows) -> str:
    """Float numerics by depth, in float32 and bfloat16 layers, beside what the warning expects of float32 ones; and exact numerics."""
    found, lines = by(rows, "model coupling layers numerics dtype"), []
    for model, coupling, layers in unique(rows, "model coupling layers"):
        (single, half), exact = (
            [found.get((model, coupling, layers, numerics, dtype)) for dtype in ("float32", "bfloat16")] for numerics in ("float", "exact")
        )
        expected = EPSILON * single["divisor"] ** -layers if single else None
        cells = [_number(expected), _off(single), _off(half), " / ".join(map(_off, exact))]
        lines.append([START[model].split(" (")[0], coupling, layers, *cells])
    heads = "model | coupling | reversible layers | expected, float32 | found, float32 | found, bfloat16 | exact numerics, both"
    return table(heads, lines, "ll")


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def _off(row: dict | None) -> str:
    return "-" if row is None else _number(row["inverse_error"]) if row["is_finite"] else "not finite"
