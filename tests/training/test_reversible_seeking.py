"""Token seeking on reversible layers under the trainer."""

import logging
import warnings

import pytest

from hf_memtune import (
    ConfigError,
    MemEfficientTrainer,
)
from tests.training.reversible_runs import CENTRED, ROWS, TwinTrainer, deep, quiet, reversible  # noqa: F401  a fixture for all
from tests.training.runs import SEEKING, arguments, same_parameters, train, trainer_for


@pytest.mark.parametrize("scorer, layers", [("random", None), ("context", None), ("gradient", 3), ("combined", 3)])
def test_token_seeking_on_reversible_layers(tmp_path, scorer, layers, caplog):
    settings = CENTRED | SEEKING | {"token_scorer": scorer}
    if scorer == "random":
        settings["context_normalize"] = "sum"
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.filterwarnings("ignore", message="context_normalize has no effect")
        ours, theirs = (train(deep(), arguments(tmp_path, **settings), ROWS, cls=cls) for cls in (MemEfficientTrainer, TwinTrainer))
    assert ours.trainer.reversible.config.reversible_layers == layers
    assert ("reversible_layers=3" in caplog.text) == (layers == 3)
    assert ours.losses == theirs.losses and same_parameters(ours, theirs)
    assert ours.trainer.last_selection is not None
    assert not same_parameters(ours, train(deep(), reversible(tmp_path), ROWS))


@pytest.mark.parametrize("layers, given, expected", [(2, None, "too few"), (4, 4, "expected 2 to 3")])
def test_such_scores_need_an_ordinary_last_layer(tmp_path, layers, given, expected):
    settings = CENTRED | SEEKING | {"reversible_layers": given}
    with pytest.raises(ConfigError, match=f"runs the last block alone.*{expected}"):
        trainer_for(deep(num_hidden_layers=layers), arguments(tmp_path, **settings), ROWS)
    trainer_for(deep(num_hidden_layers=4), arguments(tmp_path, **settings | {"reversible_layers": 3}), ROWS)
