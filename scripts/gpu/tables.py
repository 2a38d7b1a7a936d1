"""The tables of what was measured on a GPU."""

from collections.abc import Callable

from pages import mib

from gpu.names import EXACTNESS, LOGIT_FREE, LONGEST_ROW, OFFLOAD, OFFLOADED, PEAK_BYTES, STEP_TIME

Cells = Callable[[dict], list[str]]

NOT_RUN = "Not run on a GPU yet."
ENDED = {"memory": "", "seconds": ", or more: no time for a longer one", "trials": ", or more: not tried"}


def tables(rows: list[dict]) -> str:
    """A table for every part of which there are lines."""
    made: dict[str, Callable[[list[dict]], str]] = {
        EXACTNESS: _exactness, PEAK_BYTES: _peaks, STEP_TIME: _times, LONGEST_ROW: _longest, OFFLOAD: _offload,
    }  # fmt: skip
    parts = {name: [row for row in rows if row["part"] == name] for name in made}
    return "\n\n".join(made[name](found) for name, found in parts.items() if found) or NOT_RUN


def _table(heads: str, rows: list[dict], run: Cells, found: Cells) -> str:
    """run: of what was measured; found: of what came of it, where it did not run out of memory."""
    names = ["card", *heads.split(" | ")]
    lines = [[row["gpu"], *run(row), *([row["left_out"]] if "left_out" in row else found(row))] for row in rows]
    filled = (line + ["-"] * (len(names) - len(line)) for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *filled))


def _exactness(rows: list[dict]) -> str:
    run = lambda row: [row["kernel"], row["dtype"], f"{row['chunk']} of {row['tokens']}, by {row['order']}"]  # noqa: E731
    found = lambda row: [f"{row['error']:.2e}", f"{row['error_of_plain']:.2e}", "yes" if row["exact"] else "**no**"]  # noqa: E731
    return _table("kernel | dtype | chunk | error of the gradient | of plain training | within its bound", rows, run, found)


def _peaks(rows: list[dict]) -> str:
    found = lambda row: [mib(row["peak_bytes"]), mib(row["traced_bytes"]), f"{row['ratio']:.3f}"]  # noqa: E731
    return _table("model | tokens | method | peak MiB | traced MiB | traced / measured", rows, _run, found)


def _times(rows: list[dict]) -> str:
    return _timed(rows, lambda method: LOGIT_FREE, f"x {LOGIT_FREE}")


def _offload(rows: list[dict]) -> str:
    return _timed(rows, lambda method: method.removesuffix(OFFLOADED), "x on the device")


def _timed(rows: list[dict], of: Callable[[str], str], head: str) -> str:
    """of: the method that one's time is compared with."""
    key = lambda row, method: (row["gpu"], row["model"], row["tokens"], method)  # noqa: E731
    seconds = {key(row, row["method"]): row["seconds"] for row in rows if "seconds" in row}

    def found(row: dict) -> list[str]:
        base = seconds.get(key(row, of(row["method"])))
        relative = "-" if base is None else f"{row['seconds'] / base:.2f}"
        return [f"{row['seconds']:.3f}", relative, mib(row["peak_bytes"]), mib(row["host_bytes"])]

    return _table(f"model | tokens | method | seconds a step | {head} | peak MiB | MiB in host memory", rows, _run, found)


def _longest(rows: list[dict]) -> str:
    run = lambda row: [row["model"], row["card"], row["method"]]  # noqa: E731
    return _table(
        "model | limited to | method | longest row, tokens", rows, run, lambda row: [f"{row['tokens']:,}{ENDED[row['ended_by']]}"]
    )


def _run(row: dict) -> list[str]:
    return [row["model"], f"{row['tokens']:,}", row["method"]]
