"""Short runs of trl's trainers on tiny models: one case for each way in which they call the model, and what a run leaves."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from importlib import import_module

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

import hf_memtune
from tests.support.runs import LayerRuns
from tests.support.tiny_models import HEADS, VOCABULARY, tiny_model

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
CHUNK = 5
_FOLDER = tempfile.TemporaryDirectory()
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w4 {% generation %}{{ m['content'] }} w2 {% endgeneration %}"
    "{% else %}w3 {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


# -- models, tokenizer, rows


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id of the tiny models, and a chat template that marks what the assistant says."""
    import tokenizers

    words = {f"w{number}": number for number in range(VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3")
    made.chat_template = _TEMPLATE
    return made


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte for each id: trl tells the bytes of two tokenizers apart by their places in the text."""
    import tokenizers

    ours = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), key=lambda byte: (byte not in "w0123456789\u0120", byte))
    words = ["<pad>", "<bos>", "<eos>", *ours[: VOCABULARY - 3]]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = _TEMPLATE
    return made


def llama(seed: int = 0, head: str | None = None, **overrides):
    return tiny_model("llama", head, torch.float32, seed, num_hidden_layers=2, use_cache=True, **overrides)


def mixtral(seed: int = 0):
    return tiny_model("mixtral", None, torch.float32, seed, num_hidden_layers=2)


def reward_model(seed: int = 0):
    return llama(seed, "sequence_classification", num_labels=1)


def on_disk(seed: int = 0, words: Callable = tokenizer):
    """The same with a path in its config: from there trl loads the reference model, or the teacher's tokenizer."""
    folder = os.path.join(_FOLDER.name, f"llama-{seed}-{words.__name__}")
    if not os.path.isdir(folder):
        llama(seed).save_pretrained(folder)
        words().save_pretrained(folder)
    return HEADS["causal_lm"].from_pretrained(folder, dtype=torch.float32).train()


def lora(**more):
    import peft

    targets = ["q_proj", "v_proj", "down_proj"]
    return peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=targets, init_lora_weights=False, **more)


def _texts(seed: int, shortest: int, longest: int) -> Callable[[], str]:
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return "".join(f"w{word} " for word in torch.randint(5, VOCABULARY, (length,), generator=generator).tolist())

    return text


def _rows(make: Callable[[Callable[[], str], Callable[[], str], int], dict], longest: int = 16) -> Callable[[int], Dataset]:
    """Eight rows of prompts of up to 8 words and answers of up to 16, or what is said, of different lengths."""

    def rows(seed: int) -> Dataset:
        prompt, answer = _texts(seed, longest // 5, longest // 2), _texts(seed + 1, longest // 3, longest)
        return Dataset.from_list([make(prompt, answer, number) for number in range(8)])

    return rows


def _said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text.strip()}]


texts = _rows(lambda prompt, answer, _: {"text": prompt() + answer()})
completions = _rows(lambda prompt, answer, _: {"prompt": prompt(), "completion": answer()})
chats = _rows(lambda prompt, answer, _: {"messages": _said("user", prompt()) + _said("assistant", answer())})
short_chats = _rows(lambda prompt, answer, _: {"messages": _said("user", prompt()) + _said("assistant", answer())}, longest=7)
pairs = _rows(lambda prompt, answer, _: {"prompt": prompt(), "chosen": answer(), "rejected": answer()})
triples = _rows(lambda prompt, answer, _: {"prompt": prompt(), "chosen": answer(), "rejected": answer(), "reference": answer()})
judged = _rows(lambda prompt, answer, number: {"prompt": prompt(), "completion": answer(), "label": number % 3 != 0})
prompts = _rows(lambda prompt, answer, _: {"prompt": prompt()})
asked = _rows(lambda prompt, answer, _: {"prompt": _said("user", prompt()), "privileged_context": answer()})


def spread_reward(completions, **kwargs):
    """Answers of many different words are best."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(set(text.split())) + len(text) / 100 for text in texts]


def even_reward(completions, **kwargs):
    """1 or 0."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def mean_of_losses(outputs, labels, num_items_in_batch=None):
    """A loss of the model's own outputs, which trl then asks for with logits."""
    logits, wanted = outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:]
    return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", label_smoothing=0.2) / num_items_in_batch


# -- cases


@dataclass(frozen=True)
class Case:
    """A trainer of trl, its settings, and what it is given. `extra` makes what a run may not share with another."""

    trainer: str
    rows: Callable[[int], Dataset]
    settings: dict = field(default_factory=dict)
    extra: Callable[[], dict] = dict
    model: Callable = llama
    rate: float = 0.1
    steps: int = 2

    @property
    def trainer_class(self) -> type:
        module, name = self.trainer.rsplit(".", 1)
        return getattr(import_module(module), name)

    @property
    def arguments_class(self) -> type:
        module, name = self.trainer.rsplit(".", 1)
        name = name.removesuffix("Trainer") + "Config"
        return getattr(import_module(module), name, None) or getattr(import_module("trl"), name)


def _packed(**settings) -> dict:
    """The best-fit packing of trl's default, of rows told apart by their positions alone, unless another is asked for."""
    return {"packing": True, "max_length": 48, "per_device_train_batch_size": 2, **settings}


def _generating(**settings) -> dict:
    return {"max_completion_length": 14, **settings}


def _grouped(**settings) -> dict:
    return _generating(num_generations=4, **settings)


def _rewarded() -> Callable[[], dict]:
    return lambda: {"reward_funcs": spread_reward}


def _adapted(**more) -> Callable[[], dict]:
    return lambda: {"peft_config": lora()} | more


def _taught(make: Callable = llama, **more) -> Callable[[], dict]:
    return lambda: {"teacher_model": make(seed=7).eval()} | {name: make() for name, make in more.items()}


SFT, DPO, KTO, GRPO, RLOO = ("trl.SFTTrainer", "trl.DPOTrainer", "trl.KTOTrainer", "trl.GRPOTrainer", "trl.RLOOTrainer")
_E = "trl.experimental."
_ONLINE = {"max_new_tokens": 12, "max_length": 32}
CASES: dict[str, Case] = {
    "sft": Case(SFT, texts),
    "sft-dft": Case(SFT, texts, {"loss_type": "dft"}, rate=5.0),
    "sft-assistant": Case(SFT, chats, {"assistant_only_loss": True}),
    "sft-completion": Case(SFT, completions, {"completion_only_loss": True}),
    "sft-packing": Case(SFT, texts, _packed()),
    "sft-packing-wrapped": Case(SFT, texts, _packed(packing_strategy="wrapped")),
    "sft-padding-free": Case(SFT, texts, {"padding_free": True, "max_length": None}),
    "sft-evaluation": Case(SFT, texts, {"eval_strategy": "steps", "eval_steps": 1}, lambda: {"eval_dataset": texts(8)}),
    "sft-smoothing": Case(SFT, texts, {"label_smoothing_factor": 0.2}),
    "sft-own-loss": Case(SFT, texts, extra=lambda: {"compute_loss_func": mean_of_losses}),
    "sft-accumulation": Case(SFT, texts, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "sft-checkpointing": Case(SFT, texts, {"gradient_checkpointing": True}),
    "sft-saving": Case(SFT, texts, {"save_strategy": "steps", "save_steps": 1}),
    "sft-lora": Case(SFT, texts, extra=_adapted()),
    "sft-mixtral": Case(SFT, texts, model=mixtral),
    "dpo": Case(DPO, pairs, model=on_disk),
    "dpo-reference": Case(DPO, pairs, extra=lambda: {"ref_model": llama(seed=7)}),
    "dpo-ipo": Case(DPO, pairs, {"loss_type": "ipo"}, lambda: {"ref_model": llama(seed=7)}),
    "dpo-evaluation": Case(
        DPO, pairs, {"eval_strategy": "steps", "eval_steps": 1}, lambda: {"ref_model": llama(seed=7), "eval_dataset": pairs(8)}
    ),
    "dpo-lora": Case(DPO, pairs, extra=_adapted()),
    "dpo-precomputed": Case(DPO, pairs, {"precompute_ref_log_probs": True}),
    "dpo-mixtral": Case(DPO, pairs, extra=lambda: {"ref_model": mixtral(seed=7)}, model=mixtral, rate=0.3),
    "dpo-bema": Case(_E + "bema_for_ref_model.DPOTrainer", pairs, extra=lambda: {"ref_model": llama(seed=7)}),
    "kto": Case(KTO, judged, model=on_disk, rate=0.4),
    "kto-lora": Case(KTO, judged, extra=_adapted(), rate=0.3),
    "reward": Case("trl.RewardTrainer", pairs, model=reward_model, rate=0.8),
    "reward-centred": Case("trl.RewardTrainer", pairs, {"center_rewards_coefficient": 0.1}, model=reward_model, rate=0.05),
    "reward-lora": Case(
        "trl.RewardTrainer", pairs, extra=lambda: {"peft_config": lora(modules_to_save=["score"])}, model=reward_model, rate=0.3
    ),
    "grpo": Case(GRPO, prompts, _grouped(), _rewarded(), rate=0.4),
    "grpo-reference": Case(GRPO, prompts, _grouped(beta=0.1), _rewarded(), model=on_disk, rate=0.4),
    "grpo-iterations": Case(GRPO, prompts, _grouped(num_iterations=2, steps_per_generation=2), _rewarded(), steps=4, rate=0.4),
    "grpo-checkpointing": Case(GRPO, prompts, _grouped(gradient_checkpointing=True), _rewarded(), rate=0.4),
    "grpo-mixtral": Case(GRPO, prompts, _grouped(), _rewarded(), model=mixtral, rate=0.4),
    "grpo-lora": Case(GRPO, prompts, _grouped(beta=0.1), _adapted(reward_funcs=spread_reward), rate=0.3),
    "rloo": Case(RLOO, prompts, _grouped(), _rewarded(), model=on_disk, rate=0.01),
    "distillation": Case("trl.DistillationTrainer", prompts, _generating(), _taught(), rate=0.5),
    "distillation-mixed": Case("trl.DistillationTrainer", prompts, _generating(beta=0.5), _taught(), rate=2.0),
    "cpo": Case(_E + "cpo.CPOTrainer", pairs, {"max_length": 32}),
    "cpo-simpo": Case(_E + "cpo.CPOTrainer", pairs, {"max_length": 32, "loss_type": "simpo", "cpo_alpha": 0.5}),
    "orpo": Case(_E + "orpo.ORPOTrainer", pairs, {"max_length": 32}),
    "tpo": Case(_E + "tpo.TPOTrainer", triples),
    "gkd": Case(_E + "gkd.GKDTrainer", chats, {"max_new_tokens": 12, "lmbda": 0.5, "max_length": 32}, _taught(), rate=2.0),
    "gold": Case(
        _E + "gold.GOLDTrainer",
        short_chats,
        _generating(lmbda=0.5, max_length=40),
        _taught(processing_class=byte_tokenizer),
        rate=2.0,
    ),
    "gold-uld": Case(
        _E + "gold.GOLDTrainer",
        short_chats,
        _generating(lmbda=0.5, max_length=40, use_uld_loss=True),
        _taught(lambda seed: on_disk(seed, byte_tokenizer), processing_class=byte_tokenizer),
        rate=1.0,
    ),
    "iw-opd": Case(_E + "iw_opd.IWOPDTrainer", chats, _generating(max_length=40), _taught(on_disk), rate=0.4),
    "online-dpo": Case(_E + "online_dpo.OnlineDPOTrainer", prompts, _ONLINE, _rewarded(), rate=0.3),
    "online-dpo-lora": Case(_E + "online_dpo.OnlineDPOTrainer", prompts, _ONLINE, _adapted(reward_funcs=spread_reward), rate=0.2),
    "a2po": Case(_E + "a2po.A2POTrainer", prompts, _generating(num_value_samples=2), lambda: {"reward_funcs": even_reward}, rate=10.0),
    "gmpo": Case(_E + "gmpo.GMPOTrainer", prompts, _grouped(), _rewarded(), rate=0.4),
    "sdft": Case(_E + "sdft.SDFTTrainer", asked, _grouped(teacher_model_kind="live", distillation_topk=8), rate=5.0),
    "sdft-moving": Case(
        _E + "sdft.SDFTTrainer",
        asked,
        _grouped(teacher_model_kind="ema", teacher_update_rate=0.5, teacher_sync_steps=1, distillation_topk=8),
        model=on_disk,
        rate=5.0,
    ),
    "sdft-lora": Case(
        _E + "sdft.SDFTTrainer", asked, _grouped(teacher_model_kind="base", distillation_mode="full_logits"), _adapted(), rate=1.0
    ),
    "sdpo": Case(_E + "sdpo.SDPOTrainer", asked, _grouped(teacher_model_kind="live"), _rewarded(), rate=1.0),
}


# -- runs


class CutGradient(TrainerCallback):
    """What streaming in chunks would do that did not hand back the gradient of the first chunk's keys and values: a wrong twin."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parts = [module for name, module in model.named_modules() if name.endswith(("self_attn.k_proj", "self_attn.v_proj"))]
        self.hooks = [part.register_forward_hook(self._cut) for part in parts]

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _cut(module, args, output):
        return torch.cat([output[:, :CHUNK].detach(), output[:, CHUNK:]], 1) if torch.is_grad_enabled() else output


@dataclass
class TrlRun:
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    logs: list[dict[str, float]]
    layers: LayerRuns

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logs if "loss" in entry]

    def distance(self, other: "TrlRun") -> float:
        """Of the parameters at the end, as a part of what the other run changed them by."""
        return _norm(self.end, other.end) / _norm(other.end, other.start)


def _norm(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return torch.stack([(one[name].double() - other[name].double()).norm() for name in one]).norm().item()


def _trained(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Of a clock, of the optimizer, or of memory: not of the model.
_TIMES = ("runtime", "per_second", "step_time", "total_flos", "learning_rate", "epoch", "memory", "bytes", "seconds")


def _numbers(entry: dict) -> dict[str, float]:
    return {k: float(v) for k, v in entry.items() if isinstance(v, int | float) and not any(part in k for part in _TIMES)}


def run(name: str, trainer_class=None, arguments_class=None, callbacks=(), seed: int = 3, model=None, **settings) -> TrlRun:
    """Train a case: plain SGD without clipping, so that what a parameter changes by is its gradient."""
    case = CASES[name]
    extra = case.extra()
    model = case.model() if model is None else model
    fixed = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 11}
    fixed |= {"lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "logging_steps": 1}
    fixed |= {"learning_rate": case.rate, "max_steps": case.steps, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    args = (arguments_class or case.arguments_class)(output_dir=_FOLDER.name, **(fixed | case.settings | settings))
    given = {"train_dataset": case.rows(seed), "processing_class": tokenizer(), "callbacks": list(callbacks)} | extra
    trainer = (trainer_class or case.trainer_class)(model=model, args=args, **given)
    layers = LayerRuns()
    layers.watch(trainer.model)
    start = _trained(trainer.model)
    trainer.train()
    logs = [_numbers(entry) for entry in trainer.state.log_history]
    return TrlRun(start, _trained(trainer.model), logs, layers)


@cache
def plain(name: str) -> TrlRun:
    """A case under trl alone."""
    return run(name)


def with_callback(name: str, callback: TrainerCallback | None = None, **kwargs) -> TrlRun:
    """trl's trainer as it is, and a callback: streaming, unless another is given."""
    return run(name, callbacks=[callback or hf_memtune.StreamingCallback(sequence_chunk_size=CHUNK)], **kwargs)


def with_mixin(name: str, **settings) -> TrlRun:
    """trl's trainer and its arguments with the mixins above them: streaming, unless set otherwise."""
    case = CASES[name]
    return run(name, *mixed(case.trainer_class, case.arguments_class), **({"sequence_chunk_size": CHUNK} | settings))


@cache
def mixed(trainer_class: type, arguments_class: type) -> tuple[type, type]:
    """`class Mine(MemEfficientMixin, DPOTrainer)`, and the same of its arguments, which a checkpoint pickles by their name."""
    ours = type(f"Efficient{trainer_class.__name__}", (hf_memtune.MemEfficientMixin, trainer_class), {"__module__": __name__})
    bases = (hf_memtune.MemEfficientArgumentsMixin, arguments_class)
    args = make_dataclass(f"Efficient{arguments_class.__name__}", [], bases=bases, namespace={"__module__": __name__})
    globals()[args.__name__] = args
    return ours, args


OURS = {"callback": with_callback, "mixin": with_mixin}
