"""Sections of the results page on gradients themselves: of the ways to choose tokens, and of sums in bfloat16."""

import json
from pathlib import Path

SELECTION = """## How far from the gradient of all tokens

Before the first step, in evaluation mode: the gradient of all trained parameters from a tenth of the tokens of a batch (`select_from=labels`
but where any token is meant), or from every labelled token with others left out of backward, against the exact one. *Error*: size of the
difference relative to the exact gradient, median over batches. Of a sample through the whole stream it is noise alone. *Cosine of sums*: of the gradients added up over all batches, in which noise cancels and bias stays. *Tokens run*: positions that
ran with gradient, per real token; a stream runs padding too.
"""
PRECISION = """## Sums in bfloat16

One long row of real text on weights in bfloat16, against the gradient of the same weights in float32: relative error of the gradient of all
parameters. What chunks owe to one another's keys and values is summed up in the dtype of the model; float32 sums change next to nothing.
"""


def sections(folder: Path) -> list[str]:
    """Those of which the folder has results."""
    parts = []
    if rows := _rows(folder / "gradient.jsonl"):
        parts.append(f"{SELECTION}\n{_selection_table(rows)}\n\n{_batches(rows[0])}\n")
    if rows := _rows(folder / "precision.jsonl"):
        parts.append(f"{PRECISION}\n{_precision_table(rows)}\n\n{_conditions(rows[0])}\n")
    return parts


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _selection_table(rows: list[dict]) -> str:
    lines = ["| tokens | error | cosine | cosine of sums | tokens run |", "|---|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['arm']} | {row['error']:.3f} | {row['cosine']:.3f} | {row['cosine_of_sums']:.3f} | {row['tokens_with_gradient']:.2f} |"
        for row in rows
    ])  # fmt: skip


def _precision_table(rows: list[dict]) -> str:
    lines = ["| method | tokens of a chunk | sums | error |", "|---|---:|---|---:|"]
    return "\n".join(lines + [f"| {row['method']} | {row['chunk'] or '-'} | {row['sums'] or '-'} | {row['error']:.4f} |" for row in rows])


def _batches(row: dict) -> str:
    described = row["conditions"]
    return f"{row['task']}: {described['batches']} batches of {described['rows']} rows. {_conditions(row)}"


def _conditions(row: dict) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row["conditions"].items() if value is not None)
    return f"Conditions: {told}."
