"""Token seeking on reversible layers under the trainer."""

import logging
import warnings

import pytest

from hf_memtune import ConfigError, MemEfficientTrainer, ReversibleConfig, make_reversible
from tests.support.reversible_runs import ADAPTERS, CENTRED, ROWS, TwinTrainer, deep, quiet, reversible  # noqa: F401  a fixture for all
from tests.support.runs import SEEKING, arguments, same_parameters, train, trainer_for


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


@pytest.mark.parametrize("scorer", ["gradient", "combined"])
def test_loaded_layers_stay_as_they_were_trained(tmp_path, scorer):
    """Where all are reversible, no score can run the last one alone; where it is an ordinary one, it can."""
    handle = make_reversible(model := deep(), ReversibleConfig(reversible="centred", **ADAPTERS))
    settings = SEEKING | {"token_scorer": scorer}
    with pytest.raises(ConfigError, match=f"token_scorer: got {scorer} with adapters that were trained with every layer reversible"):
        trainer_for(model, arguments(tmp_path, **settings), ROWS, reversible=handle)
    handle.restore()
    partly = make_reversible(model := deep(), ReversibleConfig(reversible="centred", reversible_layers=3, **ADAPTERS))
    assert len(train(model, arguments(tmp_path, **settings), ROWS, reversible=partly).losses) == 2
    every = make_reversible(model := deep(), ReversibleConfig(reversible="centred", **ADAPTERS))
    assert len(train(model, arguments(tmp_path, **settings | {"token_scorer": "context"}), ROWS, reversible=every).losses) == 2
