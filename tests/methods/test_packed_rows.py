"""Whether a model keeps packed rows apart, of several types; `tests/cli/test_packing.py` has what commands say."""

import pytest
import torch

from hf_memtune.architectures.packed_rows import problem_of_packed_rows
from tests.support.any_type import tiny
from tests.support.tolerances import NOTICED, tolerance

TOKENS = 64
APART = ["llama", "mixtral", "gemma3_text", "gptj", "gpt2", "deepseek_v3"]
TOGETHER = ["opt", "bloom", "gpt_oss", "mpt", "mamba2", "deepseek_v4", "minimax_m3_vl_text"]  # the last two pick blocks of keys


def collate(rows):
    """One row after the other; positions begin anew in each part."""
    parts = [length for row in rows for length in row["seq_lengths"]]
    columns = {name: torch.tensor([[token for row in rows for token in row[name]]]) for name in ("input_ids", "labels")}
    positions = torch.cat([torch.arange(length) for length in parts])[None]
    return columns | {"position_ids": positions, "labels": columns["labels"].masked_fill(positions == 0, -100)}


def distance(name):
    """Of the logits of two packed sequences from those of each by itself, by model code alone."""
    model = tiny(name, "causal", torch.float32).eval()
    ids = torch.randint(5, 90, (TOKENS,), generator=torch.Generator().manual_seed(1))
    batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": (24, 40)}])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        apart = torch.cat([model(input_ids=part[None], use_cache=False).logits for part in ids.split((24, 40))], dim=1)
    return (packed - apart).norm() / apart.norm()


@pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in [*APART, *TOGETHER] for dtype in (torch.float32, torch.bfloat16)],
)
def test_it_is_told_by_whether_rows_predict_what_they_do_apart(name, dtype):
    wrong = problem_of_packed_rows(tiny(name, "causal", dtype), collate, TOKENS)
    assert ("see one another" in (wrong or "")) == (name in TOGETHER)
    assert distance(name) > NOTICED if name in TOGETHER else distance(name) <= tolerance(torch.float32)


def test_other_positions_than_the_model_gives_itself_are_told():
    """RoBERTa and kin number a row from the place of the padding on."""
    assert "of the first row" in (problem_of_packed_rows(tiny("camembert", "causal", torch.float32), collate, TOKENS) or "")


def test_short_convolutions_show_a_neighbour_to_the_next_tokens_alone():
    """In the mean over a part that is as good as nothing."""
    assert "see one another" in (problem_of_packed_rows(tiny("lfm2", "causal", torch.float32), collate, TOKENS) or "")


def test_rows_that_are_numbered_on_are_told():
    """GPT-2 adds the position to each token: masks keep parts apart, positions that go on would not."""
    model = tiny("gpt2", "causal", torch.float32)
    numbering = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda positions: numbering(torch.arange(positions.shape[-1]).expand_as(positions))
    assert "numbered on" in (problem_of_packed_rows(model, collate, TOKENS) or "")
    del model.transformer.wpe.forward
    assert problem_of_packed_rows(model, collate, TOKENS) is None


def test_what_runs_no_packed_rows_says_why_and_what_runs_nothing_is_left_to_training(monkeypatch):
    model = tiny("llama", "causal", torch.float32)
    body = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda position_ids, **more: body(**more) if position_ids is None else 1 / 0)
    assert problem_of_packed_rows(model, collate, TOKENS) == "LlamaForCausalLM runs no packed rows: division by zero"
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
    assert problem_of_packed_rows(model, collate, TOKENS) is None
    assert problem_of_packed_rows(tiny("opt", "causal", torch.float32).to("meta"), collate, TOKENS) is None


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_is_judged_by_its_own_rounding(name):
    """As of deep mixtures in bfloat16, where rounding chooses experts: as much noise on a row by itself as on one that is packed."""
    model = tiny(name, "causal", torch.float32).eval()
    noise = torch.Generator().manual_seed(1)

    def rounded(logits):
        return logits + 0.003 * logits.norm(dim=-1, keepdim=True) * torch.randn(logits.shape, generator=noise) / logits.shape[-1] ** 0.5

    model.lm_head.register_forward_hook(lambda module, inputs, logits: rounded(logits))
    assert ("see one another" in (problem_of_packed_rows(model, collate, TOKENS) or "")) == (name == "opt")


@pytest.mark.parametrize(
    "scales, told",
    [
        ((1, 1.5, 1.5, 1), "see one another"),
        ((1, 1, 1.002, 1), "see one another"),
        ((1, 1.01, 1.005, 1.004), None),
        ((1, 1, 1, 1.02), "LlamaForCausalLM predicts otherwise of the first row"),
    ],
)
def test_what_lies_further_apart_than_rounding_is_told(scales, told):
    """Of a row by itself, after one part, after another, and before it."""
    model = tiny("llama", "causal", torch.float32)
    scale = iter(scales)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: next(scale) * logits)
    wrong = problem_of_packed_rows(model, collate, TOKENS)
    assert told in wrong if told else wrong is None


@pytest.mark.parametrize("packed_alone", [True, False])
def test_predictions_that_are_not_finite_are_no_neighbours(packed_alone):
    """Of a row by itself either, they are training's to show."""
    model = tiny("llama", "causal", torch.float32)
    calls = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: calls.append(0) or logits / (packed_alone and len(calls) == 1))
    wrong = problem_of_packed_rows(model, collate, TOKENS)
    assert wrong == ("LlamaForCausalLM runs no packed rows: what it predicts of them is not finite" if packed_alone else None)


@pytest.mark.parametrize("max_length", [2, 24, 10_000])
def test_the_rows_that_are_tried_are_no_longer_than_those_to_come(max_length):
    """But of two parts of several tokens."""
    lengths = []

    def spied(rows):
        lengths.append((len(rows[0]["input_ids"]), rows[0]["seq_lengths"]))
        return collate(rows)

    assert problem_of_packed_rows(tiny("llama", "causal", torch.float32), spied, max_length) is None
    assert {length for length, _ in lengths} == {{2: 8, 24: 24, 10_000: 256}[max_length]}
    assert all(len(parts) == 2 and min(parts) >= 3 for _, parts in lengths)
