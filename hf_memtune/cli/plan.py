"""`hf-memtune plan --model M --budget 8GiB [--sequence_length 2048] [flags of train]`: a recipe that fits a memory budget.

    hf-memtune plan --model Llama-3.2-1B --budget 8GiB --sequence_length 2048 --dtype bfloat16 --out fits.yaml

Climbs a ladder of settings, exact ones first, prints what each would need, and writes the first that fits as a recipe for `train`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from hf_memtune.cli import budget, forecast
from hf_memtune.cli.blank import is_without_weights
from hf_memtune.cli.budget import BudgetArguments
from hf_memtune.cli.checks import why_unwritable
from hf_memtune.errors import ConfigError
from hf_memtune.files import write_text
from hf_memtune.settings.protocol import setting

OF_THE_COMMAND = {"memory_budget", "gpu", "allow_approximate", "out", "sequence_length", "config_overrides", "padded", "json"}


@dataclass
class PlanArguments(BudgetArguments):
    """The budget, and where the recipe goes."""

    _argument_group_name = "plan"

    out: str = setting("plan.yaml", "Recipe to write: YAML, for `hf-memtune train`.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.memory_budget is None and self.gpu is None:
            found.append("memory_budget: got nothing, expected bytes, such as --budget 8GiB, or a card, such as --gpu rtx4090.")
        if Path(self.out).suffix not in (".yaml", ".yml"):
            found.append(f"out: got {self.out!r}, expected a name that ends in .yaml.")
        elif (why := self._why_unwritable()) is not None:
            found.append(f"out: got {self.out!r}, and {why}. Name another file.")
        return found

    def _why_unwritable(self) -> str | None:
        path = Path(self.out)
        return f"{self.out!r} is a folder" if path.is_dir() else why_unwritable(path.parent)


def run(arguments: list[str]) -> None:
    """Print the ladder and write the recipe. Raises ConfigError with all problems of the settings, and where nothing fits."""
    plan, given = budget.climb(arguments, make_parser, PlanArguments, stop_at_first=False)
    recipe = write_recipe(plan, given)
    if given.what.json:
        print(json.dumps(plan.to_dict() | {"recipe": str(recipe)}))
        return
    budget.show(plan)
    missing = (" --model M", is_without_weights(given.model.model_name_or_path)), (" --dataset D", not given.data.dataset_name)
    print(f"wrote {recipe}: hf-memtune train {recipe}" + "".join(flag for flag, lacks in missing if lacks))


def make_parser():
    """The parser of this command: that of train, with the budget before it."""
    return forecast.make_parser("plan", PlanArguments)


def write_recipe(plan, given) -> Path:
    """The settings that were given, with the changes of the chosen rung, as YAML. A model of which there are sizes alone is not in it."""
    import yaml

    from hf_memtune.levers.facts import checkpoint_names

    values = {name: value for name, value in given.given.items() if name not in OF_THE_COMMAND}
    if is_without_weights(given.model.model_name_or_path):
        values.pop("model_name_or_path", None)
    changes, names = plan.chosen.rung.changes, {*checkpoint_names(given.training)}
    if names & changes.keys():  # of one setting: what was given under its other name would go over the change
        values = {name: value for name, value in values.items() if name not in names}
    values |= {"max_length": max(2, given.tokens)} | changes
    said = f"# Predicted peak of tensors: {plan.chosen.estimate.peak_bytes} bytes, of a budget of {plan.budget_bytes}.\n"
    path = Path(given.more.out)
    try:
        write_text(path, said + yaml.safe_dump({name: _plain(value) for name, value in values.items()}, sort_keys=True))
    except OSError as error:
        raise ConfigError([f"out: {path} cannot be written: {error}"]) from error
    return path


def _plain(value):
    """Enumerations of transformers as their text."""
    return getattr(value, "value", value)
