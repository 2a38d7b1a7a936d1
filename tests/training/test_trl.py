"""The mixin on trl's SFTTrainer: the same strategies under its collator, its packing and its logs."""

import pytest
import torch
from datasets import Dataset

from hf_memtune import ConfigError, MemEfficientArgumentsMixin, MemEfficientMixin
from hf_memtune.training.care.recovery import halving
from tests.support.little_memory import MESSAGE, small
from tests.support.runs import SEEKING, Run, arguments, llama, text_rows, train, worst_step
from tests.support.tiny_models import VOCABULARY
from tests.support.tolerances import NOTICED, RELATIVE

trl = pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")

from dataclasses import dataclass  # noqa: E402

from transformers import PreTrainedTokenizerFast  # noqa: E402


@dataclass
class Arguments(MemEfficientArgumentsMixin, trl.SFTConfig):
    pass


class SeekingSFTTrainer(MemEfficientMixin, trl.SFTTrainer):
    pass


ROWS = Dataset.from_list(text_rows(16))


@pytest.fixture(scope="module")
def tokenizer():
    """One word for each id of the tiny models."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    model = tokenizers.models.WordLevel(words, unk_token="w3")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), pad_token="w0", eos_token="w2", bos_token="w1")


def sft(tmp_path, tokenizer, rows=ROWS, cls=SeekingSFTTrainer, seeking=True, model=None, **settings):
    args_class = Arguments if seeking else trl.SFTConfig
    extra = (SEEKING | {"memory_trace_steps": 1} if seeking else {}) | {"bf16": False}
    args = arguments(tmp_path, seeking=False, cls=args_class, **(extra | settings))
    model = llama() if model is None else model
    return train(model, args, rows, cls=cls, data_collator=None, processing_class=tokenizer, eval_dataset=rows.select(range(4)))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_token_is_plain_sft(tmp_path, tokenizer, accumulation):
    cut = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    ours = sft(tmp_path, tokenizer, token_ratio=1.0, **cut)
    plain = sft(tmp_path, tokenizer, seeking=False, cls=trl.SFTTrainer, **cut)
    assert worst_step(ours, plain) <= RELATIVE[torch.float32]
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.trainer.evaluate()["eval_loss"] == pytest.approx(plain.trainer.evaluate()["eval_loss"], rel=1e-5)


def test_a_third_of_the_tokens_trains_evaluates_and_logs(tmp_path, tokenizer):
    run = sft(tmp_path, tokenizer, eval_strategy="steps", eval_steps=3, max_steps=6)
    logs = run.trainer.state.log_history
    first, last = [entry["eval_loss"] for entry in logs if "eval_loss" in entry]
    assert len(run.losses) == 6 and last < first
    entry = next(entry for entry in logs if "loss" in entry)
    assert 0.3 < entry["tokens_kept"] / entry["tokens_seen"] < 0.5
    assert entry["peak_memory_bytes"] > 0
    assert run.trainer.last_selection.width < 16
    assert run.trainer.method_callback.method is None


def losses_of_tokens(outputs, labels, num_items_in_batch=None):
    """trl's own loss, which it takes of the logits of all tokens."""
    shifted = labels[:, 1:].flatten()
    losses = -outputs.logits[:, :-1].flatten(0, 1).log_softmax(-1).gather(1, shifted.clamp_min(0)[:, None])[:, 0]
    return losses[shifted != -100].sum() / num_items_in_batch


def test_it_learns_as_under_the_plain_trainer(tmp_path, tokenizer):
    under_sft = sft(tmp_path, tokenizer)
    under_ours = train(llama(), arguments(tmp_path), list(ROWS), compute_loss_func=losses_of_tokens)
    assert worst_step(under_sft, under_ours) <= RELATIVE[torch.float32]
    assert under_sft.losses == pytest.approx(under_ours.losses, rel=1e-5)
    # the loss of the model itself is the mean of the kept tokens
    assert worst_step(under_sft, train(llama(), arguments(tmp_path), list(ROWS))) > NOTICED


def test_conversations_of_text(tmp_path, tokenizer):
    """From prompt and completion to labels by trl itself."""
    pairs = [{"prompt": "w7 w8 w9 ", "completion": " ".join(f"w{10 + (n * 3 + k) % 40}" for k in range(8))} for n in range(16)]
    rows = Dataset.from_list(pairs)
    among_labels = sft(tmp_path, tokenizer, rows=rows, select_from="labels")
    nearly_all = sft(tmp_path, tokenizer, rows=rows, token_ratio=0.99)
    logs = [run.trainer.state.log_history[0] for run in (among_labels, nearly_all)]
    assert logs[0]["tokens_learned"] == logs[0]["tokens_kept"] < logs[0]["tokens_seen"]
    assert 0 < logs[1]["tokens_learned"] < logs[1]["tokens_kept"] == logs[1]["tokens_seen"]  # prompts are seen, and not learned
    assert len(among_labels.losses) == 2 and all(loss > 0 for loss in among_labels.losses)


@pytest.mark.parametrize("ratio", [1.0, 0.35])
def test_packed_rows(tmp_path, tokenizer, ratio):
    """Several texts in a row, told apart by positions that begin again: trl gives no mask."""
    packed = {"packing": True, "max_length": 32, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    ours = sft(tmp_path, tokenizer, token_ratio=ratio, **packed)
    plain = sft(tmp_path, tokenizer, seeking=False, cls=trl.SFTTrainer, **packed)
    if ratio == 1.0:
        assert worst_step(ours, plain) <= RELATIVE[torch.float32]
    else:
        assert worst_step(ours, plain) > NOTICED
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5 if ratio == 1.0 else 0.5)


def test_another_loss_of_trl(tmp_path, tokenizer):
    """Seeking changes its gradient, and not its value; what all tokens learn of it in a stream is what they learn without."""
    plain = sft(tmp_path, tokenizer, seeking=False, cls=trl.SFTTrainer, loss_type="dft")
    every = sft(tmp_path, tokenizer, loss_type="dft", token_ratio=1.0, token_gradient="stream", sequence_chunk_size=5)
    assert worst_step(every, plain) <= RELATIVE[torch.float32]
    assert every.losses == pytest.approx(plain.losses, rel=1e-5)
    some = sft(tmp_path, tokenizer, loss_type="dft")
    assert some.losses[0] == pytest.approx(plain.losses[0], rel=1e-5) and worst_step(some, plain) > NOTICED
    assert worst_step(plain, sft(tmp_path, tokenizer, seeking=False, cls=trl.SFTTrainer)) > NOTICED


def test_without_seeking_it_is_plain_sft_bit_for_bit(tmp_path, tokenizer):
    off = {"token_seeking": False, "token_ratio": 0.1, "context_normalize": "sum"}
    ours, plain = sft(tmp_path, tokenizer, **off), sft(tmp_path, tokenizer, seeking=False, cls=trl.SFTTrainer)
    assert ours.losses == plain.losses


def test_reversible_layers_under_sft(tmp_path, tokenizer):
    """trl checkpoints activations unless told otherwise, which is said."""
    settings = {"token_seeking": False, "token_ratio": 0.1, "context_normalize": "sum", "reversible": "centred"}
    ours = sft(tmp_path, tokenizer, gradient_checkpointing=False, adapter_init_std=0.2, **settings)
    assert ours.trainer.reversible_callback.report.is_exact
    assert all("reversible_adapters" in name for name in ours.gradients[0])
    theirs = train(llama(), arguments(tmp_path, adapter_init_std=0.2, **settings), list(ROWS))
    assert ours.gradients[0].keys() == theirs.gradients[0].keys()
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    with pytest.raises(ConfigError, match="gradient_checkpointing.*set it to False"):
        Arguments(str(tmp_path), reversible="centred", report_to=[], bf16=False)


@pytest.mark.parametrize(
    "settings", [{"token_seeking": False, "token_ratio": None, "context_normalize": None}, {}], ids=["plain", "seeking"]
)
def test_a_preflight_leaves_the_counters_of_sft_as_they_were(tmp_path, tokenizer, settings):
    """Tokens seen, entropy and accuracy are summed on the trainer between two logs."""
    flights = {"memory_report": False, "max_steps": 2, **settings}
    runs = [sft(tmp_path, tokenizer, memory_preflight=flies, **flights) for flies in (True, False)]
    names = {"loss", "num_tokens", "entropy", "mean_token_accuracy"}
    counted = [[{k: e[k] for k in e.keys() & names} for e in run.trainer.state.log_history] for run in runs]
    assert runs[0].trainer.preflight.report is not None and counted[0] == counted[1] and counted[0][0]


EVEN = Dataset.from_list(text_rows(16, shortest=8, longest=8, prompts=False))
OFF = {"token_seeking": False, "token_ratio": None, "context_normalize": None, "train_sampling_strategy": "sequential"}
METRICS = ("num_tokens", "entropy", "mean_token_accuracy", "total_flos")


def halved(tmp_path, tokenizer, model=None, **settings) -> Run:
    return sft(tmp_path, tokenizer, rows=EVEN, model=model, max_steps=1, **(OFF | settings))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_failed_is_not_counted(tmp_path, tokenizer, where):
    """Of 8 rows of 8 tokens, 3 fit: 8 and 4 are tried, and a loss is looked at twice, before 2 run at a time."""
    found, whole = (halved(tmp_path, tokenizer, model) for model in (small(llama(), 3, where), llama()))
    counted, expected = ({k: e[k] for e in run.trainer.state.log_history for k in METRICS if k in e} for run in (found, whole))
    assert found.trainer.halving.rows_at_most == 2 and counted["num_tokens"] == 64
    assert counted == pytest.approx(expected, rel=1e-5) and counted.keys() == set(METRICS)


def test_earlier_micro_batches_that_run_again_are_counted_once(tmp_path, tokenizer):
    """The second of two fails. What the loop itself counts of the first one, after its step, stays."""

    def fails_once(model):
        calls = []

        def hook(module, inputs, output):
            calls.append(len(output))
            if len(calls) == 2:
                raise torch.OutOfMemoryError(MESSAGE)

        model.model.layers[0].mlp.register_forward_hook(hook)
        return model

    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found, whole = (halved(tmp_path, tokenizer, model, **sizes) for model in (fails_once(llama()), llama()))
    for name in ("num_tokens", "total_flos"):
        ours, theirs = ([e[name] for e in run.trainer.state.log_history if name in e] for run in (found, whole))
        assert ours == theirs and len(ours) > 0
    assert found.trainer.halving.rows_at_most == 2


def test_counters_that_are_not_taken_back_are_noticed(tmp_path, tokenizer, monkeypatch):
    """Sibling: 8 rows, half of them twice to look at their loss, and half of them once more are counted before 2 run at a time."""
    monkeypatch.setattr(halving, "keep_counters", lambda trainer: lambda: None)
    found = halved(tmp_path, tokenizer, small(llama(), 3, "backward"))
    assert next(e["num_tokens"] for e in found.trainer.state.log_history if "num_tokens" in e) == 64 + 2 * 32 + 32 + 64
