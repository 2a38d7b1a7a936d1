"""Tables of what couplings change before training, from results/start_point.jsonl. Numbers are means ± standard deviations over texts."""

MODELS = {
    "minilm": "all-MiniLM-L6-v2 (BERT, post-norm, 6 layers)",
    "smollm2": "SmolLM2-135M-Instruct (Llama, pre-norm, 30 layers)",
    "stories15m": "stories15M (Llama, pre-norm, 6 layers)",
}
COUPLINGS = ("centred", "meft1", "meft2", "meft3")
FACTORS = {0.25: "1/4", 0.125: "1/8", 0.1: "0.1 (float)", 0.0625: "1/16", 0.03125: "1/32"}
MOST_LOSS, MOST_STATE = 0.02, 0.10


def chosen(rows: list[dict], **wanted) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def data_of(rows: list[dict], model: str) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows if row["model"] == model))


def alone(rows: list[dict], model: str, data: str, coupling: str, factor: float) -> dict | None:
    """The run of the coupling without adapters: in fixed point, or in float where the factor is no power of two."""
    numerics = "float" if factor == 0.1 else "exact"
    same = {"model": model, "data": data, "coupling": coupling, "factor": factor, "numerics": numerics}
    found = chosen(rows, **same, output=None, adapter_init_std=0.0)
    return found[0] if found else None


def table(rows: list[dict], model: str) -> str:
    """By coupling and factor: relative change of the final states, and of the loss where there is one."""
    columns = data_of(rows, model)
    if not columns:
        return "Not measured yet."
    measures = ("state_change", "loss_change") if any(row["loss_change"] for row in chosen(rows, model=model)) else ("state_change",)
    words = {"state_change": "states", "loss_change": "loss"}
    heads = [f"{data}: {words[measure]}" for data in columns for measure in measures]
    lines = ["| coupling | factor | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(heads)]
    for coupling in COUPLINGS:
        for factor, name in FACTORS.items():
            found = [alone(rows, model, data, coupling, factor) for data in columns]
            if any(found):
                cells = [cell(row, measure) for row in found for measure in measures]
                lines.append(f"| {coupling} | {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_plain_losses(rows, model, columns), _numerics(rows, model), "", _adapters(rows, model, columns)])


def cell(row: dict | None, measure: str) -> str:
    if row is None:
        return "-"
    if row["overflow"]:
        return "overflow"
    sign = "+" if measure == "loss_change" else ""
    return f"{row[measure]['mean']:{sign}.3f} ± {row[measure]['deviation']:.3f}"


def _plain_losses(rows: list[dict], model: str, columns: list[str]) -> list[str]:
    found = [(data, chosen(rows, model=model, data=data, coupling="centred")) for data in columns]
    losses = [f"{each[0]['plain_loss']['mean']:.3f} on {data}" for data, each in found if each and each[0]["plain_loss"]]
    return [f"Loss without a coupling: {', '.join(losses)}."] if losses else []


def _numerics(rows: list[dict], model: str) -> str:
    """How far apart fixed point and float are: what the coupling changes is not a matter of rounding."""
    pairs = {}
    for row in chosen(rows, model=model, output=None, adapter_init_std=0.0, overflow=None):
        pairs.setdefault((row["data"], row["coupling"], row["factor"]), {})[row["numerics"]] = row["state_change"]["mean"]
    apart = [abs(pair["exact"] / pair["float"] - 1) for pair in pairs.values() if len(pair) == 2]
    return f"Fixed point and float differ by at most {100 * max(apart):.2g} % of a mean." if apart else ""


def _adapters(rows: list[dict], model: str, columns: list[str]) -> str:
    """With adapters as they start by default, in fixed point."""
    found = []
    for coupling in COUPLINGS:
        each = [chosen(rows, model=model, data=data, coupling=coupling, numerics="exact", adapter_init_std=0.02) for data in columns]
        if each := [some[0] for some in each if some]:
            found.append(f"{coupling} {FACTORS[each[0]['factor']]} {' and '.join(map(_in_words, each))}")
    return "With adapters as they start (N(0, 0.02²), rank 8), at the default factor: " + "; ".join(found) + "."


def _in_words(row: dict) -> str:
    if row["overflow"]:
        return f"overflow ({row['data']})"
    measure = "loss_change" if row["loss_change"] else "state_change"
    return f"{cell(row, measure)} ({'loss' if measure == 'loss_change' else 'states'}, {row['data']})"


def where_it_holds(rows: list[dict]) -> str:
    """For each model and data set, the largest factor of the centred coupling at which the mean change stays below the bounds."""
    lines = [
        f"| model | texts | change of the loss at 1/16 | at most {MOST_LOSS} from | change of the states at 1/16 | at most "
        f"{MOST_STATE:.2f} from |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model, title in MODELS.items():
        for data in data_of(rows, model):
            default = alone(rows, model, data, "centred", 0.0625)
            has_loss = bool(default and default["loss_change"])
            cells = [
                cell(default, "loss_change") if has_loss else "-",
                _from(rows, model, data, "loss_change", MOST_LOSS) if has_loss else "-",
            ]
            cells += [cell(default, "state_change"), _from(rows, model, data, "state_change", MOST_STATE)]
            lines.append(f"| {title.split(' (')[0]} | {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _from(rows: list[dict], model: str, data: str, measure: str, most: float) -> str:
    """The largest factor from which on, downwards, the mean is within the bound."""
    holding = None
    for factor in sorted(factor for factor in FACTORS if factor != 0.1):
        row = alone(rows, model, data, "centred", factor)
        if row is None or row["overflow"] or abs(row[measure]["mean"]) > most:
            break
        holding = FACTORS[factor]
    return holding or "none measured"


def outputs_table(rows: list[dict]) -> str:
    """MEFT1 with its published factor, by what the layers hand on."""
    outputs = ("newest", "mean", "sum")
    lines = ["| model | texts | " + " | ".join(outputs) + " |", "|---|---|" + "---:|" * len(outputs)]
    for model, title in MODELS.items():
        for data in data_of(rows, model):
            found = [chosen(rows, model=model, data=data, coupling="meft1", factor=0.1, output=output) for output in outputs]
            if all(found):
                measure = "loss_change" if found[0][0]["loss_change"] else "state_change"
                unit = "loss" if measure == "loss_change" else "states"
                cells = [f"{cell(row[0], measure)} ({unit})" for row in found]
                lines.append(f"| {title.split(' (')[0]} | {data} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
