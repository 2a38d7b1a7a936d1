"""Callbacks of what changes the layers of a model: reversible layers with adapters, and two-level checkpointing."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from hf_memtune.architectures.stacks import unwrapped
from hf_memtune.errors import ConfigError, InverseError, MemTuneError
from hf_memtune.levers.table import CHECKPOINT_LEVELS, REVERSIBLE
from hf_memtune.methods.reversible.handle import ReversibleHandle, make_reversible
from hf_memtune.methods.reversible.start import StartReport
from hf_memtune.methods.two_level import TwoLevelHandle, checkpoint_in_two_levels
from hf_memtune.settings.reversible import ReversibleConfig
from hf_memtune.training.launch import problems_of
from hf_memtune.training.restorable import Restorable
from hf_memtune.training.rng import preserved_rng

logger = logging.getLogger(__name__)


class ReversibleCallback(TrainerCallback, Restorable):
    """Makes the layers of a model reversible, and measures on the first batch whether the inverse holds.

    The layers change when the Trainer is made, not when training begins: by then the optimizer has been given its parameters, and
    the model may have been wrapped and loaded from a checkpoint, all of which need the adapters. They stay when training ends, as
    without them the model is not what was trained: `remove` takes them out. Under a plain Trainer, give this callback as one of
    `callbacks`; that Trainer then saves adapters and model in one, and nothing is verified unless `verify` is called.

    handle: what is installed, or None. report: what was found on the first batch, or None. require_exact: as the argument
    reversible_require_exact. handle, given: layers that are reversible already, such as load_reversible returns.
    """

    def __init__(self, config: ReversibleConfig | None = None, require_exact: bool = True, handle: ReversibleHandle | None = None):
        if config is None and handle is None:
            raise ConfigError(
                ["config: got none, expected a ReversibleConfig, or the handle of layers that are reversible already (handle=...)."]
            )
        self.config = config if handle is None else handle.config
        self.require_exact, self.handle = require_exact, handle
        self.report: StartReport | None = None
        self._was_removed = False

    def on_init_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        found = problems_of(args, REVERSIBLE)
        if optimizer is not None and self._is_passed_over(optimizer):
            found.append(
                "optimizers: got one that was made before the reversible layers, whose adapters it does not have: they would stay as they are. Let "
                "the trainer make it (optim=...); or call handle = make_reversible(model, config) first, make the optimizer of the parameters that "
                "then require grad, and give the trainer ReversibleCallback(handle=handle)."
            )
        if getattr(args, "precompute_ref_log_probs", False):
            found.append(
                "precompute_ref_log_probs: got True with reversible layers. trl keeps what the reference says under a hash of the weights, and "
                "the same weights say something else in reversible layers: this run might read what the plain model said, and leave a later "
                "run what this one says. Set precompute_ref_log_probs=False."
            )
        if found:
            raise ConfigError(found)
        if self.handle is None:
            self.handle = make_reversible(model, self.config)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.handle is None and self._was_removed:
            raise MemTuneError("the reversible layers were taken out of this model, so there is nothing to train: make a new trainer.")
        if self.handle is None:
            raise MemTuneError(
                "ReversibleCallback was added to a trainer that was made before, and the layers change when a trainer is made. Give it to the "
                "trainer itself: callbacks=[ReversibleCallback(config)]."
            )
        if unwrapped(model) is not unwrapped(self.handle.model):
            raise ConfigError(
                [
                    "ReversibleCallback: the layers it made reversible are those of another model, and this one would be trained without them, whole. "
                    "Where model_init, a function, made this one: Pass a model to the trainer in its place. Where the callback is that of another "
                    "trainer: give each trainer a callback of its own."
                ]
            )

    def _is_passed_over(self, optimizer: Any) -> bool:
        """Whether an optimizer does not step something that the layers train."""
        if self.handle is None:
            return bool(self.config.filled().adapter_rank)
        stepped = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
        return any(value.data_ptr() not in stepped for value in self.handle.trained.values())

    def verify(self, inputs: dict[str, Any], device) -> StartReport:
        """Measure on one batch of inputs. Raises InverseError where the inverse should be exact and is not."""
        with preserved_rng(device):
            self.report = self.handle.verify(inputs)
        logger.info("reversible=%s, first batch: %s", self.config.reversible, self.report)
        if self.config.reversible_numerics == "exact" and not self.report.is_exact:
            self._complain(self.report.inverse_error)
        return self.report

    def _complain(self, error: float) -> None:
        message = (
            f"reversible={self.config.reversible}: on the first batch, the rebuilt input of the first layer is off by {error:.1e} of its "
            "size, expected 0: a layer computed something else when it ran again in backward, so gradients would be wrong. Look for a "
            "kernel that does not repeat itself (torch.use_deterministic_algorithms(True), attn_implementation=eager) or a layer that "
            "draws random numbers of its own."
        )
        if self.require_exact:
            raise InverseError(f"{message} reversible_require_exact=False trains nevertheless.")
        logger.warning(message)

    def keep(self) -> Callable[[], None]:
        """How near to overflow the streams came."""
        bits = [] if self.handle is None else [(shared, shared.headroom_bits) for shared in self.handle.shared]

        def restore() -> None:
            for shared, number in bits:
                shared.headroom_bits = number

        return restore

    def remove(self) -> None:
        """Take the layers and their adapters out of the model. May be called twice."""
        if self.handle is not None:
            self.handle.restore()
        self.handle, self._was_removed = None, True


class CheckpointCallback(TrainerCallback):
    """Checkpoints the layers on two levels from the start of training to its end. `handle` is what is installed, or None."""

    def __init__(self):
        self.handle: TwoLevelHandle | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.remove()  # training begins again where a batch size that did not fit was halved
        if found := problems_of(args, CHECKPOINT_LEVELS):
            raise ConfigError(found)
        self.handle = checkpoint_in_two_levels(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While open, the layers are the model's own: a copy of the model would have checkpoints of the model itself."""
        model = None if self.handle is None else self.handle.model
        self.remove()
        try:
            yield
        finally:
            self.handle = None if model is None else checkpoint_in_two_levels(model)

    def remove(self) -> None:
        """Take the checkpointing off the model. May be called twice."""
        if self.handle is not None:
            self.handle.restore()
        self.handle = None


def model_inputs_alone(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of a batch, what the forward of a transformers model names: a trainer of one's own may take out the rest itself."""
    names = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in batch.items() if name in names}
