"""Short streamed runs, by one process or by several: `python streaming_script.py FOLDER`. Process 0 leaves what the runs learned there.

Every step sees the same 8 rows in the same order however many processes share them, and what a process gets differs in
length: in the first step the rows of process 0 are a single chunk, those of process 1 are four. At the end come single
steps on a model whose parameters are sharded (FSDP2), on rows of one length.
"""

import gc
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainerCallback, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments, Streaming, StreamingConfig  # noqa: E402
from tests.methods.tiny_models import tiny_model  # noqa: E402
from tests.methods.twin import shifted  # noqa: E402
from tests.training.runs import SEEKING, GradientRecorder, arguments, exact_model, pad_right, text_rows, trainer_for  # noqa: E402

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


def classifier():
    return tiny_model("gpt2", "sequence_classification", dtype=torch.float64)



SKIP = SEEKING | {"token_gradient": "skip", "skip_threshold": 0.05, "select_from": "labels"}
# model, accumulation, rows, settings
CASES = {
    "whole": (exact_model, 1, ROWS, {}),
    "accumulated": (exact_model, 2, ROWS, {}),
    "own mean": (exact_model, 2, ROWS, {"average_tokens_across_devices": False}),
    "checkpointed": (exact_model, 1, ROWS, {"activation_checkpointing": True}),
    "lora": (lora_model, 2, ROWS, {}),
    "classifier": (classifier, 2, CLASSES, {}),
    "classifier checkpointed": (classifier, 2, CLASSES, {"activation_checkpointing": True}),
    "seeking": (exact_model, 2, ROWS, SEEKING | {"token_gradient": "stream"}),
    "skip": (exact_model, 1, EARLY, SKIP),
    "skip accumulated": (exact_model, 2, EARLY, SKIP),
    "careless": (exact_model, 1, [*LONG, *LONG], {}),
}


class CountReductions(TrainerCallback):
    """How many buckets of gradients were reduced in each optimizer step, where several processes run."""

    def __init__(self):
        self.trainer, self.steps, self._now = None, [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            self.trainer.model_wrapped.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):
        self._now += 1
        return allreduce_hook(None, bucket)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self._now)
        self._now = 0


class CountTurns(MemEfficientTrainer):
    """How often the model was called in each micro-batch."""

    turns = ()

    def _note(self, step):
        super()._note(step)
        self.turns = (*self.turns, self.calls)
        self.calls = 0

    def compute_loss(self, model, *args, **kwargs):
        self.calls = 0
        count = model.register_forward_pre_hook(self._called)
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            count.remove()

    def _called(self, *_):
        self.calls += 1


class Careless(CountTurns):
    """Synchronises in every turn, for which processes need as many turns as each other."""

    def train(self):
        self.accelerator.no_sync = nullcontext
        return super().train()


def run_case(name: str, folder: Path, processes: int, plain: bool = False) -> dict:
    make_model, accumulation, rows, settings = CASES[name]
    sizes = {"per_device_train_batch_size": ROWS_A_STEP // (processes * accumulation), "gradient_accumulation_steps": accumulation}
    settings = {k: v for k, v in settings.items() if not plain or k in ("activation_checkpointing", "average_tokens_across_devices")}
    own = {} if plain else {"cls": MemEfficientTrainingArguments, "sequence_chunk_size": CHUNK}
    args = arguments(folder / name, False, train_sampling_strategy="sequential", max_steps=2, **sizes, **settings, **own)
    recorder, counter = GradientRecorder(), CountReductions()
    cls = Trainer if plain else Careless if name == "careless" else CountTurns
    trainer = trainer_for(make_model(), args, rows, cls, callbacks=[recorder, counter])
    counter.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"gradients": recorder.steps, "losses": losses, "reductions": counter.steps, "turns": getattr(trainer, "turns", None)}


def sharded_gradients(model, batch: dict, labels: int, processes: int, synchronised) -> dict:
    """Of one streamed step; the model is sharded after streaming is installed, whose probe calls parts of it."""
    streaming = Streaming(model, StreamingConfig(sequence_chunk_size=CHUNK))
    mesh = init_device_mesh("cpu", (processes,))
    for layer in streaming.architecture.stacks["decoder"].layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with streaming.step(batch) as step:
        for is_last in step.turns():
            model.set_requires_gradient_sync(synchronised(is_last))
            (step.loss_sum(model(**step.inputs)) * processes / labels).backward()
    streaming.remove()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def sharded_case(process: int, processes: int) -> dict:
    """Gradients of one step: sharded, and by plain backpropagation of all rows in one process."""
    rows = [row | {name: row[name][:14] for name in row} for row in LONG]
    own, labels = rows[process::processes], sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    found = {
        "last turn alone": sharded_gradients(exact_model(), pad_right(own), labels, processes, lambda is_last: is_last),
        "every turn": sharded_gradients(exact_model(), pad_right(own), labels, processes, lambda is_last: True),
    }
    model, batch = exact_model(), pad_right(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    (F.cross_entropy(logits.flatten(0, 1), shifted(batch["labels"]).flatten(), reduction="sum") / labels).backward()
    return found | {"plain": {name: p.grad for name, p in model.named_parameters()}}


def main(folder: Path) -> None:
    from accelerate import PartialState
    from accelerate.utils import gather_object

    torch.set_num_threads(1)
    gc.freeze()  # accelerate collects garbage at the start of every run
    state = PartialState(cpu=True, timeout=timedelta(seconds=30))  # processes that wait for each other in vain fail
    found = {}
    for name in sys.argv[2:] or CASES:
        ours, plain = (run_case(name, folder, state.num_processes, plain) for plain in (False, True))
        found[name] = ours | {"turns": gather_object([ours["turns"]]), "plain": plain}
    sharded = sharded_case(state.process_index, state.num_processes)
    if state.is_main_process:
        torch.save(found | {"processes": state.num_processes, "sharded": sharded}, folder / "found.pt")
    state.destroy_process_group()  # or a thread of it may outlive the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
