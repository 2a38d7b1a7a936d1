"""Tables of traced bytes, from results/reversible_memory.jsonl."""

MIB = 2**20
MODELS = {"roberta": "RoBERTa-large", "roberta-eager": "RoBERTa-large, eager attention", "opt": "OPT-1.3B"}
REFERENCE = "full fine-tuning"
CLAIMED = 0.84  # of the paper
LAYERS = 24


def of(rows: list[dict], model: str, layers: int = LAYERS) -> dict[str, dict]:
    """The rows of one model by method."""
    return {row["method"]: row for row in rows if row["model"] == model and row["layers"] == layers}


def table(rows: list[dict], model: str) -> str:
    """By method: what the forward of the body leaves for backward, the peak of the step, and both against full fine-tuning."""
    found = of(rows, model)
    if REFERENCE not in found:
        return "Not measured yet."
    lines = [
        "| method | trained parameters | kept after forward, MiB | below full | peak of the step, MiB | below full |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, row in found.items():
        cells = [f"{row['trained_parameters'] / 1e6:,.1f} M"]
        for name in ("kept_bytes", "peak_bytes"):
            cells += [f"{row[name] / MIB:,.0f}", "-" if method == REFERENCE else f"{100 * saved(found, method, name):.1f} %"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def saved(found: dict[str, dict], method: str, name: str) -> float:
    """The share of full fine-tuning's bytes that a method does without."""
    return 1 - found[method][name] / found[REFERENCE][name]


def claim(rows: list[dict]) -> str:
    """Whether every reversible method is 84 % below full fine-tuning, and what else is."""
    sentences = []
    for model in MODELS.values():
        if REFERENCE not in (found := of(rows, model)):
            continue
        coupled = [saved(found, method, "peak_bytes") for method, row in found.items() if is_coupled(method)]
        others = [method for method in found if not is_coupled(method) and saved(found, method, "peak_bytes") >= CLAIMED]
        verdict = "all" if min(coupled) >= CLAIMED else f"{sum(share >= CLAIMED for share in coupled)} of {len(coupled)}"
        sentences.append(
            f"- {model}: at the peak, {verdict} reversible methods are {100 * CLAIMED:.0f} % or more below full fine-tuning "
            f"({100 * min(coupled):.1f} to {100 * max(coupled):.1f} %). So are, without any coupling: {'; '.join(others) or 'none'}."
        )
    return "\n".join(sentences)


def is_coupled(method: str) -> bool:
    return method.split()[0] in ("centred", "meft1", "meft2", "meft3")


def depths(rows: list[dict]) -> list[int]:
    return sorted({row["layers"] for row in rows if row["model"] == MODELS["roberta"]})


def depth_methods(rows: list[dict]) -> list[str]:
    """Those that were traced at every depth."""
    by_depth = [of(rows, MODELS["roberta"], depth) for depth in depths(rows)]
    return [method for method in by_depth[0] if all(method in found for found in by_depth)] if by_depth else []


def depth_table(rows: list[dict]) -> str:
    """Kept after forward / peak, by depth."""
    heads = [f"{depth} layers" for depth in depths(rows)]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for method in depth_methods(rows):
        found = [of(rows, MODELS["roberta"], depth)[method] for depth in depths(rows)]
        lines.append(
            f"| {method} | " + " | ".join(f"{row['kept_bytes'] / MIB:,.0f} / {row['peak_bytes'] / MIB:,.0f}" for row in found) + " |"
        )
    return "\n".join(lines)


def rival(rows: list[dict]) -> str:
    """Peaks of two-level checkpointing against reversible layers, by depth."""
    two, sentences = f"{REFERENCE}, two-level checkpointing", []
    for method, name in (("centred exact", "exact numerics at c = 1/16"), ("centred float", "float numerics")):
        less = [
            depth
            for depth in depths(rows)
            if (found := of(rows, MODELS["roberta"], depth))[two]["peak_bytes"] < found[method]["peak_bytes"]
        ]
        where = "at every depth that was traced" if less == depths(rows) else f"at {' and '.join(map(str, less)) or 'none'} layers alone"
        sentences.append(f"less than {name} {where}")
    return f"At the peak, with layers of RoBERTa-large, two-level checkpointing needs {' and '.join(sentences)}."
