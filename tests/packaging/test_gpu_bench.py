"""The measurements on a GPU, in small on a CPU: the same code, bytes counted where a card would tell them."""

import json

import pytest
import torch

from tests.support.scripts import load

bench_gpu, tables = load("bench_gpu"), load("tables")
from gpu import exactness, longest, machine, sizes, steps  # noqa: E402  # beside the script, which is loaded first

STREAMED = "exact streaming 16 + checkpointing"
WITHOUT_END = "100000"  # seconds: what is measured must not depend on the machine


def run(out, *options, seconds=WITHOUT_END):
    """(status, lines of the file) of one call."""
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main(["--tiny", "--device", "cpu", "--seconds", seconds, "--out", str(out), *options])
    return ended.value.code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu") / "gpu.jsonl"


@pytest.fixture(scope="module")
def rows(out):
    status, found = run(out)
    assert status == 0
    return found


def of(rows, part, **wanted):
    return [row for row in rows if row["part"] == part and all(row[name] == value for name, value in wanted.items())]


# --- what is written


def test_every_part_writes_lines_with_their_conditions(rows):
    assert {row["part"] for row in rows} == set(bench_gpu.PARTS)
    assert all({"gpu", "torch", "transformers", "commit", "device"} <= row["conditions"].keys() for row in rows)
    assert not any("left_out" in row for row in rows)


def test_gradients_are_exact_by_kernel_and_dtype(rows):
    found = of(rows, "exactness")
    assert {(row["kernel"], row["dtype"]) for row in found} == {(k, d) for k in ("sdpa", "eager") for d in ("bfloat16", "float32")}
    assert all(row["exact"] for row in found)
    assert max(row["error"] for row in of(found, "exactness", dtype="float32")) < 1e-5
    assert all(row["error"] > 1e-3 < row["error_of_plain"] for row in of(found, "exactness", dtype="bfloat16"))


def test_bytes_are_those_of_the_trace(rows):
    found = of(rows, "step")
    same = [row for row in found if row["method"] in ("plain", "checkpointing", STREAMED)]
    assert len(same) == 3 and all(row["traced_bytes"] == row["peak_bytes"] for row in same)
    # Where the loss is the peak, the trace has the last token in it, which has no label: a row of logits more.
    assert all(1 <= row["traced_bytes"] / row["peak_bytes"] < 1 + 1 / row["tokens"] for row in found)
    assert [row["host_bytes"] for row in found] == [row["traced_host_bytes"] for row in found]
    peaks = {row["method"]: row["peak_bytes"] for row in found}
    assert peaks[STREAMED] < peaks[f"{STREAMED}, attention kept"] < peaks["checkpointing"] < peaks["plain"]


def test_long_rows_in_many_chunks_are_not_traced(monkeypatch):
    monkeypatch.setattr(steps, "TRACED_CHUNKS", 2)  # of 16 tokens, where a row has 48
    part = steps.Steps(machine.Machine(torch.device("cpu"), sizes.TINY))
    traced = {run["method"]: part.measured(run, 0.0)["traced_bytes"] for run in part.runs()}
    assert traced[STREAMED] is None and traced["checkpointing"] > 0


def test_the_longest_row_is_bracketed_by_memory(rows):
    found = {row["method"]: row for row in of(rows, "longest row")}
    assert all(0 < row["tokens"] < row["too_long"] and row["ended_by"] == "memory" for row in found.values())
    assert all(row["peak_bytes"] <= row["limit_bytes"] for row in found.values())
    assert found[STREAMED]["tokens"] > found["checkpointing"]["tokens"]


def test_offloaded_bytes_are_in_host_memory(rows):
    (here,), (offloaded,) = (of(rows, "step", method=STREAMED + more) for more in ("", ", offloaded"))
    assert here["host_bytes"] == 0 < offloaded["host_bytes"] and here["tokens"] == offloaded["tokens"]
    assert here["seconds"] > 0 < offloaded["seconds"]


def test_tables_of_the_lines(rows):
    text = tables.gpu_tables(rows)
    assert sum(line.startswith("| card |") for line in text.splitlines()) == len(bench_gpu.PARTS)
    assert "**no**" not in text and "**no**" in tables.gpu_tables([of(rows, "exactness")[0] | {"exact": False}])
    assert tables.gpu_tables([]) == "Not run on a GPU yet."


def test_a_table_says_what_ran_out_of_memory(rows):
    run = {name: of(rows, "step")[0][name] for name in ("part", "gpu", "model", "tokens", "method")}
    *_, last = tables.gpu_tables([run | {"left_out": "out of memory"}]).splitlines()
    assert last == f"| none | tiny | 48 | {run['method']} | - | - | - | - | - | out of memory |"


# --- what is told


def test_what_the_file_has_is_not_measured_again(rows, out):
    assert run(out) == (0, rows)


def test_a_wrong_gradient_is_told(tmp_path, monkeypatch, capsys):
    """The sibling: one matrix of many gets a tenth more than its gradient. It is told by every later call, too."""

    class Wrong(exactness.Streaming):
        def __enter__(self):
            self._given.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: 1.1 * gradient)
            return super().__enter__()

    monkeypatch.setattr(exactness, "Streaming", Wrong)
    for _ in range(2):
        status, found = run(tmp_path / "gpu.jsonl", "--parts", "exactness")
        assert status == 1 and "wrong gradients" in capsys.readouterr().out
        assert not any(row["exact"] for row in of(found, "exactness", dtype="float32"))


def test_a_step_that_fails_costs_no_other(tmp_path, monkeypatch):
    def measured(self, run, seconds):
        if run["kernel"] == "sdpa":
            raise RuntimeError("no kernel image")
        if run["dtype"] == "float32":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"exact": True}

    monkeypatch.setattr(exactness.Exactness, "measured", measured)
    status, found = run(tmp_path / "gpu.jsonl", "--parts", "exactness")
    assert status == 1
    assert [(row["kernel"], row["dtype"], row["order"], row.get("left_out")) for row in found] == [
        ("eager", "bfloat16", "chunks", None),
        ("eager", "bfloat16", "layers", None),
        ("eager", "float32", "chunks", "out of memory"),
        ("eager", "float32", "layers", "out of memory"),
    ]


def test_what_finds_no_time_is_left(tmp_path, capsys):
    assert run(tmp_path / "gpu.jsonl", "--parts", "exactness", seconds="0") == (0, [])
    assert "8 left for another call" in capsys.readouterr().out


@pytest.mark.parametrize("options, named", [(["--device", "cpu"], "--out"), (["--device", "cuda"], "--device")])
def test_results_of_a_cpu_are_never_those_of_a_gpu(options, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main(options)
    assert f"{named}: got" in capsys.readouterr().err


# --- the search for the longest row, of bytes that are known


def searched(limit_bytes, base=1000, slope=10, seconds=0.0, allowed=1e9, refused_above=None):
    tried = []

    def trial(tokens):
        tried.append(tokens)
        peak_bytes = base + slope * tokens
        is_refused = peak_bytes > limit_bytes or refused_above is not None and tokens > refused_above
        return None if is_refused else longest.Trial(peak_bytes, seconds * tokens)

    return longest.longest(trial, limit_bytes, 8, allowed), tried


@pytest.mark.parametrize("most", [8, 100, 1000, 30_000])
def test_the_longest_row_is_found_in_few_trials(most):
    found, tried = searched(1000 + 10 * most)
    assert found["ended_by"] == "memory" and len(tried) <= 7
    assert found["tokens"] <= most < found["too_long"] <= max(found["tokens"] + 8, 1.05 * found["tokens"])


def test_where_memory_runs_out_before_the_line_says_so():
    found, _ = searched(1_000_000, refused_above=90_000)
    assert found["ended_by"] == "memory" and found["tokens"] <= 90_000 < found["too_long"] < 1.06 * found["tokens"]


def test_where_trials_run_out_the_bracket_is_wider():
    found, tried = searched(1_000_000, refused_above=50_000)
    assert found["ended_by"] == "trials" and len(tried) == longest.MOST_TRIALS
    assert found["tokens"] <= 50_000 < found["too_long"]


def test_where_nothing_fits():
    found, _ = searched(500)
    assert (found["tokens"], found["too_long"], found["peak_bytes"]) == (0, 8, None)


def test_where_time_runs_out_the_row_is_no_bound():
    found, tried = searched(10**9, seconds=1.0, allowed=1000)
    assert found["ended_by"] == "seconds" and found["too_long"] is None and found["tokens"] == tried[-1] < found["predicted"]
