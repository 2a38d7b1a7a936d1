"""The callbacks: what they install, what they measure, what they draw, and that none of them changes a run."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, Trainer, TrainerCallback

from hf_memtune import (
    ConfigError,
    LiveBytes,
    MemoryCallback,
    StreamingCallback,
    TokenMapCallback,
    TokenSeeking,
    TokenSeekingCallback,
    TokenSeekingConfig,
)
from hf_memtune.core.selection import Selection, budget
from hf_memtune.training.token_maps import token_maps
from tests.support.runs import SEEKING, arguments, llama, pad_right, same_parameters, text_rows, train, trainer_for
from tests.support.tiny_models import tiny_model

ROWS = text_rows(24)
CONFIG = TokenSeekingConfig(**SEEKING)
ORDER = {"train_sampling_strategy": "sequential"}


def registered():
    return [name for name in AttentionInterface._global_mapping if name.startswith("hf_memtune")]


# -- token seeking -----------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """What is registered at each event of a run."""

    def __init__(self):
        self.seen = {}

    def on_step_begin(self, *args, **kwargs):
        self.seen["step"] = registered()

    def on_train_end(self, *args, **kwargs):
        self.seen["end"] = registered()


def test_seeking_is_installed_for_the_time_of_training(tmp_path):
    callback, watch = TokenSeekingCallback(CONFIG), Watch()
    before = registered()  # of whatever ran before in this process
    assert callback.method is None
    train(llama(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer, callbacks=[callback, watch])
    assert len(set(watch.seen["step"]) - set(before)) == 1
    assert not set(watch.seen["end"]) - set(before)
    assert callback.method is None and not set(registered()) - set(before)
    callback.remove()  # may be called again


def test_a_scoring_pass_needs_a_trainer():
    with pytest.raises(ConfigError, match="without a trainer"):
        TokenSeekingCallback(TokenSeekingConfig(token_seeking=True, seek_schedule="epoch"))


def test_a_callback_whose_method_is_off_is_refused_where_it_is_made():
    with pytest.raises(ConfigError, match="token_seeking: got False, expected True"):
        TokenSeekingCallback(TokenSeekingConfig(token_gradient="stream"))
    with pytest.raises(ConfigError, match="sequence_chunk_size: got None, expected the tokens of a chunk"):
        StreamingCallback()
    assert StreamingCallback(sequence_chunk_size=4).config.streams and TokenSeekingCallback(token_ratio=0.5).config.token_seeking


def test_any_trainer_seeks_with_the_callback(tmp_path):
    """No class of ours but that."""
    callback = TokenSeekingCallback(**SEEKING)
    theirs = train(llama(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer, callbacks=[callback])
    ours = train(llama(), arguments(tmp_path), ROWS)
    assert same_parameters(theirs, ours) and theirs.losses == ours.losses
    assert torch.equal(callback.last_selection.index, ours.trainer.last_selection.index)
    assert not same_parameters(theirs, train(llama(), arguments(tmp_path, seeking=False), ROWS, cls=Trainer))


@pytest.mark.parametrize("make", [partial(StreamingCallback, sequence_chunk_size=4), TokenSeekingCallback], ids=["streaming", "seeking"])
def test_a_callback_refuses_what_its_method_does_not_support(tmp_path, make):
    """Any Trainer may be given it, with arguments that know nothing of it."""
    model, callback = llama(), make()
    with pytest.raises(ConfigError, match="neftune_noise_alpha: got 5.0 with .*which does not support it"):
        train(model, arguments(tmp_path, seeking=False, neftune_noise_alpha=5.0), ROWS, cls=Trainer, callbacks=[callback])
    assert callback.method is None and all("forward" not in vars(module) for module in model.modules())
    args = arguments(tmp_path, seeking=False)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs in one process"):
        callback.on_train_begin(args, None, None, model=model)


def test_last_selection_is_what_the_last_step_kept(tmp_path):
    run = train(llama(), arguments(tmp_path, max_steps=3, **ORDER), ROWS)
    selection = run.trainer.last_selection
    assert type(selection) is Selection
    assert selection.counts == tuple(budget(len(row["input_ids"]), 0.35) for row in ROWS[16:])
    pairs = [row | {"labels": row["input_ids"]} for row in ROWS]
    both = train(tiny_model("bart", "seq2seq"), arguments(tmp_path), pairs).trainer.last_selection
    assert {name: type(value) for name, value in both.items()} == {"encoder": Selection, "decoder": Selection}
    assert (
        train(llama(), arguments(tmp_path, token_seeking=False, token_ratio=0.1, context_normalize="sum"), ROWS).trainer.last_selection
        is None
    )


def test_a_scorer_sees_what_is_documented(tmp_path):
    seen = []

    def nosy(context):
        rows, length = context.attention_mask.shape
        shapes = {
            name: tuple(getattr(context, name).shape) for name in ("input_ids", "labels", "context_score", "gradient_score", "token_loss")
        }
        assert set(shapes.values()) == {(rows, length)}
        assert context.last_hidden_state.shape == (rows, length, 32)
        assert context.attention_mask.dtype == torch.bool and context.input_ids.dtype == torch.int64
        assert (context.token_loss[:, :-1][context.labels[:, 1:] == -100] == 0).all()
        assert context.context_score.dtype == context.gradient_score.dtype == context.token_loss.dtype == torch.float32
        assert not torch.is_grad_enabled()
        seen.append(length)
        return context.token_loss

    own = train(llama(), arguments(tmp_path, token_scorer=None), ROWS, token_scorer=nosy)
    named = train(llama(), arguments(tmp_path, token_scorer="loss", context_normalize="sum"), ROWS)
    assert len(seen) == 2 and same_parameters(own, named)


# -- memory ------------------------------------------------------------------------------------------------------------

KEYS = {"peak_memory_bytes", "resident_bytes", "step_seconds"}


class Around(TrainerCallback):
    """An independent trace of every step."""

    def __init__(self):
        self.peaks = []

    def on_step_begin(self, *args, **kwargs):
        self.live = LiveBytes()
        self.live.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.live.__exit__(None, None, None)
        self.peaks.append(self.live.peak_bytes)


@pytest.mark.parametrize("pool, warns", [("all", True), ("labels", False)])
def test_learning_from_nothing_is_not_silent(tmp_path, caplog, pool, warns):
    """Prompts that take the whole budget leave a loss of 0 and no gradient."""
    rows = [{**row, "labels": [-100] * (len(row["input_ids"]) - 1) + row["input_ids"][-1:]} for row in ROWS]

    def first(seen):
        return -torch.arange(seen.input_ids.shape[1]).expand(seen.input_ids.shape).float()

    settings = {"max_steps": 2, "logging_steps": 2, "select_from": pool, "token_ratio": 0.1, "token_scorer": None}
    trainer = trainer_for(llama(), arguments(tmp_path, **settings), rows, token_scorer=first)
    trainer.train()
    (entry, *_) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert (entry["tokens_learned"] == 0) == warns
    assert ("no kept token carried a label" in caplog.text) == warns


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logged_peak_is_that_of_the_traced_step(tmp_path, accumulation):
    around = Around()
    settings = {"max_steps": 5, "memory_trace_steps": 3, "gradient_accumulation_steps": accumulation, **ORDER}
    # before the trainer's own callbacks, and so around them: the first mode entered has to be the last one left
    trainer = trainer_for(llama(), arguments(tmp_path, **settings), text_rows(5 * 8 * accumulation))
    trainer.callback_handler.callbacks.insert(0, around)
    around.on_step_end, leave = lambda *args, **kwargs: None, around.on_step_end
    trainer.add_callback(type("Leave", (TrainerCallback,), {"on_step_end": staticmethod(leave)})())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "peak_memory_bytes" not in logs[0]  # nothing is traced yet
    assert [entry["peak_memory_bytes"] for entry in logs[1:]] == [around.peaks[1]] * 3 + [around.peaks[4]]
    assert around.peaks[1] != around.peaks[4]


def test_what_others_do_at_the_end_of_a_step_is_not_measured_as_the_step(tmp_path, monkeypatch):
    """Scores on tasks and drawings are made there, and may take longer, and more memory, than the step."""
    clock = [0.0]
    monkeypatch.setattr("hf_memtune.training.memory_callback.time", SimpleNamespace(perf_counter=lambda: clock[0]))

    class Works(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock[0] += 60.0
            torch.zeros(2**24)

    def measured(*callbacks):
        settings = {"max_steps": 2, "memory_trace_steps": 1, "memory_preflight": False, "memory_report": True, **ORDER}
        trainer = train(llama(), arguments(tmp_path, **settings), ROWS, callbacks=list(callbacks)).trainer
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        seconds, peaks = ([entry[name] for entry in logs] for name in ("step_seconds", "peak_memory_bytes"))
        return seconds, peaks, trainer.report_callback.report.measured.peak_bytes

    assert measured(Works()) == measured() and clock[0] == 120.0


def test_logs_count_the_tokens(tmp_path):
    run = train(llama(), arguments(tmp_path, max_steps=3, memory_trace_steps=1, logging_steps=2, **ORDER), ROWS)
    (entry, *_) = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    lengths = [len(row["input_ids"]) for row in ROWS[:16]]
    assert entry["tokens_seen"] == sum(lengths)
    assert entry["tokens_kept"] == sum(budget(length, 0.35) for length in lengths)
    assert 0 < entry["tokens_learned"] <= entry["tokens_kept"]
    assert entry.keys() >= KEYS
    assert entry["resident_bytes"] > 2**26 and entry["step_seconds"] > 0


def test_a_plain_trainer_logs_memory_too(tmp_path):
    callback = MemoryCallback(trace_steps=2)
    args = arguments(tmp_path, seeking=False, max_steps=3)
    run = train(llama(), args, ROWS, cls=Trainer, callbacks=[callback])
    logs = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert all(entry.keys() >= KEYS - {"peak_memory_bytes"} for entry in logs)
    assert logs[1]["peak_memory_bytes"] > 0 and "tokens_kept" not in logs[1]
    unmeasured = train(llama(), args, ROWS, cls=Trainer)
    assert same_parameters(run, unmeasured)


def test_fewer_tokens_take_less_memory(tmp_path):
    rows = text_rows(8, shortest=60, longest=60)

    def peak(**settings):
        run = train(llama(), arguments(tmp_path, memory_trace_steps=1, max_steps=1, **settings), rows)
        return next(e["peak_memory_bytes"] for e in run.trainer.state.log_history if "loss" in e)

    off = {"token_seeking": False, "token_ratio": 0.1, "context_normalize": "sum"}
    assert peak(token_ratio=0.1) < 0.6 * peak(**off)


class Draws(TrainerCallback):
    """What a callback does that changes a run."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.rand(1)


def test_tracing_does_not_change_a_run(tmp_path):
    """Of a model with dropout, whose masks any number that is drawn would change."""

    def run(traced, *callbacks):
        model = llama(attention_dropout=0.2)
        return train(model, arguments(tmp_path, memory_trace_steps=traced), ROWS, callbacks=list(callbacks))

    traced, untraced = run(1), run(0)
    assert same_parameters(traced, untraced)
    assert not same_parameters(run(0, Draws()), untraced)


def test_logging_outside_training_works(tmp_path):
    trainer = trainer_for(llama(), arguments(tmp_path), ROWS)
    trainer.log({"loss": 1.0})
    assert trainer.state.log_history[-1]["resident_bytes"] > 0


# -- token maps --------------------------------------------------------------------------------------------------------


class Words:
    """The least a tokenizer must do here."""

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def dropping():
    """A model with dropout, so that a changed generator shows in the parameters."""
    model = tiny_model("gpt2", dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize("scorer", [{"token_scorer": "combined"}, {"token_scorer": "random"}])
def test_maps_are_written_and_training_draws_the_same(tmp_path, scorer):
    config = TokenSeekingConfig(token_seeking=True, token_ratio=0.35, **scorer)
    settings = {"max_steps": 5, "context_normalize": "sum", **scorer}

    def run(folder, *callbacks):
        torch.manual_seed(5)
        return train(dropping(), arguments(tmp_path / folder, **settings), ROWS, callbacks=callbacks, processing_class=Words())

    drawn = run("drawn", TokenMapCallback(ROWS[:2], pad_right, config, every_n_steps=2))
    pages = sorted((tmp_path / "drawn/token_maps").iterdir())
    assert [page.name for page in pages] == [f"step-{n:06d}.html" for n in (0, 2, 4)]
    assert "w" + str(ROWS[0]["input_ids"][0]) in pages[1].read_text()
    assert "What decided here" in pages[1].read_text() and f"<dd>{config.token_scorer}</dd>" in pages[1].read_text()
    assert "chance p" in pages[1].read_text()
    assert same_parameters(drawn, run("plain"))


class Masking:
    """A collator that draws from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, rows):
        torch.rand((), generator=self.generator)
        return pad_right(rows)


def test_maps_draw_nothing_from_the_collator_of_training(tmp_path):
    states = []
    for draws in (True, False):
        collator = Masking()
        maps = [TokenMapCallback(ROWS[:2], collator, CONFIG)] if draws else []
        train(llama(), arguments(tmp_path), ROWS, callbacks=maps, processing_class=Words(), data_collator=collator)
        states.append(collator.generator.get_state())
    assert torch.equal(*states)


def test_maps_show_the_scores_of_a_function(tmp_path):
    def by_position(seen):
        return torch.arange(seen.attention_mask.shape[1]).expand(seen.attention_mask.shape)

    folder = tmp_path / "elsewhere"
    maps = TokenMapCallback(ROWS[:1], pad_right, CONFIG, every_n_steps=9, folder=str(folder), scorer=by_position)
    train(llama(), arguments(tmp_path, token_scorer=None), ROWS, callbacks=[maps], processing_class=Words(), token_scorer=by_position)
    (page,) = folder.iterdir()
    assert "by_position" in page.read_text() and "this score decided" in page.read_text()
    assert ("No token has a probability" in page.read_text()) is (CONFIG.token_selection == "top")


@pytest.mark.parametrize("settings", [{"token_selection": "sample"}, {"token_selection": "top"}, {"token_selection": "labelled"}], ids=str)
def test_the_weights_of_a_map_are_those_of_the_step(settings):
    """With token_weight=dft the probability of its label is a part of a token's weight."""
    model, batch = llama(), pad_right(ROWS[:3])
    shown_weights = {}
    for weight in ("none", "dft"):
        config = TokenSeekingConfig(
            token_seeking=True, token_ratio=0.35, token_scorer="loss", token_weight=weight, weight_cap=1.5, **settings
        )
        torch.manual_seed(3)
        with TokenSeeking(model, config, looks_only=True) as seeking:
            kept = seeking.inspect(batch).selection["decoder"]
        torch.manual_seed(3)
        maps = token_maps(model, batch, config, Words())
        used = torch.ones_like(kept.index, dtype=torch.float32) if kept.weight is None else kept.weight
        shown_weights[weight] = [shown.weight_of(i) for shown in maps for i, flag in enumerate(shown.kept) if flag]
        assert shown_weights[weight] == pytest.approx(used[kept.valid].tolist(), rel=1e-4)
    assert shown_weights["none"] != pytest.approx(shown_weights["dft"], rel=1e-2)  # the sibling


def test_maps_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="processing_class"):
        train(llama(), arguments(tmp_path), ROWS, callbacks=[TokenMapCallback(ROWS[:1], pad_right, CONFIG)])
