"""Scores of a whole data set, taken in one pass before training (the paper's offline seeking) or before an epoch.

A row is known by its content, a digest of its real tokens and their labels, so that shuffling, padding and processes do not
matter and a changed row is never given the scores of another. A file is known by the model's weights and the settings that
decide a score; rows that a file lacks are scored and added.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_memtune.core.scorers import BUILT_IN
from hf_memtune.errors import StaleCacheError
from hf_memtune.strategies.token_seeking import TokenSeeking
from hf_memtune.training.fingerprint import model_fingerprint

_SETTINGS = (
    "token_scorer", "context_weight", "gradient_weight", "context_layer", "context_normalize", "gradient_norm",
)  # fmt: skip


class OfflineScores:
    """Scores by row digest, in memory and, for built-in scorers, in a file."""

    def __init__(self, seeking: TokenSeeking, trainer):
        self.seeking, self.trainer = seeking, trainer
        self.stacks = tuple(seeking.architecture.stacks)
        self.rows: dict[str, dict[str, Tensor]] = {}
        self.file: Path | None = None

    def load_or_score(self, file: str | None = None) -> None:
        """Read what a file has, score what it lacks, and keep both. `file`: of the run that is being resumed."""
        if file is not None:
            self._resume(Path(file))
            return
        config = self.seeking.config
        if self.seeking.scorer.name not in BUILT_IN or config.token_scorer != self.seeking.scorer.name:
            self.score()  # the scores of a user's own function cannot be told apart by name: never kept on disk
            return
        fingerprint = self._fingerprint()
        self.file = self._folder() / f"seek-{fingerprint}.safetensors"
        if self.file.exists():
            self.rows = _read(self.file, self.stacks)
        if self.score():
            self.trainer.accelerator.wait_for_everyone()
            if self.trainer.is_world_process_zero():
                _write(self.file, self.rows, self.stacks, self._description())
            self.trainer.accelerator.wait_for_everyone()

    def _resume(self, file: Path) -> None:
        if not file.exists():
            raise StaleCacheError(
                f"the run to resume took its token scores from {file}, which is gone. Scores made now would be those of a model that "
                "is already trained. Restore the file, or start over, or use seek_schedule=step."
            )
        self.rows, self.file = _read(file, self.stacks), file

    def score(self) -> int:
        """One pass over the training rows, scoring those that are not known yet. Returns how many were new."""
        known, found = set(self.rows), {}
        loader = self.trainer.get_test_dataloader(self.trainer.train_dataset)
        hidden = self.trainer.args.disable_tqdm or not self.trainer.is_local_process_zero()
        for batch in tqdm(loader, desc="Seeking tokens", unit="batch", disable=hidden):
            batch = self.trainer._prepare_inputs(batch)
            keys = list(row_digests(batch))
            if known.issuperset(keys):
                continue
            with self.trainer.compute_loss_context_manager():
                step = self.seeking.inspect(batch)
            for number, key in enumerate(keys):
                found[key] = {
                    stack: step.values[stack][number][step.inspection[stack]["real"][number]].float().cpu() for stack in self.stacks
                }
        if self.trainer.args.world_size > 1:
            found = {key: value for part in gather_object([found]) for key, value in part.items()}
        new = sum(key not in known for key in found)
        self.rows |= found
        return new

    def lookup(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scores of a batch, by stack, (B, T) float32 each; padding scores 0. Raises StaleCacheError for an unknown row."""
        keys = list(row_digests(batch))
        missing = [number for number, key in enumerate(keys) if key not in self.rows]
        if missing:
            raise StaleCacheError(
                f"rows {missing} of the batch are not among the {len(self.rows)} that were scored before training: they changed "
                "since, or the data collator makes them anew each time (random masking, augmentation). Use seek_schedule=step."
            )
        return {stack: self._padded(stack, batch, [self.rows[key][stack] for key in keys]) for stack in self.stacks}

    def _padded(self, stack: str, batch: dict[str, Any], rows: list[Tensor]) -> Tensor:
        real = _real_tokens(batch, "decoder_" if stack == "decoder" and len(self.stacks) > 1 else "")
        scores = torch.zeros(real.shape, device=real.device)
        scores[real] = torch.cat(rows).to(real.device)
        return scores

    def _description(self) -> dict[str, Any]:
        return {name: getattr(self.seeking.config, name) for name in _SETTINGS}

    def _fingerprint(self) -> str:
        described = json.dumps(self._description(), sort_keys=True)
        model = model_fingerprint(self.trainer.model)
        return hashlib.blake2b(f"{described} {model}".encode(), digest_size=12).hexdigest()

    def _folder(self) -> Path:
        chosen = self.seeking.config.seek_cache_dir
        files = getattr(self.trainer.train_dataset, "cache_files", None)
        folder = Path(chosen or (Path(files[0]["filename"]).parent if files else self.trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def _real_tokens(batch: dict[str, Any], prefix: str = "") -> Tensor:
    """(B, T) bool, from the attention mask, or of a decoder without one from its labels."""
    mask = batch.get(f"{prefix}attention_mask")
    if mask is not None:
        return mask.bool()
    like = batch["labels"] if prefix else batch["input_ids"]
    return torch.ones(like.shape, dtype=torch.bool, device=like.device)


def row_digests(batch: dict[str, Any]) -> Iterator[str]:
    """One digest for each row, over its real tokens and their labels, without padding."""
    ids, real = batch["input_ids"].cpu(), _real_tokens(batch).cpu()
    labels = {k: batch[k].cpu() for k in ("labels", "start_positions", "end_positions") if batch.get(k) is not None}
    for row in range(ids.shape[0]):
        digest = hashlib.blake2b(ids[row][real[row]].numpy().tobytes(), digest_size=16)
        for name, values in labels.items():
            own = values[row]
            own = own[real[row]] if own.shape == real[row].shape else own
            own = own[own != -100] if own.dim() and own.shape != ids[row][real[row]].shape else own
            digest.update(name.encode() + own.contiguous().numpy().tobytes())
        yield digest.hexdigest()


def _write(file: Path, rows: dict[str, dict[str, Tensor]], stacks: tuple[str, ...], description: dict) -> None:
    """Rows end to end, one tensor a stack, and where each begins; whole or not at all."""
    keys = sorted(rows)
    tensors = {"keys": torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8)}
    for stack in stacks:
        tensors[stack] = torch.cat([rows[key][stack] for key in keys])
        tensors[f"{stack}.lengths"] = torch.tensor([len(rows[key][stack]) for key in keys])
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"settings": json.dumps(description)})
    partial.replace(file)


def _read(file: Path, stacks: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        keys = [bytes(row).hex() for row in tensors.get_tensor("keys").tolist()]
        parts = {s: tensors.get_tensor(s).split(tensors.get_tensor(f"{s}.lengths").tolist()) for s in stacks}
    return {key: {stack: parts[stack][number] for stack in stacks} for number, key in enumerate(keys)}
