"""With sequence_chunk_size a run is plain training: the gradients, losses and weights of transformers' Trainer with the same arguments."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Trainer

from hf_memtune import ConfigError, MemEfficientTrainer, MemEfficientTrainingArguments, MemTuneError
from hf_memtune.core.owed import OwedSums
from hf_memtune.training.turns import Turns
from tests.methods.tiny_models import VOCABULARY, tiny_model
from tests.methods.twin import shifted, worst_difference
from tests.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.training.runs import arguments, exact_model, llama, same_parameters, text_rows, train, trainer_for, worst_step
from tests.training.test_accumulation import LOGGED
from tests.training.test_all_tokens import assert_equal_runs, pad_pairs, shifting_loss
from tests.training.test_checkpointing import adapted, worst_difference_of_all
from tests.training.test_subclasses import Direct, Doubled

EXACT = RELATIVE[torch.float64]
ROWS = text_rows(24)
CLASSES = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(ROWS)]
CHUNK = 5  # rows have 5 to 16 tokens: alone they are one to four chunks, together always several
ORDER = {"train_sampling_strategy": "sequential"}
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
CUTS = {
    "8x1": WHOLE,
    "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}
# 12 rows, four micro-batches at a time: the second step has two
RAGGED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1, "max_steps": -1}


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """accelerate collects garbage at the start of every run, which takes longer than the run where all modules are searched."""
    gc.freeze()
    yield
    gc.unfreeze()


def stream(tmp_path, model, rows=ROWS, cls=MemEfficientTrainer, chunk=CHUNK, **kwargs):
    settings = {"max_steps": 2, "sequence_chunk_size": chunk, **kwargs.pop("settings", {})}
    return train(model, arguments(tmp_path / "ours", False, MemEfficientTrainingArguments, **settings), rows, cls, **kwargs)


def plain(tmp_path, model, rows=ROWS, cls=Trainer, **kwargs):
    settings = {"max_steps": 2, **kwargs.pop("settings", {})}
    return train(model, arguments(tmp_path / "plain", False, **settings), rows, cls, **kwargs)


def both(tmp_path, make_model, rows=ROWS, **kwargs):
    """The same run by our Trainer and by transformers'."""
    return stream(tmp_path, make_model(), rows, **kwargs), plain(tmp_path, make_model(), rows, **kwargs)


def assert_equal_in_float32(ours, expected):
    assert worst_step(ours, expected) <= RELATIVE[torch.float32]
    assert ours.losses == pytest.approx(expected.losses, rel=RELATIVE[torch.float32])


def taking_no_count(name="gpt2", head="causal_lm"):
    """A model that is not told how many labels an accumulated batch has: its loss is a mean of means."""
    model = tiny_model(name, head)
    model.accepts_loss_kwargs = False
    return model


def with_dropout(seed=0):
    return tiny_model("gpt2", dtype=torch.float32, seed=seed, resid_pdrop=0.1, embd_pdrop=0.1)


# -- plain training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_lm(tmp_path, name, cut):
    assert_equal_runs(*both(tmp_path, partial(tiny_model, name), settings=CUTS[cut]))


def test_what_later_chunks_owe_is_noticed(tmp_path, monkeypatch):
    """Sibling: without what flows from a chunk into the keys and values of those before it, the comparison fails."""
    expected = plain(tmp_path, exact_model())
    monkeypatch.setattr(OwedSums, "put", lambda *_: None)
    assert worst_step(stream(tmp_path, exact_model()), expected) > NOTICED


def test_a_chunk_longer_than_the_row_is_plain_training(tmp_path):
    assert_equal_runs(stream(tmp_path, exact_model(), chunk=16), plain(tmp_path, exact_model()))


@pytest.mark.parametrize("cut", ["2x4", "1x8"])
def test_every_cut_of_a_batch_gives_the_same_gradients(tmp_path, cut):
    whole, pieces = (stream(tmp_path, exact_model(), settings=how) for how in ({}, CUTS[cut]))
    assert worst_step(pieces, whole) <= EXACT
    assert pieces.losses == pytest.approx(whole.losses, rel=LOGGED)


def test_a_mean_of_means_is_noticed(tmp_path, monkeypatch):
    whole = stream(tmp_path, exact_model())

    def own_mean(self):
        self._processes = 1
        return self.step.loss_tokens * 4

    monkeypatch.setattr(Turns, "_all_tokens", own_mean)
    assert worst_step(stream(tmp_path, exact_model(), settings=CUTS["2x4"]), whole) > NOTICED


@pytest.mark.parametrize("make_model", [exact_model, taking_no_count])
def test_a_shorter_last_accumulation(tmp_path, make_model):
    ours, expected = both(tmp_path, make_model, text_rows(12), settings=RAGGED | ORDER)
    assert len(ours.losses) == 2
    assert_equal_runs(ours, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_model_that_is_not_told_the_count(tmp_path, smoothing):
    settings = CUTS["2x4"] | {"label_smoothing_factor": smoothing}
    ours, expected = both(tmp_path, taking_no_count, settings=settings)
    assert not ours.trainer.model_accepts_loss_kwargs
    assert_equal_runs(ours, expected)
    assert worst_step(ours, stream(tmp_path, exact_model(), settings=settings)) > NOTICED  # one mean is another loss


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_label_smoothing(tmp_path, cut):
    ours, expected = both(tmp_path, exact_model, settings=CUTS[cut] | {"label_smoothing_factor": 0.1})
    assert_equal_runs(ours, expected)
    assert worst_step(ours, stream(tmp_path, exact_model(), settings=CUTS[cut])) > NOTICED


@pytest.mark.parametrize("make_model", [exact_model, taking_no_count])
@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_a_loss_function_of_the_users_own(tmp_path, cut, make_model):
    ours, expected = both(tmp_path, make_model, settings=CUTS[cut], compute_loss_func=shifting_loss)
    assert_equal_runs(ours, expected, allowed=EXACT)
    assert worst_step(ours, stream(tmp_path, make_model(), settings=CUTS[cut])) > NOTICED


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_clipping_and_adam(tmp_path, cut):
    settings = CUTS[cut] | {"max_grad_norm": 0.1, "optim": "adamw_torch", "learning_rate": 1e-3}
    ours, expected = both(tmp_path, exact_model, settings=settings)
    assert_equal_runs(ours, expected)
    norms = [[entry["grad_norm"] for entry in run.trainer.state.log_history if "grad_norm" in entry] for run in (ours, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=FLOAT32_INSIDE) and min(norms[0]) > 0.1


@pytest.mark.parametrize("cut, smoothing", [("8x1", 0.0), ("2x4", 0.0), ("2x4", 0.1)])
@pytest.mark.parametrize("make_model", [tiny_model, taking_no_count])
def test_sequence_classification(tmp_path, make_model, cut, smoothing):
    settings = CUTS[cut] | {"label_smoothing_factor": smoothing}
    ours, expected = both(tmp_path, partial(make_model, "llama", "sequence_classification"), CLASSES, settings=settings)
    assert_equal_runs(ours, expected, allowed=EXACT)


def test_classification_by_other_labels_is_noticed(tmp_path):
    other = [row | {"labels": (row["labels"] + 1) % 3} for row in CLASSES]
    ours, expected = (stream(tmp_path, tiny_model("llama", "sequence_classification"), rows) for rows in (other, CLASSES))
    assert worst_step(ours, expected) > NOTICED


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sequence_to_sequence(tmp_path, smoothing, cut):
    rows = [{"input_ids": a["input_ids"], "target": b["input_ids"]} for a, b in zip(ROWS, text_rows(24, seed=4))]
    settings = CUTS[cut] | {"remove_unused_columns": False, "label_smoothing_factor": smoothing}
    ours, expected = both(tmp_path, partial(tiny_model, "bart"), rows, settings=settings, data_collator=pad_pairs)
    if smoothing or cut == "8x1":
        assert_equal_runs(ours, expected)
    else:  # BART's own loss takes no notice of num_items_in_batch: transformers adds up four means, and not their mean
        assert worst_step(ours, expected) > NOTICED
        expected = plain(tmp_path, tiny_model("bart"), rows, settings=settings | WHOLE, data_collator=pad_pairs)
        assert_equal_runs(ours, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make_model", [exact_model, partial(adapted, torch.float64)], ids=["full", "lora"])
def test_adapters_and_activation_checkpointing(tmp_path, make_model, checkpointing):
    ours, expected = both(tmp_path, make_model, settings=CUTS["2x4"] | {"activation_checkpointing": checkpointing})
    assert_equal_runs(ours, expected)
    assert ours.gradients[0].keys() == expected.gradients[0].keys()


@pytest.mark.parametrize("make_model", [llama, adapted])
def test_mixed_precision_is_near_to_full(tmp_path, make_model):
    settings = {"max_steps": 1, **CUTS["2x4"]}
    full = plain(tmp_path, make_model(), settings=settings)
    ours, expected = both(tmp_path, make_model, settings=settings | {"bf16": True})
    other = stream(tmp_path, make_model(), text_rows(24, seed=8), settings=settings | {"bf16": True})
    allowed, error = RELATIVE[torch.bfloat16], partial(worst_difference_of_all, expected=full.gradients[0])
    assert 0 < error(ours.gradients[0]) <= allowed < error(other.gradients[0])
    assert error(expected.gradients[0]) <= allowed
    assert ours.losses == pytest.approx(full.losses, rel=allowed) and ours.losses != full.losses


# -- around the steps --------------------------------------------------------------------------------------------------


def test_evaluation_in_between_is_plain_and_changes_nothing(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5}
    ours, expected = both(tmp_path, with_dropout, settings={"learning_rate": 0.0, **evaluated}, eval_dataset=ROWS)
    found, wanted = ([e["eval_loss"] for e in r.trainer.state.log_history if "eval_loss" in e] for r in (ours, expected))
    assert found == wanted and len(found) == 2  # bit for bit, with the same weights
    ours = stream(tmp_path, exact_model(), settings=evaluated, eval_dataset=ROWS)
    without = stream(tmp_path, exact_model())
    assert same_parameters(ours, without) and ours.losses == without.losses


def test_dropout_follows_the_seed(tmp_path):
    twice = [stream(tmp_path, with_dropout()) for _ in range(2)]
    assert same_parameters(*twice)
    assert worst_step(twice[0], stream(tmp_path, with_dropout(), settings={"seed": 7, "data_seed": 42})) > NOTICED


@pytest.mark.parametrize("saved_at", [2, 3])  # in the middle of an epoch of 3 steps, and at its end
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, saved_at):
    settings = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01, **CUTS["2x4"]}
    whole = stream(tmp_path, with_dropout(), settings=settings | {"save_strategy": "steps", "save_steps": saved_at})
    resumed = stream(tmp_path, with_dropout(seed=9), settings=settings, resume=str(tmp_path / f"ours/checkpoint-{saved_at}"))
    assert same_parameters(resumed, whole)
    assert resumed.losses == whole.losses


def test_the_model_is_given_back_as_it_was(tmp_path):
    run = stream(tmp_path, llama())
    assert run.trainer.strategy_callback.strategy is None
    assert all("forward" not in vars(module) for module in run.trainer.model.modules())
    entry = next(entry for entry in run.trainer.state.log_history if "loss" in entry)
    assert entry["tokens_seen"] > 0 and "tokens_kept" not in entry


# -- trainers that people derive ---------------------------------------------------------------------------------------


class Decayed:
    """Adds a term of its own to the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.01 * sum(p.square().sum() for p in model.parameters())


class OursDecayed(Decayed, MemEfficientTrainer):
    pass


class PlainDecayed(Decayed, Trainer):
    pass


def test_a_term_that_a_subclass_adds_is_learned_and_reported(tmp_path):
    ours = stream(tmp_path, exact_model(), cls=OursDecayed, settings=CUTS["2x4"])
    assert_equal_runs(ours, plain(tmp_path, exact_model(), cls=PlainDecayed, settings=CUTS["2x4"]))
    without = stream(tmp_path, exact_model(), settings=CUTS["2x4"])
    assert worst_step(ours, without) > NOTICED and ours.losses[0] > without.losses[0] + 1


def test_a_loss_multiplied_by_a_subclass_is_an_error(tmp_path):
    with pytest.raises(MemTuneError, match="gradient of 2, expected 1: Doubled.compute_loss multiplies"):
        stream(tmp_path, exact_model(), cls=Doubled)
    whole = stream(tmp_path, exact_model(), cls=Doubled, chunk=16, settings={"max_steps": 1})  # one turn: nothing went before
    expected = plain(tmp_path, exact_model(), settings={"max_steps": 1}).gradients[0]
    assert worst_difference(whole.gradients[0], {name: 2 * gradient for name, gradient in expected.items()}) <= FLOAT32_INSIDE


def test_a_loss_that_goes_past_streaming_is_an_error(tmp_path):
    with pytest.raises(MemTuneError, match="Direct.compute_loss called the model past the strategy that is on"):
        stream(tmp_path, exact_model(), cls=Direct)


class Scaled:
    """Trains as with fp16: losses go backward multiplied by a scale."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


class OursScaled(Scaled, MemEfficientTrainer):
    pass


class PlainScaled(Scaled, Trainer):
    pass


@pytest.mark.parametrize("head, rows", [("causal_lm", ROWS), ("sequence_classification", CLASSES)], ids=["tokens", "rows"])
def test_every_turn_is_scaled_alike(tmp_path, head, rows):
    make_model = partial(tiny_model, "llama", head, dtype=torch.float32)
    ours = stream(tmp_path, make_model(), rows, cls=OursScaled, settings=CUTS["2x4"])
    expected, unscaled = (plain(tmp_path, make_model(), rows, cls=cls, settings=CUTS["2x4"]) for cls in (PlainScaled, Trainer))
    assert_equal_in_float32(ours, expected)
    assert worst_difference(ours.gradients[0], {n: 1024 * g for n, g in unscaled.gradients[0].items()}) <= RELATIVE[torch.float32]


def test_a_turn_that_is_not_scaled_is_an_error(tmp_path):
    class Unscaled(OursScaled):
        def train(self):
            self.accelerator.backward = lambda loss: loss.backward()
            return super().train()

    args = arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK)
    with pytest.raises(MemTuneError, match="gradient of 1, expected 1024"):
        trainer_for(llama(), args, ROWS, Unscaled).train()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"fsdp": "full_shard"}, {"fsdp": True}, {"torch_compile": True}, {"neftune_noise_alpha": 5.0}])
def test_what_has_not_been_shown_exact_is_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: got .* with sequence_chunk_size"):
        arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK, **setting)
    arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK)


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_distributed_loading_by_transformers"])
def test_a_sharded_model_is_refused(tmp_path, name):
    class Sharded(MemEfficientTrainer):
        def _problems(self, *args):
            setattr(self, name, True)
            return super()._problems(*args)

    args = arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK)
    with pytest.raises(ConfigError, match="which sequence_chunk_size does not support"):
        trainer_for(llama(), args, ROWS, Sharded)


# -- token seeking in a stream -----------------------------------------------------------------------------------------


def seek(tmp_path, cut="8x1", cls=MemEfficientTrainer, **settings):
    settings = CUTS[cut] | {"sequence_chunk_size": CHUNK, "token_gradient": "stream", "full_loss_rows": 0, **settings}
    return train(exact_model(), arguments(tmp_path, **settings), ROWS, cls=cls)


def logged(run, name):
    return sum(entry[name] for entry in run.trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("gradient", ["stream", "skip"])
@pytest.mark.parametrize("selection", ["top", "sample"])
def test_what_was_kept_and_run_again_is_logged(tmp_path, gradient, selection):
    run = seek(tmp_path, token_gradient=gradient, token_selection=selection, select_from="labels")
    seen, kept, learned, again = (logged(run, f"tokens_{name}") for name in ("seen", "kept", "learned", "recomputed"))
    assert 0 < learned <= kept < seen
    if gradient == "skip":
        assert learned <= again < seen
    else:
        assert again >= seen  # padding too


def test_every_cut_of_a_batch_seeks_alike(tmp_path):
    whole, pieces = seek(tmp_path), seek(tmp_path, "1x8")
    assert worst_step(pieces, whole) <= EXACT
    assert pieces.losses == pytest.approx(whole.losses, rel=LOGGED)
    assert worst_step(seek(tmp_path, token_ratio=0.5), whole) > NOTICED


def test_skipping_what_owes_nothing_is_exact(tmp_path):
    exact, skipped, coarse = seek(tmp_path, "2x4"), *(seek(tmp_path, "2x4", token_gradient="skip", skip_threshold=t) for t in (0.0, 0.2))
    assert worst_step(skipped, exact) <= EXACT < NOTICED < worst_step(coarse, exact)
    assert logged(coarse, "tokens_recomputed") < logged(skipped, "tokens_recomputed")


class Remembering(MemEfficientTrainer):
    """Keeps the batches of the first step, and the weight that each of their labels was learned with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def training_step(self, model, inputs, *args):
        loss = super().training_step(model, dict(inputs), *args)
        if self.state.global_step == 0:
            chosen = self.last_selection
            zeros = torch.zeros(inputs["input_ids"].shape, dtype=torch.float64)
            self.batches.append((inputs, zeros.scatter(1, chosen.index, chosen.weight.double()) * chosen.kept_mask()))
        return loss


def weighted_gradients(batches, divisor: int):
    """By plain backpropagation: the sum of weighted losses over all batches, divided."""
    model = exact_model()
    for batch, weight in batches:
        logits, target = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, shifted(batch["labels"])
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        ((losses * weight.flatten()).sum() / divisor).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_a_sample_is_divided_by_all_labels(tmp_path, cut):
    run = seek(tmp_path, cut, Remembering, token_selection="sample", select_from="labels")
    batches = run.trainer.batches
    assert len(batches) == CUTS[cut].get("gradient_accumulation_steps", 1)
    labels = sum(int((batch["labels"] != -100).sum()) for batch, _ in batches)  # as transformers counts them for GPT-2
    kept = sum(int((weight > 0).sum()) for _, weight in batches)
    assert worst_difference(run.gradients[0], weighted_gradients(batches, labels)) <= FLOAT32_INSIDE
    assert worst_difference(run.gradients[0], weighted_gradients(batches, kept)) > NOTICED


# -- trl ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, CUTS["2x4"], {"packing": True, "max_length": 32, "per_device_train_batch_size": 2}],
    ids=["plain", "accumulated", "packed"],
)
def test_under_trl(tmp_path, settings):
    ours = pytest.importorskip("tests.training.test_trl")
    words = {f"w{number}": number for number in range(VOCABULARY)}
    backend = ours.tokenizers.Tokenizer(ours.tokenizers.models.WordLevel(words, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2", bos_token="w1")
    settings = {"bf16": False, "max_steps": 2, **ORDER, **settings}

    def sft(args_class, trainer, **streaming):
        args = arguments(tmp_path, False, args_class, **settings, **streaming)
        return train(llama(), args, ours.ROWS, trainer, data_collator=None, processing_class=tokenizer)

    found = sft(ours.Arguments, ours.SeekingSFTTrainer, sequence_chunk_size=CHUNK, memory_trace_steps=0)
    expected = sft(ours.trl.SFTConfig, ours.trl.SFTTrainer)
    assert_equal_in_float32(found, expected)
    assert worst_step(found, plain(tmp_path, llama(seed=1), settings={"max_steps": 2})) > NOTICED


# --- what must not go wrong in silence

UNLABELLED = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]


@pytest.mark.parametrize("settings", [
    {}, {"token_seeking": True, "token_ratio": 0.35, "token_selection": "sample", "sequence_chunk_size": None},
    {"token_seeking": True, "token_ratio": 0.35, "token_selection": "sample", "token_gradient": "stream"},
], ids=["streaming", "sample, cut", "sample, stream"])  # fmt: skip
def test_a_batch_without_any_label_teaches_nothing(tmp_path, settings):
    """Its count of labels is 0, by which nothing may be divided."""
    run, untrained = stream(tmp_path, llama(), UNLABELLED, settings=settings), llama()
    assert all(torch.equal(run.parameters[name], p) for name, p in untrained.named_parameters())
    taught = stream(tmp_path, llama(), ROWS, settings=settings)
    assert not all(torch.equal(taught.parameters[name], p) for name, p in untrained.named_parameters())


def test_a_loss_function_that_takes_means_is_refused(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return shifting_loss(outputs, labels, num_items_in_batch=labels[..., 1:].ne(-100).sum().clamp_min(1))

    with pytest.raises(MemTuneError, match="does not halve when num_items_in_batch doubles"):
        stream(tmp_path, llama(), compute_loss_func=mean)
    stream(tmp_path, llama(), compute_loss_func=shifting_loss)


@pytest.mark.parametrize("name, value", [("sequence_chunk_size", 3), ("sequence_chunk_size", None), ("token_seeking", True)])
def test_settings_changed_after_the_trainer_was_made_are_an_error(tmp_path, name, value):
    args = arguments(tmp_path, False, MemEfficientTrainingArguments, max_steps=1, sequence_chunk_size=CHUNK)
    trainer = trainer_for(llama(), args, ROWS)
    setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match="changed since the trainer was made"):
        trainer.train()
    setattr(trainer.args, name, {"sequence_chunk_size": CHUNK, "token_seeking": False}[name])
    trainer.train()


def test_steps_of_a_frozen_head_are_let_go_of(tmp_path, monkeypatch):
    model, alive = tiny_model("llama", "sequence_classification"), []
    model.score.requires_grad_(False)
    run = Turns.run

    def noting(turns):
        gc.collect()
        alive.append(sum(kept() is not None for kept in noting.steps))
        noting.steps.append(weakref.ref(turns.step))
        return run(turns)

    noting.steps = []
    monkeypatch.setattr(Turns, "run", noting)
    stream(tmp_path, model, CLASSES, settings={"max_steps": 4})
    assert len(alive) >= 4 and max(alive) == 0
