"""The table of what the inverse is off by, from results/inverse.jsonl."""

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
MODELS = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}


def table(rows: list[dict]) -> str:
    """Float numerics by depth, in float32 and bfloat16 layers, beside what the warning expects of float32 ones; and exact numerics."""
    lines = ["| model | coupling | reversible layers | expected, float32 | found, float32 | found, bfloat16 | exact numerics, both |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    cells = {(row["model"], row["coupling"], row["layers"], row["numerics"], row["dtype"]): row for row in rows}
    for model, coupling, layers in dict.fromkeys(key[:3] for key in cells):
        single, half = (cells.get((model, coupling, layers, "float", dtype)) for dtype in ("float32", "bfloat16"))
        exact = [cells.get((model, coupling, layers, "exact", dtype)) for dtype in ("float32", "bfloat16")]
        expected = EPSILON["float32"] * single["divisor"] ** -layers if single else None
        shown = [_number(expected), _found(single), _found(half), " / ".join(_found(row) for row in exact)]
        lines.append(f"| {MODELS[model]} | {coupling} | {layers} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.0e}"


def _found(row: dict | None) -> str:
    if row is None:
        return "-"
    return _number(row["inverse_error"]) if row["is_finite"] else "not finite"
