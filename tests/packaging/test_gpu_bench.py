"""The measurements on a GPU, in small on a CPU: the same code, bytes counted where a card would tell them."""

import json

import pytest
import torch

from tests.support.scripts import load

bench_gpu, tables = load("bench_gpu"), load("tables")
from gpu import exactness, longest, machine, sizes, steps, traces  # noqa: E402  # beside the script, which is loaded first

STREAMED = "exact streaming 16 + checkpointing"
WITHOUT_END = "100000"  # seconds: what is measured must not depend on the machine


def run(out, *options, seconds=WITHOUT_END):
    """(status, lines of the file) of one call."""
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main(["--tiny", "--device", "cpu", "--seconds", seconds, "--at_most", WITHOUT_END, "--out", str(out), *options])
    return ended.value.code, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu") / "gpu.jsonl"


@pytest.fixture(scope="module")
def rows(out):
    status, found = run(out, "--parts", *bench_gpu.PARTS)
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


def test_gradients_are_exact_with_keys_and_values_in_host_memory(rows):
    for order in ("chunks", "layers"):
        here, offloaded = (of(rows, "exactness", dtype="float32", kernel="sdpa", order=order, offloaded=each) for each in (False, True))
        assert [row["error"] for row in here] == [row["error"] for row in offloaded] != []


def test_bytes_are_those_of_the_trace(rows):
    found = of(rows, "step")
    traced = {row["method"]: row for row in of(rows, "trace")}
    same = [row for row in found if row["method"] in ("plain", "checkpointing", STREAMED)]
    assert len(same) == 3 and all(traced[row["method"]]["traced_bytes"] == row["peak_bytes"] for row in same)
    # Where the loss is the peak, the trace has the last token in it, which has no label: a row of logits more.
    assert all(1 <= traced[row["method"]]["traced_bytes"] / row["peak_bytes"] < 1 + 1 / row["tokens"] for row in found)
    assert [row["host_bytes"] for row in found] == [traced[row["method"]]["traced_host_bytes"] for row in found]
    peaks = {row["method"]: row["peak_bytes"] for row in found}
    assert peaks[STREAMED] < peaks[f"{STREAMED}, attention kept"] < peaks["checkpointing"] < peaks["plain"]
    assert "checkpointing + fused loss" in peaks


def test_a_trace_needs_no_device_and_is_of_no_card(rows, monkeypatch):
    assert {row["gpu"] for row in of(rows, "trace")} == {None} and len(of(rows, "trace")) == len(of(rows, "step"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_gpu._options(["--parts", "trace", "--device", "cpu"]).out == bench_gpu.OUT


def test_long_rows_in_many_chunks_are_not_traced(monkeypatch):
    monkeypatch.setattr(traces, "TRACED_CHUNKS", 2)  # of 16 tokens, where a row has 48
    methods = {run["method"] for run in traces.Traces(machine.Machine(torch.device("cpu"), sizes.TINY)).runs()}
    assert STREAMED not in methods and "checkpointing" in methods


def test_the_longest_row_is_bracketed_by_memory(rows):
    found = {row["method"]: row for row in of(rows, "longest row")}
    assert all(0 < row["tokens"] < row["too_long"] and row["ended_by"] == "memory" for row in found.values())
    assert all(row["peak_bytes"] <= row["limit_bytes"] for row in found.values())
    assert found[STREAMED]["tokens"] > found["checkpointing"]["tokens"]


def test_offloaded_bytes_are_in_host_memory(rows):
    (here,), (offloaded,) = (of(rows, "step", method=STREAMED + more) for more in ("", ", offloaded"))
    assert here["host_bytes"] == 0 < offloaded["host_bytes"] and here["tokens"] == offloaded["tokens"]
    assert here["seconds"] > 0 < offloaded["seconds"]
    chunks = of(rows, "step", method=f"{STREAMED}, by chunks, offloaded")[0]
    assert chunks["host_bytes"] > offloaded["host_bytes"]  # keys, values and sums of both layers, and not the input of one


def test_tables_of_the_lines(rows):
    text = tables.gpu_tables(rows)
    assert sum(line.startswith("| card |") for line in text.splitlines()) == len(bench_gpu.OF_A_CARD)
    assert "**no**" not in text and "**no**" in tables.gpu_tables([of(rows, "exactness")[0] | {"exact": False}])
    assert tables.gpu_tables([]) == tables.gpu_tables(of(rows, "trace")) == "Not run on a GPU yet."


def test_a_table_compares_what_is_offloaded_with_what_is_not(rows):
    one = dict.fromkeys(("peak_bytes", "host_bytes"), 2**20) | {"part": "step", "gpu": "none", "model": "tiny", "tokens": 48}
    timed = [one | {"method": STREAMED + more, "seconds": seconds} for more, seconds in (("", 2.0), (", offloaded", 3.0))]
    *_, here, offloaded = tables.gpu_tables([*timed, *of(rows, "trace", method=STREAMED)]).splitlines()
    assert [line.split(" | ")[5:7] for line in (here, offloaded)] == [["-", "-"], ["-", "1.50"]]
    assert [line.split(" | ")[8] for line in (here, offloaded)] == ["0", "-"]  # of a trace of some KiB


def test_a_table_says_what_ran_out_of_memory(rows):
    run = {name: of(rows, "step")[0][name] for name in ("part", "gpu", "model", "tokens", "method")}
    *_, last = tables.gpu_tables([run | {"left_out": "out of memory"}]).splitlines()
    assert last == f"| none | tiny | 48 | {run['method']} | - | - | - | - | - | - | out of memory |"


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
        ("eager", dtype, order, left_out)
        for dtype, left_out in (("bfloat16", None), ("float32", "out of memory"))
        for order in ("chunks", "chunks", "layers", "layers")  # offloaded and not
    ]


def test_what_finds_no_time_is_left(tmp_path, capsys):
    assert run(tmp_path / "gpu.jsonl", "--parts", "exactness", seconds="0") == (0, [])
    assert "16 left for another call" in capsys.readouterr().out


class Clock:
    """Time that passes only while something is measured."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_a_part_that_takes_too_long_leaves_no_time_to_others(tmp_path, monkeypatch, capsys):
    clock = Clock()

    def measured(self, run, seconds):
        clock.now += 100
        return {"exact": True}

    monkeypatch.setattr(bench_gpu, "time", clock)
    monkeypatch.setattr(exactness.Exactness, "measured", measured)
    monkeypatch.setattr(steps.Steps, "measured", lambda *args: pytest.fail("no time was left"))
    status, found = run(tmp_path / "gpu.jsonl", "--parts", "exactness", "step", seconds="99")
    assert (status, len(found)) == (0, 1)
    assert f"{15 + len(sizes.TINY.methods)} left for another call" in capsys.readouterr().out


def test_a_method_that_was_not_run_is_expected_to_take_as_long_as_the_slowest():
    part = steps.Steps(machine.Machine(torch.device("cpu"), sizes.TINY))
    run = {"model": "tiny", "tokens": 96, "method": "plain"}
    assert part.expected_seconds(run) == 0
    part._taken = {("tiny", "checkpointing"): (48, 3.0), ("tiny", "seeking 0.1"): (96, 2.0), ("another", "plain"): (48, 50.0)}
    assert part.expected_seconds(run) == 2 * 3.0 * 4
    part._taken["tiny", "plain"] = (48, 1.0)
    assert part.expected_seconds(run) == 2 * 1.0 * 4


def test_the_process_ends_itself_after_eight_minutes(tmp_path, monkeypatch):
    """And not where it ends before: what would end it is taken back."""
    heard = []
    monkeypatch.setattr(bench_gpu.faulthandler, "dump_traceback_later", lambda seconds, **how: heard.append((seconds, how["exit"])))
    monkeypatch.setattr(bench_gpu.faulthandler, "cancel_dump_traceback_later", lambda: heard.append("cancelled"))
    monkeypatch.setattr(bench_gpu, "_all", lambda options: heard.append("measured") or ([], [], []))
    with pytest.raises(SystemExit):
        bench_gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.jsonl")])
    assert heard == [(480.0, True), "measured", "cancelled"]


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
