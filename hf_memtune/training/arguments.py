"""TrainingArguments with the settings of every strategy as further flat fields."""

import warnings
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_memtune.config import TokenSeekingConfig
from hf_memtune.errors import ConfigError


@dataclass
class MemEfficientArgumentsMixin(TokenSeekingConfig):
    """The fields of hf_memtune, to add to any TrainingArguments: `class Mine(MemEfficientArgumentsMixin, SFTConfig)`.

    Raises ConfigError with every problem at once, before anything is loaded.
    """

    memory_trace_steps: int = field(
        default=50,
        metadata={
            "help": "On a CPU, trace the live bytes of one optimizer step in this many (the second, then every so many); a traced "
            "step is a little slower. 0 traces none. On a GPU the allocator counts every step and this has no effect."
        },
    )

    def __post_init__(self):
        super(TokenSeekingConfig, self).__post_init__()  # TrainingArguments (or SFTConfig) first: it may reject on its own
        found = [*self.problems(), *self._unsupported_with_seeking()]
        if self.memory_trace_steps < 0:
            found.append(f"memory_trace_steps: got {self.memory_trace_steps}, expected 0 or more optimizer steps.")
        if found:
            raise ConfigError(found)
        for message in self.ineffective():
            warnings.warn(message, stacklevel=3)

    def _unsupported_with_seeking(self) -> list[str]:
        """Training arguments under which token seeking has not been shown to be exact."""
        if not self.token_seeking:
            return []
        remedies = {
            "deepspeed": "use plain data parallelism (accelerate launch --multi_gpu)",
            "fsdp": "use plain data parallelism (accelerate launch --multi_gpu)",
            "torch_compile": "leave it out",
            "use_liger_kernel": "leave it out: the head and the loss of the kept tokens are already fused",
            "parallelism_config": "use plain data parallelism (accelerate launch --multi_gpu)",
        }
        return [
            f"{name}: got {getattr(self, name)!r} with token_seeking, which does not support it; {remedy}."
            for name, remedy in remedies.items()
            if getattr(self, name, None)
        ]


@dataclass
class MemEfficientTrainingArguments(MemEfficientArgumentsMixin, TrainingArguments):
    """TrainingArguments of MemEfficientTrainer: every field of transformers, and those of hf_memtune."""
