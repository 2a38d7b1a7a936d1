"""Token seeking together with what people train with: adapters, quantised weights, checkpointing, autocast, dropout."""

import copy
from functools import partial

import pytest
import torch

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.memory import SavedBytes
from hf_memtune.methods.attention import passes
from hf_memtune.methods.events import Listener
from tests.support.composition import REENTRANT, checkpointed, whole_error, with_lora
from tests.support.stepping import (
    Ear,
    assert_equal_step,
    has_float32_inside,
    loss_of,
    model_and_batch,
    seeking_on,
    step_on,
    take_step,
    token_twin,
)
from tests.support.tiny_models import batch_for, lm_head
from tests.support.tolerances import NOTICED, RELATIVE, tolerance
from tests.support.twin import ditching, gradients, twin_loss, worst_difference

SPREAD = {"context_normalize": "mean", "gradient_weight": 4.0}


def streaming_on(model, **settings):
    return Streaming(model, StreamingConfig(sequence_chunk_size=4, **settings))


NAMES = ["llama", "gemma2", "mixtral", "gpt2", "opt", "bert", "bart"]


# -- adapters --------------------------------------------------------------------------------------------------------


def lora_twin(model, batch, kept, head="causal_lm"):
    loss = twin_loss(model.get_base_model(), batch, kept, causal_lm=head == "causal_lm")
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "bart"])
def test_lora_alone_learns_and_equals_the_twin(name):
    model, batch, dtype = model_and_batch(name)
    targets = ["c_attn", "c_fc"] if name == "gpt2" else "all-linear"
    model = with_lora(model, targets)
    taken = take_step(model, batch, **SPREAD)
    assert taken.gradients and all("lora_" in parameter for parameter in taken.gradients)
    loss, expected = lora_twin(model, batch, taken.kept, lm_head(name))
    assert_equal_step(taken, loss, expected, dtype, has_float32_inside(name))


def all_tokens_twin(model, batch, kept):
    """The loss of all labels, of a full forward in which everything of unselected tokens is detached from there down."""
    with ditching(model.get_base_model(), kept):
        loss = loss_of(model, batch)[0]
    return loss.detach(), gradients(model, loss)


@pytest.mark.parametrize("scorer", ["combined", "loss"])
def test_lora_around_the_head_equals_the_twin(scorer):
    """The head is no longer one product: it is run for all tokens, and those to go on from there are chosen in backward."""
    model, batch, dtype = model_and_batch("llama")
    model = with_lora(model, ["q_proj", "down_proj", "lm_head"])
    if scorer == "loss":
        batch["labels"][:, :2] = -100
        with pytest.raises(ConfigError, match="labels that the model was given"):
            take_step(model, batch, token_scorer=scorer)
        with seeking_on(model, token_scorer=scorer) as seeking:
            seeking.listeners.add(ear := Ear())
            model(**batch).loss.backward()
        model.zero_grad()
        assert ear.counts["kept"] == ear.counts["learned"] == 9
        return
    taken = take_step(model, batch, **SPREAD)
    assert any("lm_head" in parameter for parameter in taken.gradients)
    loss, expected = all_tokens_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)
    assert worst_difference(taken.gradients, lora_twin(model, batch, taken.kept)[1]) > NOTICED


def test_a_classifier_saved_beside_the_adapters_equals_the_twin():
    """peft trains a copy of the classifier (modules_to_save), in a wrapper of its own."""
    model, batch, dtype = model_and_batch("bert", head="token_classification")
    model = with_lora(model, ["query", "value"], modules_to_save=["classifier"])
    taken = take_step(model, batch, **SPREAD)
    assert any("modules_to_save" in parameter for parameter in taken.gradients)
    loss, expected = all_tokens_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


def test_adapters_of_the_wrong_weights_are_noticed():
    model, batch, dtype = model_and_batch("llama")
    untouched = copy.deepcopy(model)
    taken = take_step(with_lora(model), batch, **SPREAD)
    _, expected = lora_twin(with_lora(untouched, seed=6), batch, taken.kept)
    assert worst_difference(taken.gradients, expected) > NOTICED


# -- quantised weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qlora_equals_the_twin_on_the_same_quantised_weights(quantised_llama, dtype):
    model = quantised_llama(dtype)
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model = with_lora(model)
    batch = batch_for(model)
    taken = take_step(model, batch, **SPREAD)
    assert taken.gradients and all("lora_" in parameter for parameter in taken.gradients)
    loss, expected = lora_twin(model, batch, taken.kept)
    assert abs(taken.loss - loss) <= tolerance(dtype) * loss
    assert whole_error(taken.gradients, expected) <= tolerance(dtype)


def dequantised(model):
    """The same model with plain linears of the values that its 4-bit weights stand for: slow, and obviously differentiable."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype"):
            weight = module.weight
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float32)
            linear.weight = torch.nn.Parameter(dequantize_4bit(weight.data, weight.quant_state).float(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear)
    return plain


@pytest.mark.parametrize("evaluated", [False, True], ids=["fresh", "with an evaluation"])
def test_gradients_pass_through_4bit_weights(quantised_llama, evaluated):
    """Some kernels for 4-bit weights have no derivative, and a twin on the same weights would not notice."""
    model = with_lora(quantised_llama(torch.float32)).eval()  # as peft hands it over
    plain = dequantised(model)
    batch = batch_for(model)
    with seeking_on(model, **SPREAD) as seeking:
        if evaluated:
            with torch.no_grad():
                model.eval()(**batch)
        taken = step_on(model.train(), seeking, batch)
    _, expected = lora_twin(plain.train(), batch, taken.kept)
    assert whole_error(taken.gradients, expected) <= 10 * tolerance(torch.float32)


def test_weights_that_an_evaluation_has_repacked_are_refused(quantised_llama):
    """As bitsandbytes does on CPUs with AVX512-BF16; here on all of them, by what it leaves on a layer."""
    model = quantised_llama(torch.bfloat16)
    layers = [module for module in model.modules() if "support_avx512bf16_for_cpu" in vars(module)]
    for module in layers:
        module.support_avx512bf16_for_cpu = True
    seeking = seeking_on(model)
    assert layers and not any(module.support_avx512bf16_for_cpu for module in layers)
    seeking.remove()
    assert all(module.support_avx512bf16_for_cpu for module in layers)  # removed without a trace
    layers[-1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UnsupportedModelError, match="repacked"):
        seeking_on(model)


def test_qlora_with_checkpointing_gives_the_same_gradients(quantised_llama):
    model = with_lora(quantised_llama(torch.float32))
    batch = batch_for(model)
    taken = take_step(model, batch, **SPREAD)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    again = take_step(model, batch, **SPREAD)
    assert whole_error(again.gradients, taken.gradients) <= tolerance(torch.float32)


# -- activation checkpointing ----------------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("scorer", ["combined", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name, scorer, reentrant):
    model, batch, dtype = model_and_batch(name)
    torch.manual_seed(0)
    taken = take_step(model, batch, token_scorer=scorer, context_chunk_size=4, **SPREAD)
    torch.manual_seed(0)
    again = take_step(checkpointed(model, reentrant), batch, token_scorer=scorer, context_chunk_size=4, **SPREAD)
    assert_equal_step(again, taken.loss, taken.gradients, dtype, has_float32_inside(name))


@REENTRANT
def test_checkpointing_changes_no_gradient_of_a_pooled_head(reentrant):
    model, batch, dtype = model_and_batch("bert", head="sequence_classification")
    taken = take_step(model, batch, **SPREAD)
    assert_equal_step(take_step(checkpointed(model, reentrant), batch, **SPREAD), taken.loss, taken.gradients, dtype)


@REENTRANT
def test_checkpointed_lora_equals_the_twin(reentrant):
    model, batch, dtype = model_and_batch("llama")
    model = with_lora(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    taken = take_step(model, batch, **SPREAD)
    model.gradient_checkpointing_disable()
    loss, expected = lora_twin(model, batch, taken.kept)
    assert_equal_step(taken, loss, expected, dtype)


def saved_bytes(model, batch, **settings):
    """Bytes held for backward when the forward is done; what scoring held before is gone by then."""
    with seeking_on(model, **settings):
        with SavedBytes(exclude=model) as saved:
            loss, _ = loss_of(model, batch)
        held = saved.current_bytes
        loss.backward()
    model.zero_grad()
    return held


@REENTRANT
def test_checkpointing_saves_fewer_bytes(reentrant):
    model, batch, _ = model_and_batch("llama", lengths=(48, 40))
    plain = saved_bytes(model, batch)
    assert saved_bytes(checkpointed(model, reentrant), batch) < 0.7 * plain


def test_fewer_tokens_save_fewer_bytes():
    model, batch, _ = model_and_batch("llama", lengths=(48, 40))
    assert saved_bytes(model, batch, token_ratio=0.1) < 0.5 * min(saved_bytes(model, batch, token_ratio=r) for r in (0.999, 1.0))


@REENTRANT
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_backward_recomputes_the_step_of_its_own_forward(name, reentrant):
    """Two forwards before one backward: the selection, keys and values of the second must not serve the first."""
    model, batch, dtype = model_and_batch(name)
    other = batch_for(model, lm_head(name), lengths=(10, 12), seed=7)
    separate = [take_step(model, each, **SPREAD).gradients for each in (batch, other)]
    expected = {parameter: separate[0][parameter] + separate[1][parameter] for parameter in separate[0]}
    model = checkpointed(model, reentrant)
    for order in (1, -1):
        with seeking_on(model, **SPREAD):
            losses = [loss_of(model, each)[0] for each in (batch, other)][::order]
            assert worst_difference(gradients(model, sum(losses)), expected) <= tolerance(dtype)


def test_a_recompute_with_the_state_of_another_step_is_noticed():
    """The sibling of the test above: the gradients of its two steps are far apart."""
    model, batch, _ = model_and_batch("llama")
    other = batch_for(model, "causal_lm", lengths=(10, 12), seed=7)
    first, second = (take_step(model, each, **SPREAD).gradients for each in (batch, other))
    assert worst_difference(first, second) > NOTICED


# -- dropout ---------------------------------------------------------------------------------------------------------

DROPOUT = {
    "llama": dict(attention_dropout=0.3),
    "gpt2": dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    "bert": dict(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3),
    "bart": dict(attention_dropout=0.3, dropout=0.3, activation_dropout=0.3),
}


def dropping(name):
    model, batch, dtype = model_and_batch(name, **DROPOUT[name])
    return model, batch, dtype


def step_with_seed(model, batch, seed):
    torch.manual_seed(seed)
    return take_step(model, batch, **SPREAD)


@REENTRANT
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_replayed_when_recomputed(name, reentrant):
    model, batch, dtype = dropping(name)
    taken = step_with_seed(model, batch, 11)
    again = step_with_seed(checkpointed(model, reentrant), batch, 11)
    assert_equal_step(again, taken.loss, taken.gradients, dtype)


@pytest.mark.parametrize("name", DROPOUT)
def test_another_seed_of_dropout_is_noticed(name):
    model, batch, dtype = dropping(name)
    first, second = step_with_seed(model, batch, 11), step_with_seed(model, batch, 12)
    assert first.selection["decoder"].index.equal(second.selection["decoder"].index)  # scoring knows no dropout
    assert worst_difference(first.gradients, second.gradients) > NOTICED


@pytest.mark.parametrize("name", DROPOUT)
def test_attention_is_recomputed_with_the_dropout_of_its_forward(monkeypatch, name):
    """Attention is recomputed in backward whether or not layers are checkpointed: the same as if it were kept."""
    model, batch, dtype = dropping(name)
    taken = step_with_seed(model, batch, 11)
    monkeypatch.setattr(passes, "checkpoint", lambda attention, *args, **settings: attention(*args))
    kept = step_with_seed(model, batch, 11)
    assert_equal_step(taken, kept.loss, kept.gradients, dtype)


@pytest.mark.parametrize("name", DROPOUT)
def test_a_recompute_with_other_random_numbers_is_noticed(monkeypatch, name):
    model, batch, _ = dropping(name)
    taken = step_with_seed(model, batch, 11)
    recompute = passes.checkpoint
    forgetful = lambda *args, **settings: recompute(*args, **settings | {"preserve_rng_state": False})  # noqa: E731
    monkeypatch.setattr(passes, "checkpoint", forgetful)
    assert worst_difference(taken.gradients, step_with_seed(model, batch, 11).gradients) > NOTICED


# -- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "bart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_is_as_near_to_float32_as_bfloat16_allows(name, checkpointing):
    model, batch, _ = model_and_batch(name, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    scores = {stack: mask.double() for stack, mask in take_step(model, batch, **SPREAD).kept.items()}
    with seeking_on(model) as seeking, torch.autocast("cpu", dtype=torch.bfloat16):
        seeking.lookup = lambda inputs: scores
        taken = step_on(model, seeking, batch)
    model.gradient_checkpointing_disable()
    loss, expected = token_twin(model, batch, taken.kept, lm_head(name))
    assert all(g.dtype == torch.float32 for g in taken.gradients.values())
    assert abs(taken.loss - loss) <= RELATIVE[torch.bfloat16] * loss
    assert whole_error(taken.gradients, expected) <= RELATIVE[torch.bfloat16]


@pytest.mark.parametrize("scorer", ["combined", "loss"])
@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_scoring_runs_under_autocast(name, chunk, scorer):
    model, batch, _ = model_and_batch(name, dtype=torch.float32)
    real = batch["attention_mask"].bool()

    def scores():
        with seeking_on(model, token_scorer=scorer, context_chunk_size=chunk, **SPREAD) as seeking:
            return seeking.inspect(dict(batch)).values["decoder"][real].double()

    expected = scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taken, found = take_step(model, batch, token_scorer=scorer, context_chunk_size=chunk, **SPREAD), scores()
    assert all(torch.isfinite(g).all() for g in taken.gradients.values())
    assert 0 < (found - expected).norm() <= RELATIVE[torch.bfloat16] * expected.norm()


# -- batches without anything to learn -------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["combined", "random", "loss"])
@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "gpt2"])
def test_a_batch_without_labels_costs_nothing(name, chunk, scorer):
    model, batch, _ = model_and_batch(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for select_from in ("all", "labels"):
        taken = take_step(model, batch, token_scorer=scorer, context_chunk_size=chunk, select_from=select_from)
        assert taken.heard.counts["learned"] == 0 and taken.loss == 0
        assert all((g == 0).all() for g in taken.gradients.values())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kept_tokens_without_labels_cost_nothing(name):
    """A prompt that takes the whole budget: its tokens are kept and have nothing to predict."""
    model, batch, _ = model_and_batch(name)
    batch["labels"][:, :8] = -100
    taken = take_step(model, batch, scorer=lambda seen: -torch.arange(13.0).expand(2, -1))
    assert taken.heard.counts["learned"] == 0 and taken.loss == 0
    assert all((g == 0).all() for g in taken.gradients.values())


def test_selecting_from_labels_spends_the_budget_on_them():
    model, batch, dtype = model_and_batch("llama")
    batch["labels"][:, :6] = -100
    taken = take_step(model, batch, select_from="labels", **SPREAD)
    kept, target = taken.kept["decoder"], torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert (target[kept] != -100).all()
    loss, expected = token_twin(model, batch, kept={"decoder": kept}, head="causal_lm")
    assert_equal_step(taken, loss, expected, dtype)


# -- old versions, and looking -------------------------------------------------------------------------------------------


def test_casts_made_without_gradient_are_not_reused():
    """Autocast keeps casts of weights; torch 2.9 reuses those of the context pass in the focus pass, which then has no gradient."""
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    cleared = []
    original = torch.clear_autocast_cache
    torch.clear_autocast_cache = lambda: (cleared.append(True), original())
    try:
        with torch.autocast("cpu", torch.bfloat16):
            taken = take_step(model, batch, **SPREAD)
    finally:
        torch.clear_autocast_cache = original
    assert cleared
    assert taken.gradients.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("make", [partial(seeking_on, token_scorer="gradient"), streaming_on, partial(streaming_on, stream_order="layers")])
def test_casts_are_gone_before_what_follows_the_pass_without_gradient(make, monkeypatch):
    """A head that runs with gradient, or another call of the model in the same autocast, finds no weights that were cast without one."""
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    happened, original = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (happened.append("cleared"), original()))
    with make(model) as method, torch.autocast("cpu", torch.bfloat16):
        method.listeners.add(Casting(happened))
        model.model(**{name: value for name, value in batch.items() if name != "labels"})
        before = list(happened)  # autocast clears them at its end, too
    assert before[-2:] == ["cleared", "context ended"]


def test_casts_of_scores_are_gone_before_what_follows_the_choice(monkeypatch):
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)
    happened, original = [], torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (happened.append("cleared"), original()))
    with seeking_on(model, token_scorer="gradient", token_gradient="stream") as method, torch.autocast("cpu", torch.bfloat16):
        method.listeners.add(Casting(happened))
        model(**batch)
        before = list(happened)
    assert before[before.index("context ended") :][:3] == ["context ended", "cleared", "chosen"]


class Casting(Listener):
    def __init__(self, happened):
        self.happened = happened

    def chosen(self, selection):
        self.happened.append("chosen")

    def context_ends(self):
        self.happened.append("context ended")


@pytest.mark.parametrize("scorer", ["combined", "context", "gradient", "random", "loss", "true_gradient"])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_every_score_can_be_looked_at_whatever_the_scorer(name, scorer):
    model, batch, _ = model_and_batch(name)
    names = ("context_score", "gradient_score", "token_loss", "true_gradient")
    with seeking_on(model, token_scorer=scorer) as seeking:
        found = seeking.inspect(batch, names)
    assert found.scores["decoder"].keys() == {*names, "real"}
    assert all(score.shape == batch["input_ids"].shape for score in found.scores["decoder"].values())
