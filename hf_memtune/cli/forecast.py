"""What `estimate`, `plan`, `longest` and a budget of `train` have in common: the flags of `train`, read without a data set, and the model without weights."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

from hf_memtune.cli import parser as training
from hf_memtune.cli.arguments import DataArguments, ModelArguments
from hf_memtune.errors import ConfigError
from hf_memtune.settings.protocol import setting


@dataclass
class ForecastArguments:
    """What is predicted, beside what the settings of training say."""

    _argument_group_name = "prediction"

    sequence_length: int | None = setting(None, "Tokens of the longest row. Larger: more memory. Default: max_length.")
    config_overrides: str | None = setting(
        None,
        "Sizes that go over those of the model's config, as name=value,name=value. With a model type (llama, bert, ...) for "
        "--model no files are needed. Default: none.",
    )
    padded: bool | None = setting(
        None, "Whether rows of a batch differ in length, so that attention needs a mask. Default: if a batch has several."
    )
    json: bool = setting(False, "Print JSON instead of a table.")

    def problems(self) -> list[str]:
        if self.sequence_length is None or self.sequence_length >= 1:
            return []
        return [f"sequence_length: got {self.sequence_length}, expected 1 token or more."]


@dataclass
class AnyData(DataArguments):
    """The data settings of a run that reads no data."""

    def problems(self) -> list[str]:
        return [problem for problem in super().problems() if not problem.startswith("dataset_name:")]


class Forecast(NamedTuple):
    """Settings of a run that is predicted. given: those that were given, as they were given."""

    model: ModelArguments
    data: AnyData
    training: object  # MemEfficientTrainingArguments
    what: ForecastArguments
    more: object | None
    given: dict[str, object]

    @property
    def tokens(self) -> int:
        return self.what.sequence_length or self.data.max_length


def make_parser(command: str, more: type | None = None):
    """The parser of train, with the settings above, and those of `more`, before its own."""
    kinds = (ForecastArguments,) if more is None else (more, ForecastArguments)
    return training.make_parser(command, more=kinds)


def parse(arguments: list[str], parser, more: type | None = None, *, as_given: bool = False) -> Forecast:
    """Settings from a recipe and flags. Raises ConfigError with every problem.

    as_given: nothing else will be tried, so a flag without effect is a problem, and a line of a recipe without effect is warned of.
    """
    from hf_memtune.cli.blank import read_config
    from hf_memtune.cli.lengths import bound_by_positions
    from hf_memtune.cli.settings import build, idle_flags, values_of
    from hf_memtune.training.arguments import MemEfficientTrainingArguments

    namespace = parser.read(arguments, with_recipe=True)
    problems = parser.problems
    kinds = (ModelArguments, AnyData, MemEfficientTrainingArguments, ForecastArguments)
    values = {kind: values_of(kind, namespace) for kind in kinds}
    offloads = values[MemEfficientTrainingArguments].pop("kv_offload", False)  # refused on a CPU, which need not be where training will run
    built = [build(kind, values[kind], problems) for kind in kinds]
    idle, ineffective = idle_flags(built[:3] if as_given else (), parser)
    problems += idle
    if offloads and built[2] is not None:
        problems += [] if built[2].streams else ["kv_offload: has no effect without sequence_chunk_size. Leave it out."]
        built[2].kv_offload = True
    extra = None if more is None else build(more, values_of(more, namespace), problems)
    if problems:
        raise ConfigError(problems)
    for message in ineffective:
        warnings.warn(message, stacklevel=2)
    model, data, _, what = built
    bound_by_positions(data, parser.given, lambda: read_config(model.model_name_or_path, what.config_overrides))
    return Forecast(*built, extra, {name: getattr(namespace, name) for name in parser.given})


def run_of(forecast: Forecast):
    """The run that is predicted, as the levers see it."""
    from hf_memtune.levers.facts import Run

    model, args = forecast.model, forecast.training
    rows = args.per_device_train_batch_size
    return Run(args, rows, forecast.tokens, model.lora_r, model.load_in_4bit, changes_model=model.reversible_adapters is None)


class Blanks:
    """Models without weights, for predictions one after the other: of two with the same settings of model and data it is made once."""

    def __init__(self):
        self._settings, self._made = None, None

    def of(self, forecast: Forecast):
        from hf_memtune.cli.blank import blank_trainable

        settings = repr((forecast.model, forecast.data, forecast.what.config_overrides))
        if settings != self._settings:
            made = blank_trainable(forecast.model, forecast.data, forecast.what.config_overrides)
            self._settings, self._made = settings, made
        return self._made


def least(forecast: Forecast, blanks: Blanks | None = None) -> int:
    """Bytes that are there in any case: of weights, and of the gradients of what is trained. Takes no trace."""
    from hf_memtune.forecast.estimate import trained_bytes
    from hf_memtune.levers.facts import steps_in_backward

    made = (blanks or Blanks()).of(forecast)
    trained = 0 if steps_in_backward(forecast.training) else trained_bytes(made, forecast.training)
    return sum(parameter.untyped_storage().nbytes() for parameter in made.parameters()) + trained


def predict(forecast: Forecast, tokens: int | None = None, rows: int | None = None, blanks: Blanks | None = None):
    """The estimate of what `train` would do with the settings, evaluation of held-out rows included, or with other rows of other lengths.

    Raises ConfigError and UnsupportedModelError.
    """
    import copy

    from hf_memtune.cli.lengths import check_length
    from hf_memtune.forecast.estimate import estimate

    tokens, args = forecast.tokens if tokens is None else tokens, copy.copy(forecast.training)
    args.per_device_eval_batch_size = training.rows_of_evaluation(args, forecast.given, rows)
    if forecast.model.reversible_adapters is not None:
        got = forecast.model.reversible_adapters
        raise ConfigError(
            [f"reversible_adapters: got {got!r}; adapters of a folder are not predicted. Give the settings they were trained with."]
        )
    made = (blanks or Blanks()).of(forecast)
    check_length(made, tokens, "max_length" if forecast.what.sequence_length is None else "sequence_length")
    padded = forecast.what.padded
    if forecast.data.packing:  # all rows of a batch are one, whose parts do not see one another
        rows = args.per_device_train_batch_size if rows is None else rows
        args.per_device_eval_batch_size = -(-args.per_device_eval_batch_size // rows)
        rows, tokens, padded = 1, rows * tokens, True
    return estimate(made, args, rows, tokens, padded, evaluation=forecast.data.holds_out or None)
