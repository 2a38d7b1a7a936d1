"""Settings of the preflight and of the memory report, as flat fields of training arguments."""

import os
from dataclasses import dataclass

from hf_memtune.levers.facts import optimizer_name, steps_in_backward
from hf_memtune.settings.protocol import setting


@dataclass
class PreflightArguments:
    """A part of MemEfficientArgumentsMixin."""

    memory_preflight: bool | None = setting(
        None,
        "Before step 0, train on the longest batch that the data and the collator can give, and evaluate one, measure the "
        "bytes, and take everything back bit by bit: what does not fit fails in the first minute, with advice. Costs two steps, "
        "and host memory for the trained parameters. Default: on for a GPU, off for a CPU.",
    )

    memory_report: bool | None = setting(
        None,
        "At the end of training write memory_report.html and memory_report.json to output_dir: bytes by phase and category, "
        "predicted and measured, over the step and by tensor, and what each setting saved. Of the preflight where there is one, "
        "else of the second step, which is then slower. Costs some traces without values. Default: on where memory_preflight is on.",
    )

    @property
    def preflights(self) -> bool:
        """Whether the worst batch is tried before step 0."""
        if self.memory_preflight is None:
            return self.device.type in ("cuda", "xpu") and not self.unsupported_by_preflight(is_asked=True)
        return self.memory_preflight

    @property
    def reports(self) -> bool:
        """Whether a memory report is written at the end of training."""
        return self.preflights if self.memory_report is None else self.memory_report

    def unsupported_by_preflight(self, is_asked: bool | None = None) -> list[str]:
        """Where a step cannot be taken back."""
        if not (self.memory_preflight if is_asked is None else is_asked):
            return []
        found = [
            f"memory_preflight: got True with {name}, under which a step cannot be taken back bit by bit. Leave it out."
            for name in ("deepspeed", "fsdp", "parallelism_config")
            if getattr(self, name, None) or _is_launched_with(name)
        ]
        if steps_in_backward(self):
            found.append(
                f"memory_preflight: got True with optim={optimizer_name(self)}, which changes weights in the middle of backward, so that a "
                "step cannot be taken back. Leave one of them out."
            )
        return found


def _is_launched_with(name: str) -> bool:
    """Whether `accelerate launch` was configured for it, of which the arguments know nothing."""
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
