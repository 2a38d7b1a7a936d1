"""Settings that waste time or teach little on the rows at hand are said before the first step; settings that fit are not."""

from functools import partial

import pytest

from hf_memtune import MemEfficientTrainingArguments
from hf_memtune.cli import main
from hf_memtune.cli.traps import Lengths, traps
from tests.support.folders import write_rows

ALL = {"token_seeking": True, "token_scorer": "random", "token_selection": "top", "select_from": "all", "token_ratio": 0.1}
CHECKPOINTED = {"sequence_chunk_size": 1024, "activation_checkpointing": True}


@pytest.fixture
def arguments(tmp_path):
    return partial(MemEfficientTrainingArguments, str(tmp_path), use_cpu=True, report_to=[])


@pytest.mark.parametrize(
    "settings, lengths, said",
    [
        ({"sequence_chunk_size": 512}, Lengths([40, 300], [20, 20]), "sequence_chunk_size: got 512, and the longest row has 300 tokens"),
        (
            {"sequence_chunk_size": 512},
            Lengths([40, 300], [20, 20]),
            "only the logits are saved. For less memory turn activation_checkpointing on.",
        ),
        (
            {"sequence_chunk_size": 1024},
            Lengths([40, 800], [20, 20]),
            "For less memory set it to 200, or turn activation_checkpointing on.",
        ),
        (CHECKPOINTED, Lengths([40, 800], [20, 20]), "and what activation_checkpointing saves. For less memory set it to 200."),
        ({"sequence_chunk_size": 1024, "checkpoint_levels": 2}, Lengths([40, 800], [20, 20]), "and what checkpoint_levels saves."),
        ({"sequence_chunk_size": 64}, Lengths([40, 300], [20, 20]), "Try sequence_chunk_size=300"),
        (ALL, Lengths([40, 300], [4, 5]), "Set select_from=labels"),
        ({"sequence_chunk_size": 512}, Lengths([40, 3000], [20, 20]), None),
        ({"sequence_chunk_size": 512}, Lengths([40, 300], [20, 20], together=4), None),
        ({"sequence_chunk_size": 300}, Lengths([40, 300], [20, 20]), None),
        (CHECKPOINTED, Lengths([40, 300], [20, 20]), None),  # the best there is for rows so short
        (ALL, Lengths([40, 300], [40, 50]), None),
        (ALL | {"select_from": "labels"}, Lengths([40, 300], [4, 5]), None),
        ({}, Lengths([4], [1]), None),
    ],
)
def test_what_is_said(settings, lengths, said, arguments):
    found = list(traps(arguments(**settings), lengths))
    assert len(found) == (said is not None) and all(said in message for message in found)


def test_the_command_says_it_before_it_trains(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "red green blue sun"}] * 4)
    command = [
        "train",
        "--model",
        model,
        "--dataset",
        rows,
        "--use_cpu",
        "--max_steps",
        1,
        "--sequence_chunk_size",
        64,
        "--eval_fraction",
        0,
    ]
    with pytest.warns(UserWarning) as warned:
        assert main([*map(str, command), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]) == 0
    said = [str(warning.message) for warning in warned]
    assert any("got 64, and the longest row has 5 tokens" in message for message in said)
    assert not any("pin_memory" in message for message in said)
    assert "Rows as they are learned" in capsys.readouterr().err
