"""TrainingArguments with the settings of every strategy as further flat fields."""

from dataclasses import dataclass

from transformers import TrainingArguments

from hf_memtune.core.scorers import problems_of_name
from hf_memtune.errors import ConfigError
from hf_memtune.levers.table import refusals_of_arguments
from hf_memtune.settings.protocol import MethodSettings, setting
from hf_memtune.settings.reversible import CheckpointConfig, ReversibleConfig
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.training.care.preflight.arguments import PreflightArguments


@dataclass
class MemEfficientArgumentsMixin(TokenSeekingConfig, ReversibleConfig, PreflightArguments, CheckpointConfig):
    """The fields of hf_memtune, to add to any TrainingArguments: `@dataclass class Mine(MemEfficientArgumentsMixin, SFTConfig)`.

    Raises ConfigError with every problem at once, before anything is loaded.
    """

    memory_trace_steps: int = setting(
        50,
        "On a CPU, trace the live bytes of one optimizer step in this many (the second, then every so many); a traced "
        "step is a little slower. 0 traces none. On a GPU the allocator counts every step and this has no effect.",
    )

    full_loss_rows: int = setting(
        8,
        "Rows of the evaluation set, the first ones, whose loss over all tokens is logged as full_loss at every log of "
        "training with token_seeking, to notice when it rises while the loss of the kept tokens falls. Without an evaluation "
        "set: the rows of the last training batch. Costs a forward pass of these rows at every log. 0 turns it off.",
    )

    reversible_require_exact: bool = setting(
        True,
        "With reversible and reversible_numerics=exact: refuse to train where the inverse, measured on the first batch, is not "
        "exact on this device, bit by bit. False warns in place of it: gradients are then a little wrong.",
    )

    def __post_init__(self):
        self._fill()
        found = [*self.problems(), *self._unknown_scorer(), *refusals_of_arguments(self), *self.unsupported_by_preflight()]
        for name, unit in (("memory_trace_steps", "optimizer steps"), ("full_loss_rows", "rows")):
            if getattr(self, name) < 0:
                found.append(f"{name}: got {getattr(self, name)}, expected 0 or more {unit}.")
        if found:
            raise ConfigError(found)
        super(MethodSettings, self).__post_init__()  # of TrainingArguments, or SFTConfig: it sets up devices and processes
        self._require_device_memory()
        self.warn_of_ineffective(stacklevel=4)

    def ineffective(self) -> dict[str, str]:
        found = {}
        default = MemEfficientArgumentsMixin.full_loss_rows
        if not self.is_mean_of_kept and self.full_loss_rows != default:
            found["full_loss_rows"] = (
                "without token_seeking and token_selection=top, and another token_scorer than true_gradient: the loss is then that of the kept tokens"
            )
        return found | super().ineffective()

    @property
    def is_reversible(self) -> bool:
        """Whether layers are to be made reversible."""
        return self.reversible != "none"

    def _require_device_memory(self) -> None:
        """Which device it is, is known only when the arguments of transformers have set it up."""
        if self.kv_offload and self.streams and self.device.type == "cpu":
            raise ConfigError(
                [
                    "kv_offload: got True, but the device is cpu, whose memory is the host memory to which keys and values would be moved: "
                    "nothing would be saved. Leave it out, or train on a GPU."
                ]
            )

    def _unknown_scorer(self) -> list[str]:
        return problems_of_name(self.token_scorer) if self.token_seeking else []


@dataclass
class MemEfficientTrainingArguments(MemEfficientArgumentsMixin, TrainingArguments):
    """TrainingArguments of MemEfficientTrainer: every field of transformers, and those of hf_memtune."""
