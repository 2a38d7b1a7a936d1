"""What a trainer does of layers that are changed: puts them in, verifies, saves and loads. The steps themselves are plain."""

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME

from hf_memtune._compat import forbid_4bit_repacking
from hf_memtune.architectures.stacks import layer_stacks, unwrapped
from hf_memtune.core.scorers import TokenScorer
from hf_memtune.errors import ConfigError, MemTuneError
from hf_memtune.files import whole
from hf_memtune.levers.table import CHECKPOINT_LEVELS, REVERSIBLE, lever_of
from hf_memtune.methods.reversible.handle import ReversibleHandle
from hf_memtune.methods.seeking.method import resolve_scorer
from hf_memtune.settings.protocol import no_effect
from hf_memtune.settings.reversible import ReversibleConfig
from hf_memtune.settings.seeking import TokenSeekingConfig
from hf_memtune.training.launch import problems_of, problems_of_devices, problems_of_launch
from hf_memtune.training.reversible.callbacks import CheckpointCallback, ReversibleCallback, model_inputs_alone
from hf_memtune.training.reversible.files import is_saved_reversible, load_into, save_reversible

logger = logging.getLogger(__name__)


class ReversibleMixin:
    """Reversible layers and two-level checkpointing in a Trainer; a part of MemEfficientMixin.

    reversible_callback, checkpoint_callback: what is on, or None.
    """

    reversible_callback: ReversibleCallback | None = None
    checkpoint_callback: CheckpointCallback | None = None

    # -- for users

    @property
    def reversible(self) -> ReversibleHandle | None:
        """The reversible layers of the model, as long as they are in it."""
        return None if self.reversible_callback is None else self.reversible_callback.handle

    def restore_model(self) -> None:
        """Take reversible layers and adapters out: the model is as it was before. May be called twice; save before."""
        if self.reversible_callback is not None:
            self.reversible_callback.remove()

    # -- putting in

    def _problems_of_layers(self, handle: ReversibleHandle | None) -> list[str]:
        """What only a Trainer can see of them."""
        found = []
        if handle is not None and self.args.is_reversible:
            found.append(f"reversible: got a handle and args.reversible={self.args.reversible!r}. Leave the argument out.")
        if handle is not None and unwrapped(handle.model) is not unwrapped(self.model):
            found.append("reversible: got the handle of another model, expected that of the trainer's.")
        if handle is None and not (self.args.is_reversible or self.args.checkpoint_levels):
            return found
        if self.args.is_reversible and self.model_init is not None:
            found.append("model_init: got a function with reversible: it makes models whose layers are not. Pass a model.")
        if self.args.is_reversible and self.optimizer is not None:
            found.append("optimizers: got one that was made before the adapters. Set optim, or override create_optimizer.")
        if self._is_launch_refused:
            return found
        lever = CHECKPOINT_LEVELS if self.args.checkpoint_levels else REVERSIBLE
        is_given = handle is not None and not self.args.is_reversible  # the arguments, which do not know of it, have not refused any
        problems = problems_of if is_given else problems_of_devices
        return found + [*problems(self.args, lever), *problems_of_launch(self, lever)]

    @property
    def _is_launch_refused(self) -> bool:
        """By token seeking or streaming, which has named its problems already."""
        lever = self.args.switch and lever_of(self.args.switch)
        return bool(lever and (problems_of_devices(self.args, lever) or problems_of_launch(self, lever)))

    def _prepare_layers(self, scorer: TokenScorer | None, handle: ReversibleHandle | None) -> None:
        self._layer_settings, self._is_verified = self._layer_arguments(), False
        self._warn_of_exactness(handle)
        if self.args.checkpoint_levels:
            self.checkpoint_callback = CheckpointCallback()
            self.add_callback(self.checkpoint_callback)
        if handle is None and not self.args.is_reversible:
            return
        if handle is not None and scorer is None and self._scores_need_the_last_block(scorer):
            self._require_ordinary_last_block(handle)
        forbid_4bit_repacking(self.model)
        config = None if handle is not None else self._reversible_config(scorer)
        self.reversible_callback = ReversibleCallback(config, self.args.reversible_require_exact, handle)
        self.reversible_callback.on_init_end(self.args, self.state, self.control, model=self.model, optimizer=self.optimizer)
        self.add_callback(self.reversible_callback)

    def _warn_of_exactness(self, handle: ReversibleHandle | None) -> None:
        """Not among the arguments, which do not know of layers that are reversible already."""
        settings = self.args if handle is None else handle.config
        is_exact = settings.reversible != "none" and settings.reversible_numerics == "exact"
        if not self.args.reversible_require_exact and not is_exact:
            reason = "without reversible layers of reversible_numerics=exact"
            warnings.warn(no_effect("reversible_require_exact", reason), stacklevel=2)

    def _reversible_config(self, scorer: TokenScorer | None) -> ReversibleConfig:
        """As the arguments say; where tokens are scored through the last block, that one stays an ordinary layer."""
        config = ReversibleConfig.of(self.args)
        if not self._scores_need_the_last_block(scorer):
            return config
        most = min(len(stack.layers) for stack in layer_stacks(self.model)) - 1
        self._require_last_block(config, most)
        if config.reversible_layers is not None:
            return config
        logger.warning(
            "reversible_layers=%d, all but the last layer: the scores of token_seeking run that one alone, so it is an ordinary one. "
            "token_scorer=random or context lets all layers be reversible.",
            most,
        )
        return ReversibleConfig.of(self.args, reversible_layers=most)

    def _require_last_block(self, config: ReversibleConfig, most: int) -> None:
        if 2 <= (config.reversible_layers or 2) <= most:
            return
        got = f"{config.reversible_layers or 'nothing'} with token_scorer={self.args.token_scorer}"
        expected = f"2 to {most}" if most >= 2 else "none, for there are too few"
        raise ConfigError(
            [
                f"reversible_layers: got {got}, which runs the last block alone, so that it has to be an ordinary layer; expected {expected}. "
                "Or choose token_scorer=random or context."
            ]
        )

    def _require_ordinary_last_block(self, handle: ReversibleHandle) -> None:
        """Of layers that are reversible already, and have to stay as they were trained."""
        if all(len(shared.names) < len(stack.layers) for stack, shared in zip(handle.stacks, handle.shared)):
            return
        raise ConfigError(
            [
                f"token_scorer: got {self.args.token_scorer} with adapters that were trained with every layer reversible, expected random or "
                "context: other scores run the last block alone, so that it would have to be an ordinary layer. Or train adapters anew with "
                "reversible_layers one below the number of layers."
            ]
        )

    def _scores_need_the_last_block(self, scorer: TokenScorer | None) -> bool:
        """What a function of the user's reads of the model is not known before it runs."""
        if not self.args.token_seeking:
            return False
        return scorer is not None or resolve_scorer(TokenSeekingConfig.of(self.args), None).facts.runs_last_block

    def _layer_arguments(self) -> tuple:
        return ReversibleConfig.of(self.args), self.args.checkpoint_levels

    # -- in training

    def _require_same_layers(self) -> None:
        if (wanted := self._layer_arguments()) != self._layer_settings:
            raise ConfigError([f"args: got {wanted}, changed since the trainer was made with {self._layer_settings}. Make a new trainer."])
        self._is_verified = False

    def _verify_layers(self, batches: list[dict[str, Any]]) -> None:
        """Once a training, on its first batch."""
        if self.reversible is None or self._is_verified or not batches:
            return
        self.model.train()
        batch = model_inputs_alone(unwrapped(self.model), self._prepare_inputs(batches[0]))
        with nullcontext() if self.method is None else self.method.aside(), self.compute_loss_context_manager():
            self.reversible_callback.verify(batch, self.args.device)
        self._is_verified = True

    def _log_headroom(self, logs: dict[str, float]) -> None:
        if self.reversible is not None and (bits := self.reversible.headroom_bits) is not None:
            logs["reversible_headroom_bits"] = bits

    def _remove_checkpointing(self) -> None:
        if self.checkpoint_callback is not None:
            self.checkpoint_callback.remove()

    # -- saving and loading

    @property
    def _trains_adapters(self) -> bool:
        return self.reversible is not None and bool(self.reversible.config.adapter_rank)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapters and head in place of the model; what a PEFT wrapper trains, beside them, and all where there are no adapters."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.reversible is None or not self._trains_adapters or not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            self._save_beside(folder)
        if self.reversible is not None and self.args.should_save:
            save_reversible(self.reversible, folder)

    def _save_beside(self, folder: Path) -> None:
        """What Trainer saves with a model."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        with whole(folder / TRAINING_ARGS_NAME) as partial:
            torch.save(self.args, partial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._require_kind(resume_from_checkpoint)
        if not self._trains_adapters or not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.reversible is not None:
            load_into(self.reversible, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._trains_adapters or not isinstance(self.model, PreTrainedModel):
            super()._load_best_model()
        if self.reversible is not None:
            load_into(self.reversible, self.state.best_model_checkpoint)

    def _require_kind(self, folder: str) -> None:
        """A plain checkpoint has no adapters, and one of reversible layers no model."""
        if (saved := is_saved_reversible(folder)) != (self.reversible is not None):
            kinds = {True: "of reversible layers", False: "without reversible layers"}
            raise MemTuneError(
                f"{folder}: got a checkpoint {kinds[saved]}, expected one {kinds[not saved]}. Set reversible as it was in that run."
            )
