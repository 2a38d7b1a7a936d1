"""Short training runs on tiny models: rows, a collator, and everything a run leaves that a test may want to compare."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from hf_memtune import MemEfficientTrainer, MemEfficientTrainingArguments
from hf_memtune.architectures import describe
from tests.support.tiny_models import VOCABULARY, tiny_model
from tests.support.twin import worst_difference

# The best of scores that read the model, which most tests are about. Summed attention favours the first tokens; its mean spreads
# the choice over the row.
SEEKING = {"token_seeking": True, "token_ratio": 0.35, "context_normalize": "mean"}
SEEKING |= {"token_scorer": "combined", "token_selection": "top", "select_from": "all"}


def text_rows(count: int = 16, seed: int = 3, shortest: int = 5, longest: int = 16, prompts: bool = True) -> list[dict]:
    """Rows of different lengths, each with a prompt of its own length that carries no label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        length = draw(shortest, longest + 1)[0]
        ids, prompt = draw(5, VOCABULARY, length), draw(0, length - 1)[0] if prompts else 0
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def pad_right(rows: list[dict], padding: int = 0) -> dict[str, Tensor]:
    """Token lists filled up to the longest of the batch; numbers stacked."""
    batch = {}
    for name, first in rows[0].items():
        values = [torch.tensor(row[name]) for row in rows]
        fill = -100 if name == "labels" else padding
        batch[name] = torch.nn.utils.rnn.pad_sequence(values, True, fill) if isinstance(first, list) else torch.stack(values)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


class DrawingRows(Dataset):
    """Rows that draw from a generator of their own when they are read, as augmented ones do."""

    def __init__(self, rows: list[dict]):
        self.rows, self.generator = rows, random.Random(5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        self.generator.random()
        return self.rows[number]

    @property
    def next_draw(self) -> float:
        return self.generator.random()


class GradientRecorder(TrainerCallback):
    """The gradients with which each optimizer step is taken."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class LayerRuns(TrainerCallback):
    """How often a model's first layer runs, with gradient and without; the most tokens of a row that it saw at once with gradient."""

    def __init__(self):
        self.with_gradient = self.without = self.widest = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.watch(model)

    def watch(self, model) -> None:
        """From now on; of a training, `on_train_end` ends it."""
        layer = describe(model).decoder.layers[0]
        self._hook = layer.register_forward_pre_hook(self._runs, with_kwargs=True)

    @property
    def runs(self) -> int:
        return self.with_gradient + self.without

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    def _runs(self, module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled() and not module.training:
            return  # a probe of the model, before the first step
        if torch.is_grad_enabled():
            self.with_gradient += 1
            self.widest = max(self.widest, hidden.shape[1])
        else:
            self.without += 1


@dataclass
class Run:
    """A finished run."""

    trainer: object
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    layers: LayerRuns | None = None

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}


def arguments(folder, seeking=True, cls=None, **settings) -> TrainingArguments:
    """Plain SGD without clipping, so that a parameter's change is its gradient; every step logged."""
    cls = cls or (MemEfficientTrainingArguments if seeking else TrainingArguments)
    settings = (SEEKING if seeking else {}) | settings
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    defaults = {
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 2,
    }
    defaults |= (
        {"per_device_train_batch_size": 8, "memory_trace_steps": 0}
        if issubclass(cls, MemEfficientTrainingArguments)
        else {"per_device_train_batch_size": 8}
    )
    return cls(output_dir=str(folder), **fixed, **(defaults | settings))


def trainer_for(model, args, rows, cls=MemEfficientTrainer, **kwargs):
    collator = kwargs.pop("data_collator", pad_right)
    return cls(model=model, args=args, train_dataset=rows, data_collator=collator, **kwargs)


def train(model, args, rows, cls=MemEfficientTrainer, resume=None, **kwargs) -> Run:
    recorder = GradientRecorder()
    trainer = trainer_for(model, args, rows, cls, callbacks=[recorder, *kwargs.pop("callbacks", [])], **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, recorder.steps)


def exact_model(**overrides):
    """GPT-2 in float64, where nothing is computed in float32: Llama's norms are, and round a gradient when it is divided."""
    return tiny_model("gpt2", dtype=torch.float64, **overrides)


def llama(dtype=torch.float32, **overrides):
    return tiny_model("llama", dtype=dtype, **overrides)


def worst_step(found: Run, expected: Run) -> float:
    """Largest relative difference of any parameter's gradient in any step."""
    assert len(found.gradients) == len(expected.gradients) > 0
    return max(worst_difference(*pair) for pair in zip(found.gradients, expected.gradients))


def same_parameters(found: Run, expected: Run) -> bool:
    """Bit for bit."""
    ours, theirs = found.parameters, expected.parameters
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
