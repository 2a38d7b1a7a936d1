"""Short streamed runs, by one process or by several: `python streaming_script.py FOLDER`. Process 0 leaves what the runs learned there.

Every step sees the same 8 rows in the same order however many processes share them, and what a process gets differs in
length: in the first step the rows of process 0 are a single chunk, those of process 1 are four.
"""

import gc
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments, StreamingCallback  # noqa: E402
from hf_memtune.methods.events import Listener  # noqa: E402
from hf_memtune.training.care import chunk_choice  # noqa: E402
from tests.support import patience  # noqa: E402
from tests.support.any_type import tiny  # noqa: E402
from tests.support.runs import SEEKING, GradientRecorder, arguments, exact_model, text_rows, trainer_for  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

ROWS_A_STEP = 8
CHUNK = 4
SHORT, LONG = text_rows(8, shortest=3, longest=4), text_rows(8, seed=5, shortest=14, longest=16)
ROWS = [*SHORT[:4], *LONG[:4], *LONG[4:], *SHORT[4:]]


def first_label_alone(row: dict) -> dict:
    """Nothing is to be learned after the first chunk."""
    return row | {"labels": [-100, row["input_ids"][1]] + [-100] * (len(row["labels"]) - 2)}


EARLY = [*map(first_label_alone, LONG[:4]), *LONG[4:], *LONG[4:], *map(first_label_alone, LONG[:4])]
CLASSES = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(ROWS)]


def lora_model():
    set_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(tiny_model("llama", dtype=torch.float64), config)


def hybrid_model():
    """Short convolutions beside attention."""
    return tiny("lfm2")


def classifier():
    return tiny_model("gpt2", "sequence_classification", dtype=torch.float64)


class OwnLoss:
    """A loss of logits, of two calls of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, other = inputs.pop("labels"), {name: value[:, :3] for name, value in inputs.items() if name != "labels"}
        losses = F.cross_entropy(model(**inputs).logits.transpose(1, 2), labels, reduction="none")
        weighted = (losses * torch.arange(1, losses.shape[1] + 1)).sum() / num_items_in_batch
        loss = weighted + 0.1 * model(**other).logits.square().mean()
        return (loss, None) if return_outputs else loss


class Careless:
    """Synchronises in every micro-batch."""

    def train(self):
        self.accelerator.no_sync = lambda model: nullcontext()
        return super().train()


SKIP = SEEKING | {"token_gradient": "skip", "skip_threshold": 0.05, "select_from": "labels"}
SMALL_BUCKETS = {"ddp_bucket_cap_mb": 0.02}  # DistributedDataParallel takes parts of a MiB, whatever the argument's type says
# model, accumulation, rows, settings, what is above the trainer
CASES = {
    "whole": (exact_model, 1, ROWS, {}, ()),
    "accumulated": (exact_model, 2, ROWS, {}, ()),
    "small buckets": (exact_model, 2, ROWS, SMALL_BUCKETS, ()),
    "own mean": (exact_model, 2, ROWS, {"average_tokens_across_devices": False}, ()),
    "own loss": (exact_model, 2, ROWS, {}, (OwnLoss,)),
    "checkpointed": (exact_model, 1, ROWS, {"activation_checkpointing": True}, ()),
    "lora": (lora_model, 2, ROWS, {}, ()),
    "hybrid": (hybrid_model, 2, ROWS, {}, ()),
    "classifier": (classifier, 2, CLASSES, {}, ()),
    "classifier checkpointed": (classifier, 2, CLASSES, {"activation_checkpointing": True}, ()),
    "seeking": (exact_model, 2, ROWS, SEEKING | {"token_gradient": "stream"}, ()),
    "skip": (exact_model, 1, EARLY, SKIP, ()),
    "skip accumulated": (exact_model, 2, EARLY, SKIP, ()),
    "careless": (exact_model, 2, ROWS, {}, (Careless,)),
}
BY_CALLBACK = ("accumulated", "own loss", "classifier")
PLAIN_SETTINGS = ("activation_checkpointing", "average_tokens_across_devices", "ddp_bucket_cap_mb")


class CountReductions(TrainerCallback):
    """Which buckets of gradients were reduced in each optimizer step, where several processes run."""

    def __init__(self):
        self.trainer, self.steps, self._now = None, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.trainer.model_wrapped.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):
        self._now.append(bucket.index())
        return allreduce_hook(None, bucket)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(sorted(self._now))
        self._now = []


class CountChunks(Listener):
    """In how many chunks each call of the model goes backward, and how many of its tokens run again."""

    def __init__(self):
        self.chunks, self.recomputed = [], []

    def shaped(self, chunks, rows):
        self.chunks.append(chunks)

    def counted(self, **counts):
        if "recomputed" in counts:
            self.recomputed.append(int(counts["recomputed"]))


def run_case(name: str, folder: Path, processes: int, how: str = "trainer", calls_of: int | None = None) -> dict:
    """how: plain, callback (a plain Trainer with it) or trainer (MemEfficientTrainer). calls_of: processes whose calls are to be made."""
    make_model, accumulation, rows, settings, above = CASES[name]
    size = ROWS_A_STEP // ((calls_of or processes) * accumulation)
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS_A_STEP // (processes * size)}
    if how == "trainer":
        own, base = {"cls": MemEfficientTrainingArguments, "sequence_chunk_size": CHUNK, **settings}, MemEfficientTrainer
    else:
        own, base = {key: value for key, value in settings.items() if key in PLAIN_SETTINGS}, Trainer
    args = arguments(folder / name, False, train_sampling_strategy="sequential", max_steps=2, **sizes, **own)
    recorder, reductions, chunks = GradientRecorder(), CountReductions(), CountChunks()
    callback = StreamingCallback(sequence_chunk_size=CHUNK)
    callbacks = [recorder, reductions, *([callback] if how == "callback" else [])]
    trainer = trainer_for(make_model(), args, rows, type("Case", (*above, base), {}), callbacks=callbacks)
    (trainer.method_callback if how == "trainer" else callback).listeners.append(chunks)
    reductions.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    counts = {"reductions": reductions.steps, "chunks": chunks.chunks, "recomputed": chunks.recomputed}
    return {"gradients": recorder.steps, "losses": losses} | counts


def chunks_chosen(folder: Path) -> dict[str, list]:
    """What each process chooses where its clock would have it choose another size; and where the budgets differ."""
    from accelerate.utils import gather_object

    rank, fastest = PartialState().process_index, (128, 64)

    def chosen() -> int:
        args = arguments(
            folder, False, MemEfficientTrainingArguments, sequence_chunk_size="auto", per_device_train_batch_size=1, max_steps=1
        )
        trainer = trainer_for(exact_model(n_positions=512), args, text_rows(4, shortest=299, longest=300))
        with (
            patch.object(chunk_choice, "SIZES", fastest),
            patch.object(chunk_choice, "_seconds", lambda trainer, config, inputs: float(config.sequence_chunk_size != fastest[rank])),
        ):
            trainer.train()
        return trainer.args.sequence_chunk_size

    predicted: dict = {}

    def once(trainer, shape, size, predict=chunk_choice._predicted):
        return predicted[size] if size in predicted else predicted.setdefault(size, predict(trainer, shape, size))

    def budget(trainer, config):
        return 2**40 if rank == 0 or not predicted else predicted[128].peak_bytes - 1

    with patch.object(chunk_choice, "_predicted", once), patch.object(chunk_choice, "_budget", budget):
        return {"clocks": gather_object([fastest[rank]]), "sizes": gather_object([chosen()]), "tight": gather_object([chosen()])}


def main(folder: Path) -> None:
    from accelerate.utils import gather_object

    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every run
    state = PartialState(cpu=True, timeout=timedelta(seconds=patience.COLLECTIVE))
    found = {}
    for name in sys.argv[2:] or CASES:
        ours, plain = (run_case(name, folder, state.num_processes, how) for how in ("trainer", "plain"))
        found[name] = ours | {key: gather_object([ours[key]]) for key in ("chunks", "recomputed")} | {"plain": plain}
    for name in () if sys.argv[2:] else BY_CALLBACK:
        found[name]["callback"] = run_case(name, folder, state.num_processes, "callback")
    found["chunk choice"] = {} if sys.argv[2:] else chunks_chosen(folder)
    if state.is_main_process:
        torch.save(found | {"processes": state.num_processes}, folder / "found.pt")
    state.destroy_process_group()  # or a thread of it may outlive the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
