"""Scores of a whole data set, taken in one pass before training (the paper's offline seeking) or before an epoch.

A row is known by its content, a digest of its real tokens and their labels, so that shuffling, padding and processes do not
matter and a changed row is never given the scores of another. A file is known by the model's weights and the settings that
decide a score; rows that a file lacks are scored and added.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_memtune.core.loss import IGNORED
from hf_memtune.errors import StaleCacheError
from hf_memtune.files import locked, whole
from hf_memtune.methods.overrides import instance_attribute
from hf_memtune.methods.seeking.method import TokenSeeking
from hf_memtune.methods.seeking.targets import LABEL_NAMES
from hf_memtune.settings.scorers import BUILT_IN
from hf_memtune.training.fingerprint import model_fingerprint
from hf_memtune.training.rng import preserved_rng

logger = logging.getLogger(__name__)

_SETTINGS = (
    "token_scorer", "context_weight", "gradient_weight", "context_layer", "context_normalize", "gradient_norm",
)  # fmt: skip


class OfflineScores:
    """Scores by row digest, in memory and in a file.

    The file of a built-in scorer is known by model and settings and is used again by later runs. The scores of a user's own
    function cannot be told apart by its name: their file serves a resumed run alone, and so do the scores of one epoch.
    """

    def __init__(self, seeking: TokenSeeking, trainer):
        self.seeking, self.trainer = seeking, trainer
        self.stacks = tuple(seeking.architecture.stacks)
        self.rows: dict[str, dict[str, Tensor]] = {}
        self.file: Path | None = None

    def load_or_score(self) -> None:
        """Read what the file of this model and these settings has, and score what it lacks."""
        config = self.seeking.config
        if self.seeking.scorer.name not in BUILT_IN or config.token_scorer != self.seeking.scorer.name:
            self.score_into(Path(self.trainer.args.output_dir) / "seek-scores.safetensors")
            return
        file = self._folder() / f"seek-{self._fingerprint()}.safetensors"
        found = self._read_if_usable(file)
        if all(gather_object([found is not None])):
            self.rows = found
        self.score_into(file)

    def score_into(self, file: Path) -> None:
        """Score the training rows that are not known yet and keep everything in `file`."""
        self.file = file
        if self.score() and self.trainer.is_world_process_zero():
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file):  # another run may have added rows of its own meanwhile
                self.rows = (self._read_if_usable(file) or {}) | self.rows
                _write(file, self.rows, self.stacks, self._description())
        self.trainer.accelerator.wait_for_everyone()

    def resume(self, file: Path) -> None:
        """Read the scores that the run to resume was trained with. Raises StaleCacheError when they are gone."""
        if not self._everyone_has(file):
            raise StaleCacheError(
                f"the run to resume took its token scores from {file}, which is gone. Scores made now would be those of a model that "
                "is already trained. Restore the file, or start over, or use seek_schedule=step."
            )
        self.rows, self.file = _read(file, self.stacks), file

    def _read_if_usable(self, file: Path) -> dict[str, dict[str, Tensor]] | None:
        """The rows of a file; None where it is missing or broken, which only costs another pass: nothing was trained with them yet."""
        if not file.exists():
            return None
        try:
            return _read(file, self.stacks)
        except StaleCacheError as error:
            logger.warning("%s The data is scored again.", error)
            return None

    def _everyone_has(self, file: Path) -> bool:
        # processes on different disks must agree, or they would wait for each other in different places
        return all(gather_object([file.exists()]))

    def score(self) -> int:
        """One pass over the training rows, scoring those that are not known yet. Returns how many were new."""
        known, found = set(self.rows), {}
        hidden = self.trainer.args.disable_tqdm or not self.trainer.is_local_process_zero()
        with preserved_rng(self.trainer.args.device, self.trainer.data_collator, self.trainer.train_dataset):
            for batch in tqdm(self._loader(), desc="Seeking tokens", unit="batch", disable=hidden):
                keys = list(row_digests(batch, pairs=len(self.stacks) > 1))
                if not known.issuperset(keys):
                    found |= zip(keys, self._scores_of(self.trainer._prepare_inputs(batch)))
        found = {key: value for part in gather_object([found]) for key, value in part.items()}
        new = sum(key not in known for key in found)
        self.rows = found | self.rows  # a known row may share a batch with a new one: it keeps its scores
        return new

    def _loader(self):
        """All rows of the training set, in the batches of evaluation: no gradient, so they may be larger."""
        with instance_attribute(self.trainer.args, "dataloader_drop_last", False):  # training would meet the dropped rows
            return self.trainer.get_test_dataloader(self.trainer.train_dataset)

    def _scores_of(self, batch: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
        """For each row the scores of its real tokens, by stack, on the CPU."""
        with self.trainer.accelerator.autocast():  # inspection goes past the wrapper that autocasts in training
            values = self.seeking.inspect(batch).values
        real = {stack: self._real(stack, batch) for stack in self.stacks}
        for row in range(len(batch["input_ids"])):
            yield {stack: values[stack][row][real[stack][row]].float().cpu() for stack in self.stacks}

    def lookup(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scores of a batch, by stack, (B, T) float32 each; padding scores 0. Raises StaleCacheError for an unknown row."""
        if not any(batch.get(name) is not None for name in LABEL_NAMES) and self.rows:
            raise StaleCacheError(
                f"the model is called without labels (with {', '.join(batch)}), by which rows are known that were scored before training: the trainer "
                "has taken them away. Use MemEfficientTrainer or MemEfficientMixin, which look before it does, or seek_schedule=step."
            )
        keys = list(row_digests(batch, pairs=len(self.stacks) > 1))
        missing = [number for number, key in enumerate(keys) if key not in self.rows]
        if missing:
            raise StaleCacheError(
                f"rows {missing} of the batch are not among the {len(self.rows)} that were scored before training: they changed "
                "since, or the data collator makes them anew each time (random masking, augmentation, rows packed into one). Use seek_schedule=step."
            )
        return {stack: self._padded(stack, batch, [self.rows[key][stack] for key in keys]) for stack in self.stacks}

    def _padded(self, stack: str, batch: dict[str, Any], rows: list[Tensor]) -> Tensor:
        real = self._real(stack, batch)
        scores = torch.zeros(real.shape, device=real.device)
        scores[real] = torch.cat(rows).to(real.device)
        return scores

    def _real(self, stack: str, batch: dict[str, Any]) -> Tensor:
        """(B, T) bool: the tokens of a stack that are not padding."""
        if stack == "encoder" or len(self.stacks) == 1:
            return _real_tokens(batch)
        mask = batch.get("decoder_attention_mask")
        # without a mask the padding of a decoder shows in its labels alone
        return batch["labels"] != IGNORED if mask is None else mask.bool()

    def _description(self) -> dict[str, Any]:
        return {name: getattr(self.seeking.config, name) for name in _SETTINGS}

    def _fingerprint(self) -> str:
        described = json.dumps(self._description(), sort_keys=True)
        models = [self.trainer.model, *([] if (reference := self.seeking.reference_model) is None else [reference])]
        return hashlib.blake2b(" ".join([described, *map(model_fingerprint, models)]).encode(), digest_size=12).hexdigest()

    def _folder(self) -> Path:
        """Where the user said, else beside the data set if that can be written to, else the output folder."""
        files = getattr(self.trainer.train_dataset, "cache_files", None)
        beside = Path(files[0]["filename"]).parent if files else None
        if self.seeking.config.seek_cache_dir is not None:
            return Path(self.seeking.config.seek_cache_dir)
        return beside if beside is not None and os.access(beside, os.W_OK) else Path(self.trainer.args.output_dir)


def _real_tokens(batch: dict[str, Any]) -> Tensor:
    """(B, T) bool, from the attention mask."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def row_digests(batch: dict[str, Any], pairs: bool = False) -> Iterator[str]:
    """One digest for each row, over its real tokens and their labels, without padding. pairs: labels are rows of their own."""
    ids, real = batch["input_ids"].cpu(), _real_tokens(batch).cpu()
    labels = {k: batch[k].cpu() for k in ("labels", "start_positions", "end_positions") if batch.get(k) is not None}
    for row in range(ids.shape[0]):
        digest = hashlib.blake2b(ids[row][real[row]].numpy().tobytes(), digest_size=16)
        for name, values in labels.items():
            own = values[row]
            if pairs:
                own = own[own != IGNORED]
            elif own.shape == real[row].shape:
                own = own[real[row]]
            digest.update(name.encode() + own.contiguous().numpy().tobytes())
        yield digest.hexdigest()


def _write(file: Path, rows: dict[str, dict[str, Tensor]], stacks: tuple[str, ...], description: dict) -> None:
    """Rows end to end, one tensor a stack, and where each begins; whole or not at all."""
    keys = sorted(rows)
    tensors = {"keys": torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)}
    for stack in stacks:
        tensors[stack] = torch.cat([rows[key][stack] for key in keys])
        tensors[f"{stack}.lengths"] = torch.tensor([len(rows[key][stack]) for key in keys])
    with whole(file) as partial:
        save_file(tensors, partial, metadata={"settings": json.dumps(description), "digest": _digest(tensors)})


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _read(file: Path, stacks: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Raises StaleCacheError where the file is cut off, changed, or another one."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors, digest = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata().get("digest")
        if digest not in (None, _digest(tensors)):  # None: written before digests were
            raise ValueError("its content is not what was written")
        keys = [bytes(row).hex() for row in tensors["keys"].tolist()]
        parts = {s: tensors[s].split(tensors[f"{s}.lengths"].tolist()) for s in stacks}
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
        raise StaleCacheError(
            f"{file}: the token scores in it cannot be used ({error}). Take another copy; or delete it, and start over: the scores are then made anew."
        ) from error
    return {key: {stack: parts[stack][number] for stack in stacks} for number, key in enumerate(keys)}
