"""The measured table of architectures: what was committed still holds for a sample, and what it promises."""

import json
from pathlib import Path

import pytest

from tests.support.scripts import load

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = [json.loads(line) for line in (ROOT / "results" / "coverage.jsonl").read_text().splitlines()]
# one for each way of following layers, and of refusing them
SAMPLE = {
    "causal": [
        "llama",
        "qwen3_next",
        "falcon_h1",
        "zamba2",
        "bloom",
        "deepseek_v32",
        "qwen4_exp_text",
        "gemma3",
        "mamba",
        "minimax_m3_vl_text",
        "openai-gpt",
    ],
    "masked": ["modernbert", "layoutlm", "deberta-v2"],
    "seq2seq": ["bart", "t5", "t5gemma2"],
}


@pytest.fixture(scope="module")
def coverage():
    return load("coverage")


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in SAMPLE.items() for name in names])
def test_a_sample_is_as_committed(coverage, kind, name):
    (expected,) = (row for row in COMMITTED if (row["kind"], row["type"]) == (kind, name))
    found = coverage.measured(kind, name)
    assert {m: found[m]["outcome"] for m in coverage.METHODS} == {m: expected[m]["outcome"] for m in coverage.METHODS}
    assert found["followed"] == expected["followed"]


def test_a_wrong_gradient_would_be_seen(coverage, monkeypatch):
    from hf_memtune.core.owed import OwedGradients
    from hf_memtune.methods import verify

    monkeypatch.setattr(OwedGradients, "book", lambda *args: None)
    assert coverage.measured("causal", "llama")["streaming"]["outcome"] == "refused"
    monkeypatch.setattr(verify, "verify_stream", lambda *_: None)
    assert coverage.measured("causal", "llama")["streaming"]["outcome"] == "wrong"


def test_nothing_is_wrong_and_nothing_crashes(coverage):
    outcomes = [(row["type"], method, row[method]["outcome"]) for row in COMMITTED for method in coverage.METHODS if method in row]
    assert [entry for entry in outcomes if entry[2] in ("wrong", "crashed") and entry[1] != "checkpointing"] == []
    streams = [row for row in COMMITTED if row["kind"] == "causal" and row.get("streaming", {}).get("outcome") == "exact"]
    assert len(streams) >= 150


def test_refusals_name_what_to_do(coverage):
    reasons = [
        row[m]["reason"]
        for row in COMMITTED
        for m in coverage.METHODS
        if row.get(m, {}).get("outcome") == "refused" and m != "checkpointing"
    ]
    remedies = ("activation checkpointing", "activation_checkpointing", "token_gradient=", "Set config.", "Use ", "Choose ", "Leave ")
    assert [reason for reason in reasons if not any(remedy in reason for remedy in remedies)] == []
