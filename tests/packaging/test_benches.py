"""The measurements of speed, of precision and of the gradient of chosen tokens, in small: every method acts in them."""

import json
import re

import pytest

from hf_memtune import StreamingConfig
from tests.support import scripts
from tests.support.folders import in_new_process, llama, write_rows

options_of = scripts.load("methods").options_of

CHECKPOINTED = "exact streaming 1024 + checkpointing"
TEXTS = ["write about the sea and a red sun", "name three colours of the numbers one two", "a good film is a poem about blue sea"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    for data in ("movie_reviews", "alpaca"):
        (folder / "data" / data).mkdir(parents=True)
    (folder / "models").mkdir()
    for model in ("stories15M", "smollm2-135m-instruct"):
        llama(folder / "models" / model)
    write_rows(folder / "data" / "movie_reviews" / "imdb.jsonl", [{"text": f"{TEXTS[n % 3]} {TEXTS[n % 2]}"} for n in range(40)])
    rows = [{"instruction": f"name {n} colours", "input": "", "output": "red green blue sun sea " * 3} for n in ("one", "two", "three")]
    write_rows(folder / "data" / "alpaca" / "train.jsonl", rows * 20)
    return folder


def rows_of(script, assets, *options, run=scripts.run):
    out = assets / f"{script}.jsonl"
    done = run(scripts.FOLDER / f"{script}.py", *options, "--out", out, cwd=assets)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def of_alpaca(assets):
    return "--model", assets / "models" / "stories15M", "--data", assets / "data" / "alpaca" / "train.jsonl"


def test_speed_of_every_method(assets):
    rows = rows_of("bench_speed", assets, *of_alpaca(assets), "--tokens", "140", "--repeats", "1")
    methods = [row["method"] for row in rows if row["train"] == "full"]
    assert methods == [row["method"] for row in rows if row["train"] == "lora"] and len(set(methods)) == 8
    assert {"plain", "exact streaming 128", "checkpointing + logit-free loss", "TokenSeek 0.1"} <= set(methods)
    assert all(row["seconds"] > 0 for row in rows)


def test_methods_that_would_do_nothing_or_are_none_are_refused(assets):
    """512 tokens are one chunk of 512; and a name that means nothing is no method."""
    for method, said in (
        ("exact streaming 512", "rows of 512 tokens are one chunk of exact streaming 512"),
        ("streaming", "method 'streaming'"),
    ):
        done = scripts.run(scripts.FOLDER / "bench_speed.py", *of_alpaca(assets), "--methods", method, cwd=assets)
        assert done.returncode == 1 and said in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "plain + checkpointing",
        "checkpointing, by chunks",
        "exact streaming",
        "exact streaming 5, twice",
        "seeking x",
        "seeking 0.1, by chunks",
    ],
)
def test_names_of_methods(name):
    assert options_of("exact streaming 5 + checkpointing, by chunks, offloaded") == {
        "checkpointing": True, "strategy": StreamingConfig(sequence_chunk_size=5, stream_order="chunks", kv_offload=True),
    }  # fmt: skip
    assert options_of("TokenSeek 0.1")["strategy"].preset == "tokenseek" and options_of("plain") == {}
    with pytest.raises(ValueError, match=re.escape(name)):
        options_of(name)


def test_precision_of_sums(assets):
    plain, *streamed = rows_of("bench_precision", assets, *of_alpaca(assets), "--tokens", "100")
    errors = {(row["chunk"], row["sums"]): row["error_of_keys_and_values"] for row in streamed}
    assert 0 < max(errors.values()) < 2 * plain["error_of_keys_and_values"]
    assert errors[16, "bfloat16"] != errors[64, "bfloat16"]  # chunks are chunks


def test_chunks_left_out_of_backward(assets):
    arms = {row["arm"]: row for row in rows_of("bench_skip", assets, "--batches", "2", "--chunk", "4", "--assets", assets)}
    least, most, cut = (arms[f"every label, {name}"] for name in ("skip below 0", "skip below 1", "cut"))
    assert least["error"] < 1e-3 < most["error"] and least["tokens_with_gradient"] > most["tokens_with_gradient"] > 0
    assert cut["error"] > 1e-3 and cut["tokens_with_gradient"] < 0.9  # prompts


def test_bias_and_noise_of_chosen_tokens(assets):
    """Through the whole stream an even draw is noise, but for what two draws a batch leave of it; the best tokens are bias alone."""
    arms = ["random/sample/stream/30%/labels", "combined/top/cut/30%", "true_gradient/sample/cut/30%/labels", "labelled/cut"]
    options = ["--task", "stories-imdb", "--batches", "4", "--steps", "2", "--assets", assets, "--arms", *arms]
    rows = {(row["arm"], row["point"]): row for row in rows_of("bench_estimator", assets, *options)}
    assert len(rows) == 8
    for point in ("beginning", "end"):
        drawn, best = rows[arms[0], point], rows[arms[1], point]
        assert best["bias"] == best["rms"] > 0 and drawn["bias"] < 0.7 * drawn["rms"]
        assert rows["labelled/cut", point]["rms"] == 0  # every token has a label: none is cut
        for row in (drawn, best):
            assert row["bias"] == pytest.approx(max(0.0, row["bias_squared"]) ** 0.5, abs=0.01) and row["bias_squared_error"] > 0


def test_what_scorers_keep(assets):
    rows = {row["scorer"]: row for row in rows_of("bench_scorers", assets, "--rows", "3", "--assets", assets)}
    assert len({row["kept"] for row in rows.values()}) == 1 and rows["loss"]["kept"] < rows["loss"]["of"]
    for name, row in rows.items():
        assert row["overlap"][name] == 1 and row["overlap"]["loss"] == pytest.approx(rows["loss"]["overlap"][name])
        assert all(sum(shares[name].values()) == pytest.approx(1) for shares in row["shares"].values())
    answers = {name: row["shares"]["role"][name]["with a label (answer)"] for name, row in rows.items()}
    assert answers["loss"] > answers["random"]  # a token without a label has no loss


def test_ways_to_choose_that_are_measured_have_settings():
    every_arm = scripts.load("bench_estimator").every_arm
    from learning.arms import check

    arms = [*every_arm()]
    assert len(arms) == len(set(arms)) and "random/top/stream/10%/labels" in arms and "true_gradient/sample/skip/30%/labels" in arms
    for arm in arms[:-1]:  # the last is called otherwise there
        check("quality", arm)


def test_a_bias_is_shown_with_what_its_batches_leave_open():
    """Rows of before, which lack it, stand as they were."""
    tables = scripts.load("tables_gradients")
    old = {
        "task": "t",
        "point": "end",
        "arm": "random/sample/cut/10%",
        "rms": 1.0,
        "bias": 0.5,
        "cosine": 0.1,
        "kept": 0.1,
        "conditions": {},
    }
    new = old | {"arm": "true_gradient/top/cut/10%", "bias_squared": 0.25, "bias_squared_error": 0.12}
    unsure = old | {"arm": "loss/sample/cut/10%", "bias": 0.0, "bias_squared": -0.04, "bias_squared_error": 0.1}
    text = tables.estimator_table([old, new, unsure])
    assert "| 1.00 | 0.50 | 0.10 |" in text and "| 1.00 | 0.50 (0.10 to 0.70) | 0.10 |" in text and "| 0.00 (0.00 to 0.40) |" in text
    assert tables.BIAS_RANGE in text and tables.UNSCALED in text
    assert not {tables.BIAS_RANGE, tables.UNSCALED} & {*tables.estimator_table([old]).split("\n\n")}


def test_one_long_row(assets):
    options = (*of_alpaca(assets), "--tokens", "2100")
    rows_of("bench_length", assets, *options)
    found = rows_of("bench_length", assets, *options, "--traced")
    rows, traced = ({row["method"]: row for row in found if row["traced"] is is_traced} for is_traced in (False, True))
    plain, streamed, offloaded = (rows[name] for name in ("plain", CHECKPOINTED, f"{CHECKPOINTED}, offloaded"))
    assert len(rows) == 6 and plain["gradient_difference"] == 0
    assert (
        {row["conditions"].get("data") for row in rows.values()} == {"alpaca"} != {row["conditions"].get("data") for row in traced.values()}
    )
    for row in (streamed, offloaded):
        assert row["against"] == "plain" and 0 < row["gradient_difference"] < 1e-3
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert offloaded["peak_bytes"] < streamed["peak_bytes"] < 0.6 * plain["peak_bytes"]
    assert offloaded["host_bytes"] > 0 == streamed["host_bytes"] and rows.keys() == traced.keys()
    for name, row in rows.items():
        assert traced[name]["peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05), name
        assert traced[name]["host_bytes"] == row["host_bytes"]


def test_the_committed_rows_of_an_offloaded_step_are_what_the_docs_make_of_them():
    """Bytes of a token on the device, of SmolLM2 in float32: keys, values and their sums of one layer, a hidden state, cosines and sines, ids and
    labels; and one number for each chunk. That the code needs no more is tested in tests/methods/test_layer_order.py."""
    name, lines = f"{CHECKPOINTED}, offloaded", (scripts.FOLDER.parent / "results" / "length.jsonl").read_text().splitlines()
    peaks = {row["tokens"]: row["peak_bytes"] for row in map(json.loads, lines) if row["traced"] and row["method"] == name}
    assert (peaks[131072] - peaks[32768]) / (131072 - 32768) == 4 * (2 * 2 * 3 * 64 + 576 + 2 * 64) + 2 * 8 + 4 / 1024
    assert peaks[131072] < 2**30


def test_killed_runs_resume_to_the_same_bits(assets):
    rows = rows_of("kill_resume", assets, "--modes", "streaming", "--kills", "2", run=in_new_process)  # it forks
    assert [row["while"] for row in rows] == ["anything", "writing"] and all(row["equal"] for row in rows)


def test_seconds_are_compared_within_the_last_run(monkeypatch):
    """Of checkpointing by itself and with the loss without logits; where a run has not both, one column is empty."""
    tables = scripts.load("tables")

    def run(when, **seconds):
        step = {"model": "m", "train": "lora", "tokens": 64, "conditions": {"rows": 1, "dtype": "float32", "commit": when}}
        return [step | {"method": name, "seconds": value, "relative": None} for name, value in seconds.items()]

    logit_free = "checkpointing + logit-free loss"
    rows = run("old", **{"checkpointing": 5.0, logit_free: 1.0}) + run("new", **{logit_free: 4.0, "exact streaming 512": 3.0})
    monkeypatch.setattr(tables, "rows_of", lambda name: rows)
    assert [line.split("|")[-4:-1] for line in tables.speed_table().splitlines()[2:]] == [
        [" - ", " - ", " 1.00 "],
        [" - ", " - ", " 0.75 "],
    ]
    assert "| streaming, chunks of 512 | 0.75 |" in tables.ratios_table()
    rows += run("newest", **{"checkpointing": 6.0, logit_free: 4.0, "exact streaming 512": 3.0})
    assert "| 3.00 | - | 0.50 | 0.75 |" in tables.speed_table()


def test_how_far_seconds_of_one_step_lie_apart(monkeypatch):
    """In one run, and in two; the first method of a run, which pays for what happens once, is left out between runs."""
    tables = scripts.load("tables")

    def run(when, repeats, **spreads):
        step = {"model": "m", "train": "lora", "tokens": 64, "conditions": {"rows": 1, "repeats": repeats, "commit": when}}
        return [step | {"method": name, "seconds": sum(spread) / 2, "spread": [*spread]} for name, spread in spreads.items()]

    rows = run("old", 2, plain=(9.0, 11.0), checkpointing=(2.0, 2.0)) + run("new", 1, plain=(50.0, 50.0), checkpointing=(3.0, 3.0))
    monkeypatch.setattr(tables, "rows_of", lambda name: rows)
    assert "up to 20% of their mean apart, half of them 10% or less" in tables.scatter_sentence()
    assert "of two commits, up to 50% (" in tables.scatter_sentence()


def test_the_longest_row_is_read_off_between_predictions():
    """Bytes grow as the largest of several straight lines: what is read off is no longer than what fits."""
    from tables_longest import cell, longest

    peak = lambda tokens: max(1000 + 2 * tokens, 200 + 6 * tokens, 10 * tokens - 2000)  # noqa: E731
    knots = [(tokens, peak(tokens)) for tokens in (100, 400, 1600, 3200, 6400)]
    for room in range(1300, 90_000, 700):
        found = longest(knots, room)
        assert found is not None and peak(found) <= room < peak(found + 200)
    assert longest(knots, peak(100) - 1) is None
    for last, said in ((peak(6400), "> 1,000K"), (2 * peak(6400), "> 6K")):  # sibling: what bends at its end is not extended
        assert cell({"peak_bytes": {str(n): each for n, each in knots[:-1]} | {"6400": last}}, 24) == said
    huge = {"peak_bytes": {"4096": 2**40, "8192": 2**41}}
    assert cell(huge, 24) == "< 4K" and cell({"left_out": "experts"}, 24) == "-"
