"""Settings of reversible layers: what fills them, what cannot work, what has no effect."""

from dataclasses import dataclass, fields

import pytest

from hf_memtune import CheckpointConfig, ConfigError, ReversibleConfig, TokenSeekingConfig


def test_every_setting_has_help():
    assert all(f.metadata["help"].strip().endswith(".") for f in fields(ReversibleConfig))


@pytest.mark.parametrize(
    "coupling, numerics, scale, beta",
    [
        ("centred", "exact", 1 / 16, None), ("centred", "float", 1 / 16, None),
        ("meft1", "exact", 1 / 8, 1), ("meft1", "float", 0.1, 1),
        ("meft2", "exact", 1, 1 / 8), ("meft2", "float", 1, 0.1),
        ("meft3", "exact", 1 / 8, 1 / 8), ("meft3", "float", 0.1, 0.1),
    ],
)  # fmt: skip
def test_a_coupling_fills_the_factors_of_its_paper(coupling, numerics, scale, beta):
    filled = ReversibleConfig(reversible=coupling, reversible_numerics=numerics).filled()
    assert (filled.reversible_scale, filled.reversible_beta, filled.adapter_rank) == (scale, beta, 8)


def test_any_field_overrides_the_coupling():
    filled = ReversibleConfig(reversible="meft1", reversible_scale=0.25, adapter_rank=64).filled()
    assert (filled.reversible_scale, filled.reversible_beta, filled.adapter_rank) == (0.25, 1, 64)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"reversible": "meft4"}, "reversible"),
        ({"reversible_numerics": "double"}, "reversible_numerics"),
        ({"reversible_output": "older"}, "reversible_output"),
        ({"adapter_activation": "sin"}, "adapter_activation"),
        ({"reversible_scale": 0.0}, "reversible_scale"),
        ({"reversible_beta": 1.5}, "reversible_beta"),
        ({"reversible_layers": 1}, "reversible_layers"),
        ({"reversible_fraction_bits": 31}, "reversible_fraction_bits"),
        ({"adapter_rank": -1}, "adapter_rank"),
        ({"adapter_dropout": 1.0}, "adapter_dropout"),
        ({"adapter_init_std": -0.1}, "adapter_init_std"),
        ({"reversible": "meft1", "reversible_scale": 0.1}, "power of two"),
        ({"reversible": "meft3", "reversible_beta": 0.1}, "power of two"),
        ({"reversible": "centred", "reversible_scale": 1.0}, "would not move"),
        ({"reversible": "meft2", "adapter_rank": 0}, "updated by adapters"),
    ],
)
def test_what_cannot_work_is_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        ReversibleConfig(**settings)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as raised:
        ReversibleConfig(reversible="meft4", adapter_rank=-1, adapter_dropout=2)
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    "settings, idle",
    [
        ({"adapter_rank": 4}, ["adapter_rank"]),
        ({"reversible": "centred", "reversible_beta": 0.5}, ["reversible_beta"]),
        ({"reversible": "centred", "reversible_numerics": "float", "reversible_fraction_bits": 12}, ["reversible_fraction_bits"]),
        ({"reversible": "centred", "adapter_rank": 0, "train_head": True}, ["train_head"]),
        ({"reversible": "meft1", "reversible_beta": 0.5, "adapter_rank": 4}, []),
    ],
)
def test_what_has_no_effect_is_named(settings, idle):
    assert list(ReversibleConfig(**settings).ineffective()) == idle


def test_arguments_can_have_these_fields_beside_others():
    @dataclass
    class Both(TokenSeekingConfig, ReversibleConfig):
        pass

    both = Both(token_seeking=True, reversible="meft1", adapter_rank=4)
    assert ReversibleConfig.of(both) == ReversibleConfig(reversible="meft1", adapter_rank=4)
    assert Both(reversible_scale=0.3).problems() == []
    with pytest.raises(ConfigError, match="reversible_scale"):
        Both(reversible="meft1", reversible_scale=0.3)


def test_checkpointing_has_two_levels_or_none():
    assert CheckpointConfig().checkpoint_levels is None and CheckpointConfig(checkpoint_levels=2).checkpoint_levels == 2
    with pytest.raises(ConfigError, match="expected 2"):
        CheckpointConfig(checkpoint_levels=3)
    assert CheckpointConfig(checkpoint_levels=2).problems() == []
