"""Settings of every method keep to one protocol, alone and together in a trainer's arguments."""

import warnings
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import pytest

from hf_memtune import CheckpointConfig, ConfigError, MemEfficientTrainingArguments, ReversibleConfig, StreamingConfig, TokenSeekingConfig
from hf_memtune import settings as settings_package
from hf_memtune.settings.protocol import MethodSettings
from hf_memtune.settings.scorers import ScorerFacts
from hf_memtune.training.arguments import MemEfficientArgumentsMixin

# by class: what is given, what cannot work, and what has no effect beside its defaults
CASES = {
    StreamingConfig: ({"sequence_chunk_size": 8}, {"sequence_chunk_size": 0}, {"kv_offload": True}),
    TokenSeekingConfig: ({"token_seeking": True, "token_ratio": 0.5}, {"token_ratio": 2.0}, {"skip_threshold": 0.5}),
    ReversibleConfig: ({"reversible": "centred", "adapter_rank": 4}, {"adapter_rank": -1}, {"reversible_beta": 0.5}),
    CheckpointConfig: ({"checkpoint_levels": 2}, {"checkpoint_levels": 3}, {}),
}
EVERY = pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)


@pytest.fixture
def arguments(tmp_path):
    return partial(MemEfficientTrainingArguments, str(tmp_path), use_cpu=True, report_to=[])


def test_the_cases_are_all_settings_of_methods():
    parts = [import_module(f"{settings_package.__name__}.{found.name}") for found in iter_modules(settings_package.__path__)]
    found = {each for part in parts for each in vars(part).values() if isinstance(each, type) and is_dataclass(each)}
    made = found - {MethodSettings, ScorerFacts}  # the latter are facts, which nobody sets
    assert made == set(CASES) and all(issubclass(kind, MethodSettings) for kind in made)
    assert all(issubclass(MemEfficientArgumentsMixin, kind) for kind in made)


@EVERY
def test_fields_are_flat_with_default_and_help(kind):
    for each in fields(kind):
        assert each.default is not MISSING and isinstance(each.default, str | int | float | bool | None)
        assert each.metadata["help"].strip().endswith("."), each.name
        assert each.default is None or each.default in each.metadata.get("choices", [each.default])
    assert (kind().problems(), kind().ineffective()) == ([], {})


@EVERY
def test_what_cannot_work_is_refused_alone_and_among_others(kind, arguments):
    (name,) = wrong = CASES[kind][1]
    for make in (kind, arguments):
        with pytest.raises(ConfigError) as raised:
            make(**wrong)
        assert [problem.split(":")[0] for problem in raised.value.problems] == [name]


@EVERY
def test_what_has_no_effect_is_named_alone_and_among_others(kind, arguments):
    idle = CASES[kind][2]
    with pytest.warns(UserWarning, match=f"{next(iter(idle))} has no effect") if idle else nullcontext():
        alone = kind(**idle)
    assert list(alone.ineffective()) == list(idle)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is taken out of settings was told of them
        assert kind.of(alone) == alone
    if idle:
        with pytest.warns(UserWarning, match=f"{next(iter(idle))} has no effect"):
            assert list(arguments(**idle).ineffective()) == list(idle)


@EVERY
def test_they_are_taken_out_of_arguments_and_changed(kind, arguments):
    given = CASES[kind][0]
    assert kind.of(arguments(**given)) == kind(**given) != kind()
    assert kind.of(arguments(), **given) == kind(**given)
    with pytest.raises(ConfigError):
        kind.of(arguments(), **CASES[kind][1])


def test_problems_and_idle_settings_of_all_are_told_at_once(arguments):
    every = {name: value for _, wrong, _ in CASES.values() for name, value in wrong.items()}
    with pytest.raises(ConfigError) as raised:
        arguments(**every)
    assert {problem.split(":")[0] for problem in raised.value.problems} == set(every)
    seeking = {"token_seeking": True, "kv_offload": True, "reversible_beta": 0.5}
    with pytest.warns(UserWarning):
        assert list(arguments(**seeking).ineffective()) == ["kv_offload", "reversible_beta"]


def test_a_class_that_hands_nothing_on_would_be_noticed():
    @dataclass
    class Silent(MethodSettings):
        def problems(self) -> list[str]:
            return []

    @dataclass
    class Both(Silent, CheckpointConfig):
        pass

    assert Both(checkpoint_levels=3).checkpoint_levels == 3  # what the cases above find of none of ours
