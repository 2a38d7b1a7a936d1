"""scripts/demo.py from end to end, on a tiny model."""

import json

import pytest
import torch

from tests.support import scripts
from tests.support.folders import in_new_process
from tests.support.tolerances import tolerance

DEMO = scripts.FOLDER / "demo.py"
METHODS = ["plain training", "activation checkpointing", "exact streaming, chunks of 64", "TokenSeek, 10%", "token seeking, 30%"]


def test_the_demo_compares_its_methods_and_writes_its_report(chat_model, long_instructions, tmp_path):
    short = ("--minutes", "0.0001", "--rows", "8")  # what a slow machine does
    done = scripts.run(DEMO, *short, "--model", chat_model, "--data", long_instructions, "--out", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in METHODS)
    found = json.loads((tmp_path / "made" / "results.json").read_text())
    assert [result["method"] for result in found["results"]] == METHODS
    assert "6 steps of 4 rows, fewer than 30 since this machine takes" in found["conditions"]["training"]
    for result in found["results"]:
        assert [step for step, _ in result["losses"]] == [0, 2, 4, 6]
        assert result["seconds_per_step"] > 0 and result["peak_bytes"] > 0
    plain, checkpointed, streamed, published, seeking = found["results"]
    assert plain["losses"] == checkpointed["losses"]  # the same gradients, recomputed
    assert streamed["losses"] == [[step, pytest.approx(loss, rel=tolerance(torch.float32))] for step, loss in plain["losses"]]
    assert streamed["losses"] != [[step, pytest.approx(loss, rel=tolerance(torch.float32))] for step, loss in seeking["losses"]]
    assert streamed["tokens_kept_share"] is None
    assert plain["loss_before"] == seeking["loss_before"] != seeking["loss_after"]
    assert 0.1 <= published["tokens_kept_share"] < 0.15 < seeking["tokens_kept_share"] < 0.36
    report, page = ((tmp_path / "made" / name).read_text() for name in ("report.html", "tokens.html"))
    assert all(name in report for name in METHODS) and "tokens.html" in report and "one small model" in report
    assert "held-out example 2" in page


def test_the_demo_says_how_to_get_a_missing_model(tmp_path):
    done = in_new_process(DEMO, "--model", "absent", cwd=tmp_path)
    assert done.returncode == 2 and "make assets" in done.stderr


def test_a_slow_machine_takes_fewer_steps():
    demo = scripts.load("demo")
    found = [demo.affordable(seconds, 7, 48) for seconds in (0.1, 1.5, 2.0, 3.0, 100.0)]
    assert found[0] == (demo.STEPS, 48) and found[-1] == (demo.FEWEST_STEPS, 16) and found == sorted(found, reverse=True)
    steps, rows = demo.affordable(3.0, 7, 48)
    needed = 3.0 * (steps * demo.RELATIVE + len(demo.METHODS) * demo.EVALUATIONS * demo.FORWARD * rows / 8)
    assert 2 * demo.FEWEST_STEPS <= steps < demo.STEPS and rows < 48 and 0.9 * 7 * 60 < needed <= 7 * 60


def test_help_of_the_demo(tmp_path):
    done = in_new_process(DEMO, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--quick" in done.stdout
