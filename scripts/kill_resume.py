"""Kill runs at random moments, resume them, and compare what they learn, bit by bit: `python scripts/kill_resume.py`.

Each line of results/kill_resume.jsonl is a run that was killed (SIGKILL, no warning) and went on from its newest complete checkpoint, or
began anew where there was none. `equal` says whether its parameters are those of a run that was never disturbed. Half of the kills come at
any moment after the first checkpoint has begun, half shortly after a checkpoint has; `checkpoints` says of each whether it was whole then.
"""

import hashlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from options import one, parse, some_of
from store import measure, read
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments
from hf_memtune.errors import ConfigError
from hf_memtune.training.checkpoints import why_incomplete

STEPS, ROWS, TOKENS = 4, 12, 24
SCORED = {"token_seeking": True, "token_ratio": 0.3, "token_scorer": "context", "select_from": "all"}
MODES: dict[str, dict] = {
    "plain": {},
    "LoRA": {"lora": True},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "checkpointing": {"activation_checkpointing": True},
    "two levels": {"checkpoint_levels": 2},
    "streaming": {"sequence_chunk_size": 8},
    "streaming, LoRA, checkpointing": {"sequence_chunk_size": 8, "lora": True, "activation_checkpointing": True},
    "seeking, sampled": {"token_seeking": True, "token_ratio": 0.3},
    "seeking, stream": {"token_seeking": True, "token_gradient": "stream", "sequence_chunk_size": 8},
    "seeking, skip": {"token_seeking": True, "token_gradient": "skip", "sequence_chunk_size": 8},
    "seeking, scored once": {**SCORED, "seek_schedule": "once"},
    "seeking, scored each epoch": {**SCORED, "seek_schedule": "epoch"},
    "reversible, exact": {"reversible": "centred"},
    "reversible, float": {"reversible": "meft1", "reversible_numerics": "float"},
}


def train(mode: str, folder: Path, resume: bool) -> str:
    """Train to the end. Returns a digest of the parameters."""
    settings = dict(MODES[mode])
    lora = settings.pop("lora", False)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, attention_dropout=0.1,
        )
    )  # fmt: skip
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1))
    rows = torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    args = MemEfficientTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", memory_trace_steps=0, full_loss_rows=0,
        max_steps=STEPS, save_steps=1, save_strategy="steps", **{"per_device_train_batch_size": 2} | settings,
    )  # fmt: skip
    trainer = MemEfficientTrainer(model=model, args=args, train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows])
    try:
        trainer.train(resume_from_checkpoint=True if resume else None)
    except ConfigError:  # nothing was saved before the kill
        if not resume or trainer.state.global_step:
            raise
        return train(mode, folder, resume=False)
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(trainer.model.named_parameters()):
        found.update(name.encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()


def _child(mode: str, folder: Path, resume: bool, answer) -> None:
    warnings.simplefilter("ignore")
    answer.send(train(mode, folder, resume))


def start(mode: str, folder: Path, resume: bool = False):
    """A process of its own, forked from this one, which has loaded everything. Returns it, and where its answer comes."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(mode, folder, resume, there))
    process.start()
    there.close()
    return process, here


def finished(mode: str, folder: Path, resume: bool = False) -> str:
    """The digest of a run that nobody disturbs. Raises RuntimeError where it fails."""
    process, answer = start(mode, folder, resume)
    try:
        return answer.recv()
    except EOFError:
        raise RuntimeError(f"{mode}: a run in {folder} failed, resumed: {resume}") from None
    finally:
        process.join()


class Undisturbed:
    """The digest of each mode, and how long a run takes."""

    def __init__(self):
        self.known: dict[str, tuple[str, float]] = {}

    def of(self, mode: str) -> tuple[str, float]:
        if mode not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                self.known[mode] = finished(mode, Path(folder)), time.perf_counter() - began
        return self.known[mode]


def killed(run: dict, undisturbed: Undisturbed) -> dict:
    """Kill one run, resume it, and compare."""
    expected, seconds = undisturbed.of(run["mode"])
    chance = random.Random(f"{run['mode']} {run['number']}")
    folder = Path(tempfile.mkdtemp())
    try:
        process, _ = start(run["mode"], folder)
        if run["while"] == "writing":
            _wait_for_a_checkpoint(folder, chance.randrange(1, STEPS + 1), process)
            time.sleep(chance.random() * 0.03)
        else:
            _wait_for_a_checkpoint(folder, 1, process)
            time.sleep(chance.random() * seconds / 2)
        was_running = process.is_alive()
        process.kill()
        process.join()
        saved = {path.name: why_incomplete(path) or "whole" for path in sorted(folder.glob("checkpoint-*"))}
        found = finished(run["mode"], folder, resume=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"was_running": was_running, "checkpoints": saved, "equal": found == expected}


def _wait_for_a_checkpoint(folder: Path, number: int, process) -> None:
    while process.is_alive() and not (folder / f"checkpoint-{number}").exists():
        time.sleep(0.0005)


def main(given: list[str] | None = None) -> int:
    options = parse(__doc__, "kill_resume", given, modes=some_of(MODES), kills=one(40, "of each mode"))
    torch.set_num_threads(1)  # a forked process has none of the threads of this one
    undisturbed = Undisturbed()
    numbers = [(mode, number) for mode in options.modes for number in range(options.kills)]
    wanted = [{"mode": mode, "number": number, "while": ("anything", "writing")[number % 2]} for mode, number in numbers]
    measure(options.out, wanted, lambda run: killed(run, undisturbed), "Killing", device="cpu", steps=STEPS)
    return int(not all(row["equal"] for row in read(options.out)))


if __name__ == "__main__":
    sys.exit(main())
