"""With sequence_chunk_size a run is plain training: the gradients, losses and weights of transformers' Trainer with the same arguments."""

import gc
import weakref
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from hf_memtune import (
    ConfigError,
    MemEfficientArgumentsMixin,
    MemEfficientMixin,
    MemEfficientTrainer,
    MemEfficientTrainingArguments,
    StreamingCallback,
)
from hf_memtune.core.owed import OwedSums
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.levers.table import lever_of
from hf_memtune.methods import verify
from hf_memtune.methods.streaming.chunk_stream import ChunkStream
from hf_memtune.training.launch import problems_of_launch
from tests.support.accumulation import LOGGED
from tests.support.all_tokens import assert_equal_runs, pad_pairs, shifting_loss
from tests.support.checkpointing import adapted, worst_difference_of_all
from tests.support.runs import LayerRuns, arguments, exact_model, llama, same_parameters, text_rows, train, trainer_for, worst_step
from tests.support.tiny_models import tiny_model
from tests.support.tolerances import FLOAT32_INSIDE, NOTICED, RELATIVE
from tests.support.twin import shifted, worst_difference

EXACT = RELATIVE[torch.float64]
ROWS = text_rows(24)
CLASSES = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(ROWS)]
PAIRS = [{"input_ids": a["input_ids"], "target": b["input_ids"]} for a, b in zip(ROWS, text_rows(24, seed=4))]
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
    monkeypatch.setattr(OwedSums, "add", lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="another gradient in chunks"):
        stream(tmp_path, exact_model())
    monkeypatch.setattr(verify, "verify_stream", lambda *_: None)
    assert worst_step(stream(tmp_path, exact_model()), expected) > NOTICED


def test_a_chunk_longer_than_the_row_is_plain_training(tmp_path):
    assert_equal_runs(stream(tmp_path, exact_model(), chunk=16), plain(tmp_path, exact_model()))


@pytest.mark.parametrize("cut", ["2x4", "1x8"])
def test_every_cut_of_a_batch_gives_the_same_gradients(tmp_path, cut):
    whole, pieces = (stream(tmp_path, exact_model(), settings=how) for how in ({}, CUTS[cut]))
    assert worst_step(pieces, whole) <= EXACT
    assert pieces.losses == pytest.approx(whole.losses, rel=LOGGED)


def test_a_mean_of_means_is_noticed(tmp_path):
    """Sibling: a model that ignores the count of the accumulated batch divides each micro-batch by its own."""
    whole, pieces = stream(tmp_path, exact_model()), stream(tmp_path, taking_no_count(), settings=CUTS["2x4"])
    assert worst_step(pieces, whole) > NOTICED


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
    settings = CUTS[cut] | {"remove_unused_columns": False, "label_smoothing_factor": smoothing}
    assert_equal_runs(*both(tmp_path, partial(tiny_model, "bart"), PAIRS, settings=settings, data_collator=pad_pairs))


def test_a_loss_that_takes_no_notice_of_the_count_stays_as_it_is(tmp_path):
    """BART's own: transformers adds up four means, and not their mean."""
    settings = {"remove_unused_columns": False}
    bart = partial(stream, tmp_path, rows=PAIRS, data_collator=pad_pairs)
    whole, pieces = (bart(tiny_model("bart"), settings=settings | CUTS[cut]) for cut in ("8x1", "2x4"))
    assert worst_step(pieces, whole) > NOTICED
    assert pieces.losses[0] > 3.9 * whole.losses[0]


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
    assert found == pytest.approx(wanted, rel=FLOAT32_INSIDE) and len(found) == 2  # with the same weights; taken without logits
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
    assert run.trainer.method_callback.method is None
    assert all("forward" not in vars(module) for module in run.trainer.model.modules())
    entry = next(entry for entry in run.trainer.state.log_history if "loss" in entry)
    assert entry["tokens_seen"] > 0 and "tokens_kept" not in entry


CALLBACK_ALONE = {
    "tokens": (exact_model, ROWS, {}),
    "smoothed": (exact_model, ROWS, {"label_smoothing_factor": 0.1}),
    "adapted": (partial(adapted, torch.float64), ROWS, {}),
    "not told the count": (taking_no_count, ROWS, {}),
    "rows": (partial(tiny_model, "llama", "sequence_classification"), CLASSES, {}),
    "pairs": (partial(tiny_model, "bart"), PAIRS, {"remove_unused_columns": False}),
}


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
@pytest.mark.parametrize("case", CALLBACK_ALONE)
def test_the_callback_alone_is_enough(tmp_path, case, cut):
    """Under transformers' Trainer and its arguments."""
    make_model, rows, settings = CALLBACK_ALONE[case]
    more = {"settings": CUTS[cut] | settings} | ({"data_collator": pad_pairs} if case == "pairs" else {})
    callback, ours, theirs = StreamingCallback(sequence_chunk_size=CHUNK), LayerRuns(), LayerRuns()
    found = plain(tmp_path, make_model(), rows, callbacks=[callback, ours], **more)
    assert_equal_runs(found, plain(tmp_path, make_model(), rows, callbacks=[theirs], **more))
    assert ours.widest <= CHUNK < theirs.widest
    assert callback.method is None


# -- other trainers of transformers ------------------------------------------------------------------------------------


@dataclass
class EfficientPairsArguments(MemEfficientArgumentsMixin, Seq2SeqTrainingArguments):
    pass


class EfficientPairsTrainer(MemEfficientMixin, Seq2SeqTrainer):
    pass


def sum_of_words(predicted):
    return {"sum": float(predicted.predictions.sum())}


@pytest.mark.parametrize("how", ["callback", "mixin"])
def test_the_trainer_of_pairs(tmp_path, how):
    """It generates in its evaluations, between the steps."""
    settings = CUTS["2x4"] | {"remove_unused_columns": False, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"predict_with_generate": True, "generation_max_length": 8}
    more = {"data_collator": pad_pairs, "eval_dataset": PAIRS[:4], "compute_metrics": sum_of_words}
    args = arguments(tmp_path, False, Seq2SeqTrainingArguments, **settings)
    expected = train(tiny_model("bart"), args, PAIRS, Seq2SeqTrainer, **more)
    layers = LayerRuns()
    if how == "callback":
        callbacks = [layers, StreamingCallback(sequence_chunk_size=CHUNK)]
        ours = train(tiny_model("bart"), args, PAIRS, Seq2SeqTrainer, callbacks=callbacks, **more)
    else:
        args = arguments(tmp_path, False, EfficientPairsArguments, sequence_chunk_size=CHUNK, memory_trace_steps=0, **settings)
        ours = train(tiny_model("bart"), args, PAIRS, EfficientPairsTrainer, callbacks=[layers], **more)
    assert layers.widest == CHUNK
    assert_equal_runs(ours, expected)
    evaluated = [[(e["eval_loss"], e["eval_sum"]) for e in r.trainer.state.log_history if "eval_sum" in e] for r in (ours, expected)]
    assert len(evaluated[0]) == 2
    assert torch.tensor(evaluated[0]).numpy() == pytest.approx(torch.tensor(evaluated[1]).numpy(), rel=FLOAT32_INSIDE)
    other = train(tiny_model("bart"), arguments(tmp_path, False, Seq2SeqTrainingArguments, **settings), PAIRS[8:], Seq2SeqTrainer, **more)
    assert worst_step(ours, other) > NOTICED


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
def test_every_chunk_is_scaled_alike(tmp_path, head, rows):
    make_model = partial(tiny_model, "llama", head, dtype=torch.float32)
    ours = stream(tmp_path, make_model(), rows, cls=OursScaled, settings=CUTS["2x4"])
    expected, unscaled = (plain(tmp_path, make_model(), rows, cls=cls, settings=CUTS["2x4"]) for cls in (PlainScaled, Trainer))
    assert_equal_in_float32(ours, expected)
    assert worst_difference(ours.gradients[0], {n: 1024 * g for n, g in unscaled.gradients[0].items()}) <= RELATIVE[torch.float32]


def test_a_backward_of_ones_own_is_done_as_it_is(tmp_path):
    """As of a trainer that has its own scaling."""

    class OwnBackward:
        def train(self, **kwargs):
            self.accelerator.backward = lambda loss, **kwargs: (3 * loss).backward()
            return super().train(**kwargs)

    ours_class, plain_class = (type("OwnBackwardTrainer", (OwnBackward, cls), {}) for cls in (MemEfficientTrainer, Trainer))
    ours, expected = stream(tmp_path, exact_model(), cls=ours_class), plain(tmp_path, exact_model(), cls=plain_class)
    assert_equal_runs(ours, expected)
    assert worst_step(ours, plain(tmp_path, exact_model())) > NOTICED


# -- refusals ----------------------------------------------------------------------------------------------------------


FSDP1 = {"fsdp": "full_shard", "fsdp_config": {"version": 1}}


@pytest.mark.parametrize("setting", [FSDP1, FSDP1 | {"fsdp": True}, {"torch_compile": True}, {"neftune_noise_alpha": 5.0}])
def test_what_has_not_been_shown_exact_is_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: got .* with sequence_chunk_size"):
        arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK, **setting)
    arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK)


@pytest.mark.parametrize("version, is_refused", [(1, True), (2, False)])
def test_of_fsdp_that_accelerate_was_told_of_the_first_is_refused(tmp_path, version, is_refused):
    trainer = trainer_for(llama(), arguments(tmp_path, False, MemEfficientTrainingArguments, sequence_chunk_size=CHUNK), ROWS)
    trainer.is_fsdp_enabled, plugin = True, SimpleNamespace(fsdp_version=version)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    assert bool(problems_of_launch(trainer, lever_of("sequence_chunk_size"))) == is_refused


@pytest.mark.parametrize("name", ["is_deepspeed_enabled", "is_distributed_loading_by_transformers"])
def test_a_sharded_model_is_refused(tmp_path, name):
    class Sharded(MemEfficientTrainer):
        def _problems_of_method(self, *args):
            setattr(self, name, True)
            return super()._problems_of_method(*args)

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


def test_every_cut_of_a_batch_samples_alike(tmp_path):
    """The same number is drawn for each row, however rows are cut; what `top` does is in test_accumulation."""
    sampling = ORDER | {"token_selection": "sample", "token_scorer": "context", "select_from": "labels"}
    whole, pieces = seek(tmp_path, **sampling), seek(tmp_path, "1x8", **sampling)
    assert worst_step(pieces, whole) <= FLOAT32_INSIDE
    assert pieces.losses == pytest.approx(whole.losses, rel=LOGGED)
    assert worst_step(seek(tmp_path, **sampling, seed=8), whole) > NOTICED


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


# -- what must not go wrong in silence -----------------------------------------------------------------------------------

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


def mean_loss(outputs, labels, num_items_in_batch=None):
    """Takes no notice of the count."""
    return shifting_loss(outputs, labels, num_items_in_batch=labels[..., 1:].ne(-100).sum().clamp_min(1))


@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_a_loss_function_that_takes_means(tmp_path, cut):
    ours, expected = both(tmp_path, exact_model, settings=CUTS[cut], compute_loss_func=mean_loss)
    assert_equal_runs(ours, expected, allowed=EXACT)
    assert worst_step(ours, stream(tmp_path, exact_model(), settings=CUTS[cut], compute_loss_func=shifting_loss)) > NOTICED


@pytest.mark.parametrize("name, value", [("sequence_chunk_size", 3), ("sequence_chunk_size", None), ("token_seeking", True)])
def test_settings_changed_after_the_trainer_was_made_are_an_error(tmp_path, name, value):
    args = arguments(tmp_path, False, MemEfficientTrainingArguments, max_steps=1, sequence_chunk_size=CHUNK)
    trainer = trainer_for(llama(), args, ROWS)
    setattr(trainer.args, name, value)
    with pytest.raises(ConfigError, match="changed since the trainer was made"):
        trainer.train()
    setattr(trainer.args, name, {"sequence_chunk_size": CHUNK, "token_seeking": False}[name])
    trainer.train()


@pytest.mark.parametrize("frozen", [True, False])
def test_calls_are_let_go_of_when_they_have_gone_backward(tmp_path, monkeypatch, frozen):
    """Keys and values of all tokens hang on them."""
    model, alive, made = tiny_model("llama", "sequence_classification"), [], []
    model.score.requires_grad_(not frozen)
    run = ChunkStream.run_forward

    def noting(stream, *args):
        gc.collect()
        alive.append(sum(kept() is not None for kept in made))
        made.append(weakref.ref(stream))
        return run(stream, *args)

    monkeypatch.setattr(ChunkStream, "run_forward", noting)
    stream(tmp_path, model, CLASSES, settings={"max_steps": 4})
    assert len(alive) == 1 + 4 and max(alive) == 0  # with that of the probe
