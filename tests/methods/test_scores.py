"""The scores are those of the full model: its own attention weights, autograd's gradient, its own loss, without computing them so."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_memtune import TokenSeekingConfig
from hf_memtune.core.scoring import attention_received, minmax
from hf_memtune.core.selection import select
from hf_memtune.errors import ConfigError, TokenScoreError
from hf_memtune.memory import LiveBytes
from hf_memtune.methods.seeking import last_block, loss_gradient, method, token_scores
from tests.support.packing import SEGMENTS, packed_batch, unpacked
from tests.support.scores import column_sums, scores_seen
from tests.support.stepping import RATIO, Ear, loss_of, model_and_batch, seeking_on, take_step
from tests.support.tiny_models import CAUSAL, MASKED, lm_head
from tests.support.tolerances import NOTICED, close
from tests.support.twin import shifted

EVERY = [*CAUSAL, *MASKED, "bart"]
CHUNKS = [4, 512]


def inputs_of(model, batch):
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return inputs


def real_of(batch, stack="decoder", name=""):
    """Padding of a decoder shows in its labels alone."""
    return batch["labels"] != -100 if name == "bart" and stack == "decoder" else batch["attention_mask"].bool()


# -- context score ---------------------------------------------------------------------------------------------------


def attention_weights(model, batch, layer, stack="decoder"):
    """(B, H, T, T), of the model's own eager attention."""
    eager = copy.deepcopy(model).eval()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = eager(**inputs_of(model, batch), output_attentions=True)
    if model.config.is_encoder_decoder:
        return (outputs.encoder_attentions if stack == "encoder" else outputs.decoder_attentions)[layer]
    return outputs.attentions[layer]


def scored_model(name, side="right"):
    """Eager attention is the reference, so rows that see nothing must not occur in float64, nor small windows beside padding."""
    window = {"sliding_window": 8} if name in ("mistral-sliding", "qwen2-sliding", "gemma3") else {}
    return model_and_batch(name, side, **window, **({"dtype": torch.float32} if side == "left" else {}))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", [*EVERY, "gpt-oss"])
def test_context_score_is_the_column_sum_of_the_attention_matrix(name, chunk):
    model, batch, dtype = scored_model(name)
    found = scores_seen(model, batch, "context_score", context_chunk_size=chunk)
    for stack, seen in found.items():
        expected = column_sums(attention_weights(model, batch, -1, stack), real_of(batch, stack, name))
        torch.testing.assert_close(seen["context_score"], expected.to(dtype), **close(dtype, float32_inside=True))


def test_padding_of_a_decoder_changes_nothing():
    model, batch, dtype = scored_model("bart")
    wider = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100)}
    names = ("context_score", "gradient_score")
    found, expected = (scores_seen(model, b, *names)["decoder"] for b in (wider, batch))
    real = real_of(batch, name="bart")
    for name in names:
        torch.testing.assert_close(found[name][:, : real.shape[1]][real], expected[name][real], **close(dtype))
    labels = batch["labels"].clone()
    labels[:, 3] = (labels[:, 3] + 1) % 61
    other = scores_seen(model, {**batch, "labels": labels}, *names)["decoder"]
    assert not torch.allclose(other["gradient_score"][real], expected["gradient_score"][real])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2", "bert"])
def test_context_score_of_any_layer(name, normalize, layer, chunk):
    model, batch, dtype = scored_model(name)
    settings = dict(context_layer=layer, context_normalize=normalize, context_chunk_size=chunk)
    found = scores_seen(model, batch, "context_score", **settings)["decoder"]["context_score"]
    expected = column_sums(attention_weights(model, batch, layer), real_of(batch), normalize)
    torch.testing.assert_close(found, expected.to(dtype), **close(dtype, float32_inside=True))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "opt"])
def test_context_score_beside_left_padding(name):
    model, batch, dtype = scored_model(name, "left")
    found = scores_seen(model, batch, "context_score", context_chunk_size=4)["decoder"]["context_score"]
    expected = column_sums(attention_weights(model, batch, -1), real_of(batch))
    real = real_of(batch)
    torch.testing.assert_close(found[real], expected.to(dtype)[real], **close(dtype))


@pytest.mark.parametrize("wrong", ["layer", "padding rows", "heads", "softcap"])
def test_a_wrong_attention_matrix_is_noticed(wrong):
    model, batch, _ = scored_model("gemma2")
    found = scores_seen(model, batch, "context_score")["decoder"]["context_score"]
    reference = copy.deepcopy(model)
    if wrong == "softcap":
        for layer in reference.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.01
    weights = attention_weights(reference, batch, 0 if wrong == "layer" else -1)
    weights = weights[:, :1] if wrong == "heads" else weights
    real = torch.ones_like(real_of(batch)) if wrong == "padding rows" else real_of(batch)
    assert (found - column_sums(weights, real)).abs().max() > NOTICED


# -- gradient score --------------------------------------------------------------------------------------------------


def last_block_gradients(model, batch, name, head=None):
    """{stack: (B, T, D)}: autograd's gradient of the summed loss at the last block's input, everything below frozen."""
    base, leaves, hooks = model.base_model, {}, []
    stacks = {"encoder": base.encoder, "decoder": base.decoder} if model.config.is_encoder_decoder else {"decoder": base}
    for stack, module in stacks.items():
        layers = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3][0]
        hooks.append(layers[-1].register_forward_pre_hook(_leaf_for(leaves, stack), with_kwargs=True))
    outputs = model(**(inputs_of(model, batch) if head is None else batch))
    for hook in hooks:
        hook.remove()
    loss = outputs.loss
    if head is None:
        target = shifted(batch["labels"]) if lm_head(name) == "causal_lm" else batch["labels"]
        if not model.config.is_encoder_decoder:  # padding is never kept, so its own prediction does not count
            target = target.masked_fill(batch["attention_mask"] == 0, -100)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), target.flatten(), reduction="sum")
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


def _leaf_for(leaves, stack):
    def cut(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        leaves[stack] = hidden.detach().requires_grad_()
        return ((leaves[stack], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaves[stack]})

    return cut


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_gradient_score_is_autograds_gradient_at_the_last_block(name, side, chunk):
    model, batch, dtype = model_and_batch(name, side)
    found = scores_seen(model, batch, "gradient_score", context_chunk_size=chunk)
    expected = last_block_gradients(model, batch, name)
    for stack, seen in found.items():
        score = seen["gradient_score"]
        torch.testing.assert_close(score, expected[stack].norm(dim=-1), **close(dtype, name in ("gemma2", "gemma3")))


@pytest.mark.parametrize(
    "head, name", [("sequence_classification", "llama"), ("sequence_classification", "bert"), ("question_answering", "distilbert")]
)
def test_gradient_score_of_a_pooled_head(head, name):
    model, batch, dtype = model_and_batch(name, head=head)
    found = scores_seen(model, batch, "gradient_score")["decoder"]["gradient_score"]
    torch.testing.assert_close(found, last_block_gradients(model, batch, name, head)["decoder"].norm(dim=-1), **close(dtype))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("norm", ["l2", "l1", "sum"])
def test_gradient_norms(norm, chunk):
    model, batch, dtype = model_and_batch("llama")
    found = scores_seen(model, batch, "gradient_score", gradient_norm=norm, context_chunk_size=chunk)["decoder"]
    gradient = last_block_gradients(model, batch, "llama")["decoder"]
    expected = {"l2": gradient.norm(dim=-1), "l1": gradient.abs().sum(-1), "sum": gradient.sum(-1)}[norm]
    torch.testing.assert_close(found["gradient_score"], expected, **close(dtype))


def test_a_gradient_that_lacks_later_chunks_is_noticed(monkeypatch):
    """The streamed gradient is exact because a chunk gets what later chunks owe its keys and values: without it, not."""
    model, batch, _ = model_and_batch("llama")
    expected = last_block_gradients(model, batch, "llama")["decoder"].norm(dim=-1)
    monkeypatch.setattr(torch.Tensor, "add_", lambda owed, prefix: owed)  # how a later chunk's debt is booked
    found = scores_seen(model, batch, "gradient_score", context_chunk_size=4)["decoder"]["gradient_score"]
    assert (found - expected).abs().max() > NOTICED


# -- loss, hidden states, combination --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("token_loss", "gradient_score"), ("gradient_score", "token_loss")])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bert", "roberta", "distilbert"])
def test_token_loss_is_the_loss_of_each_position(name, chunk, order):
    model, batch, dtype = model_and_batch(name)
    found = scores_seen(model, batch, *order, context_chunk_size=chunk)["decoder"]["token_loss"]
    target = shifted(batch["labels"]) if lm_head(name) == "causal_lm" else batch["labels"]
    expected = F.cross_entropy(model(**inputs_of(model, batch)).logits.transpose(1, 2), target, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), **close(torch.float32))
    assert (found[target == -100] == 0).all()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", EVERY)
def test_last_hidden_state_is_that_of_the_body(name, chunk):
    model, batch, dtype = model_and_batch(name)
    found = scores_seen(model, batch, "gradient_score", "last_hidden_state", context_chunk_size=chunk)
    with torch.no_grad():
        outputs = model.base_model(**inputs_of(model, batch))
    expected = {"decoder": outputs.last_hidden_state, "encoder": getattr(outputs, "encoder_last_hidden_state", None)}
    for stack, seen in found.items():
        real = real_of(batch, stack, name)
        torch.testing.assert_close(seen["last_hidden_state"][real], expected[stack][real], **close(dtype, name in ("gemma2", "gemma3")))


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (5.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_combined_is_equation_5(alpha, beta):
    model, batch, _ = model_and_batch("llama")
    seen = scores_seen(model, batch, "context_score", "gradient_score")["decoder"]
    real = batch["attention_mask"].bool()
    combined = alpha * seen["context_score"].clamp_min(1e-30).log() + beta * minmax(seen["gradient_score"], real)
    taken = take_step(model, batch, context_weight=alpha, gradient_weight=beta)
    assert torch.equal(taken.kept["decoder"], select(combined, RATIO, real).kept_mask())


def test_the_loss_scorer_is_refused_for_encoders_by_name():
    """An encoder's tokens have no loss of their own; the decoder's must not be taken for it."""
    model, batch, _ = model_and_batch("bart")
    with pytest.raises(ValueError, match="encoder"):
        take_step(model, batch, token_scorer="loss")


# -- of the loss that was taken --------------------------------------------------------------------------------------


def margins(model, batch):
    """A loss that is no cross entropy, and not even of tokens one by one."""
    logits = model(**inputs_of(model, batch)).logits
    return (logits.std(-1) * torch.linspace(0.1, 2, logits.shape[1]) * real_of_logits(model, batch)).sum().square()


def real_of_logits(model, batch):
    return (batch["labels"] != -100) if model.config.is_encoder_decoder else batch["attention_mask"].bool()


def gradient_at(module, model, batch, take, is_input=False):
    """dL/d(what goes into a module, or comes out of it), by autograd."""
    found = []

    def keep(module, args, kwargs, output):
        kept = (args[0] if args else kwargs["hidden_states"]) if is_input else output.last_hidden_state
        kept.retain_grad()
        found.append(kept)

    hook = module.register_forward_hook(keep, with_kwargs=True)
    take(model, batch).backward()
    hook.remove()
    model.zero_grad()
    return found[0].grad


SETTINGS = [{}, {"context_chunk_size": 4}, {"token_gradient": "stream", "sequence_chunk_size": 4}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_true_gradient_is_that_of_any_loss_at_the_last_hidden_states(name, settings):
    if name == "bert" and settings:
        pytest.skip("not causal")
    model, batch, dtype = model_and_batch(name)
    found = scores_seen(model, batch, "true_gradient", "gradient_score", take=margins, **settings)["decoder"]
    last, layer = model.base_model, [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)][-1][-1]
    limits = close(dtype, name == "gemma2")
    torch.testing.assert_close(found["true_gradient"], gradient_at(last, model, batch, margins).norm(dim=-1), **limits)
    expected = gradient_at(layer, model, batch, margins, is_input=True).norm(dim=-1)
    torch.testing.assert_close(found["gradient_score"], expected, **limits)
    of_labels = scores_seen(model, batch, "gradient_score", **settings)["decoder"]["gradient_score"]
    assert (of_labels - expected).abs().max() > NOTICED  # the sibling: another loss, another score


@pytest.mark.parametrize("norm", ["l2", "l1", "sum"])
def test_true_gradient_in_every_norm(norm):
    model, batch, dtype = model_and_batch("llama")
    found = scores_seen(model, batch, "true_gradient", take=margins, gradient_norm=norm)["decoder"]["true_gradient"]
    gradient = gradient_at(model.model, model, batch, margins)
    expected = {"l2": gradient.norm(dim=-1), "l1": gradient.abs().sum(-1), "sum": gradient.sum(-1)}[norm]
    torch.testing.assert_close(found, expected, **close(dtype))


def test_true_gradient_chooses_in_backward_whatever_the_loss_is():
    """Also where the loss is the cross entropy of the labels: that of all tokens, whose gradient is then known."""
    model, batch, _ = model_and_batch("llama")
    take, ear = (lambda model, batch: loss_of(model, batch)[0]), Ear()
    expected = gradient_at(model.model, model, batch, take).norm(dim=-1)
    plain = take(model, batch)
    with seeking_on(model, token_scorer="true_gradient") as seeking:
        seeking.listeners.add(ear)
        loss = take(model, batch)
        assert not ear.selections
        loss.backward()
    assert abs(loss - plain) <= 1e-12 * plain
    real = batch["attention_mask"].bool()
    assert torch.equal(ear.selections[0]["decoder"].kept_mask(), select(expected, RATIO, real).kept_mask())


def test_true_gradient_can_be_looked_at_before_there_is_one():
    """Of the cross entropy of the labels, which is the loss that most train with."""
    model, batch, dtype = model_and_batch("llama")
    take = lambda model, batch: loss_of(model, batch)[0] * (batch["labels"][:, 1:] != -100).sum()  # noqa: E731
    for name in ("true_gradient", "random", "combined"):
        with seeking_on(model, token_scorer=name, context_chunk_size=4) as seeking:
            found = seeking.inspect(batch, ("true_gradient",)).scores["decoder"]["true_gradient"]
        torch.testing.assert_close(found, gradient_at(model.model, model, batch, take).norm(dim=-1), **close(dtype))


def test_true_gradient_is_refused_for_encoders_by_name():
    model, batch, _ = model_and_batch("bart")
    with pytest.raises(ConfigError, match="true_gradient.*encoder of BartFor"):
        take_step(model, batch, token_scorer="true_gradient")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_the_residual_is_the_norm_of_the_gradient_at_the_logits(name, settings):
    if name == "bert" and settings:
        pytest.skip("not causal")
    model, batch, dtype = model_and_batch(name)
    batch["labels"][0, :3] = -100
    found = scores_seen(model, batch, "softmax_residual", **settings)["decoder"]["softmax_residual"]
    logits = model(**inputs_of(model, batch)).logits.detach().requires_grad_()
    target = batch["labels"] if name == "bert" else shifted(batch["labels"])
    F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, logits.grad.norm(dim=-1).to(found.dtype), **close(torch.float32, name == "gemma2"))
    other = F.cross_entropy(logits.detach().transpose(1, 2), target, reduction="none")
    assert not torch.allclose(found, other.to(found.dtype))  # the sibling: the loss is another score
    assert (found[target == -100] == 0).all() and (found[target != -100] > 0).all()


def reference_folder(tmp_path, name="llama", **changes):
    torch.manual_seed(5)
    reference = lm_head_model(name, **changes)
    reference.save_pretrained(tmp_path / "reference")
    return reference.double(), str(tmp_path / "reference")


def lm_head_model(name, **changes):
    from tests.support.tiny_models import tiny_model

    return tiny_model(name, dtype=torch.float32, seed=9, **changes)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_excess_loss_is_the_loss_less_that_of_the_reference(tmp_path, settings):
    model, batch, _ = model_and_batch("llama")
    batch["labels"][0, :3] = -100
    reference, folder = reference_folder(tmp_path)
    ear, excess = Ear(), {"token_scorer": "excess_loss", "reference_model": folder, "select_from": "labels"}
    with seeking_on(model, **excess, **settings) as seeking:
        seeking.listeners.add(ear)
        loss_of(model, batch)[0].backward()
    losses = [
        F.cross_entropy(each(**inputs_of(each, batch)).logits.transpose(1, 2).double(), shifted(batch["labels"]), reduction="none")
        for each in (model, reference)
    ]
    real, labelled = batch["attention_mask"].bool(), shifted(batch["labels"]) != -100
    kept = ear.selections[0]["decoder"].kept_mask()
    assert torch.equal(kept, select(losses[0] - losses[1], RATIO, real, labelled).kept_mask())
    assert not torch.equal(kept, select(losses[0], RATIO, real, labelled).kept_mask())  # the sibling


def test_the_reference_keeps_packed_rows_apart(tmp_path):
    """The excess is that of the sequences, each a row of its own; with one row for all the reference would say something else."""
    model, _, _ = model_and_batch("llama")
    reference, folder = reference_folder(tmp_path)
    batch, seen = packed_batch(), []

    def score(context):
        seen.append(context.reference_loss)
        return context.reference_loss

    with seeking_on(model, score, token_scorer="excess_loss", reference_model=folder) as seeking:
        seeking.inspect(batch)
    losses = [_losses_of(reference, part)[:, :-1] for part in unpacked(batch)]
    parts = [part for row, lengths in zip(seen[0], SEGMENTS) for part in row.split(lengths)]
    for found, expected in zip(parts, losses, strict=True):
        torch.testing.assert_close(found[:-1], expected[0].float(), **close(torch.float32))
    together = _losses_of(reference, {name: batch[name] for name in ("input_ids", "labels")})
    assert (together[:, -4:-1] - seen[0][:, -4:-1]).abs().max() > NOTICED  # the sibling


def _losses_of(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits.detach().transpose(1, 2)
    return F.cross_entropy(logits, shifted(batch["labels"]), reduction="none")


@pytest.mark.parametrize("changes", [{"token_selection": "labelled"}, {"token_scorer": "random"}], ids=str)
def test_a_reference_is_loaded_only_where_its_score_is_read(changes):
    """A function of that name is not the built-in scorer, either."""

    def excess_loss(context):
        return context.token_loss

    model, batch, _ = model_and_batch("llama")
    given = {"token_scorer": "excess_loss", "reference_model": "nowhere"} | changes
    taken = take_step(model, batch, excess_loss if "token_scorer" in changes else None, **given)
    assert any(gradient.any() for gradient in taken.gradients.values())  # sibling: below, "nowhere" where it is read


@pytest.mark.parametrize(
    "made, wrong",
    [
        ("bert", "predicts each token from the tokens on both sides"),
        ("body", "does not store all weights of a language model: lm_head.weight"),
    ],
)
def test_a_reference_that_was_trained_to_something_else_is_refused(made, wrong, tmp_path):
    """Its losses would rank tokens all the same. Sibling: a language model serves, above."""
    from tests.support.any_type import tiny

    reference = tiny("bert", "masked", torch.float32) if made == "bert" else lm_head_model("llama").model
    reference.save_pretrained(tmp_path / "reference")
    with pytest.raises(ConfigError, match=f"reference_model: .*{wrong}"):
        seeking_on(model_and_batch("llama")[0], token_scorer="excess_loss", reference_model=str(tmp_path / "reference"))


def test_a_reference_that_cannot_serve_is_refused(tmp_path):
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(ConfigError, match="reference_model: got None"):
        seeking_on(model, token_scorer="excess_loss")
    with pytest.raises(ConfigError, match="reference_model: got .*nowhere.*cannot be loaded"):
        seeking_on(model, token_scorer="excess_loss", reference_model=str(tmp_path / "nowhere"))
    _, folder = reference_folder(tmp_path, vocab_size=7)
    with pytest.raises(TokenScoreError, match="expected less than the 7 of the reference model"):
        take_step(model, batch, token_scorer="excess_loss", reference_model=folder)


def word_tokenizer(words):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0])), unk_token=words[0]
    )


def test_a_reference_to_whose_tokenizer_numbers_are_other_tokens_is_refused(tmp_path):
    """Not one with tokens that were added to it; nor where a model was saved without a tokenizer."""
    model, batch, _ = model_and_batch("llama")
    _, folder = reference_folder(tmp_path)
    given = {"token_scorer": "excess_loss", "reference_model": folder}
    model.config._name_or_path = str(tmp_path)
    words = ["unknown", "sea", "sun", "red"]
    word_tokenizer(words).save_pretrained(tmp_path)
    take_step(model, batch, **given)
    chats = word_tokenizer(words)
    chats.add_tokens(["<turn>"])
    chats.save_pretrained(folder)
    take_step(model, batch, **given)
    word_tokenizer(["unknown", "sun", "sea", "red"]).save_pretrained(folder)
    with pytest.raises(ConfigError, match="2 numbers mean other tokens, such as 1, 'sun' there and 'sea' in"):
        seeking_on(model, **given)


@pytest.mark.parametrize("name", ["true_gradient", "softmax_residual", "random"])
def test_a_function_with_the_name_of_a_built_in_scorer_scores_as_it_says(name):
    def score(context):
        return torch.arange(context.attention_mask.shape[1]).expand(context.attention_mask.shape).float()

    score.__name__ = name
    model, batch, _ = model_and_batch("llama")
    ear = Ear()
    with seeking_on(model, score, token_scorer="random", select_from="all", token_selection="top", always_keep="none") as seeking:
        seeking.listeners.add(ear)
        loss_of(model, batch)[0].backward()
    kept, real = ear.selections[0]["decoder"].kept_mask(), batch["attention_mask"].bool()
    scores = torch.arange(real.shape[1]).expand(real.shape).float()
    assert torch.equal(kept, select(scores, RATIO, real).kept_mask())
    assert not torch.equal(kept, select(-scores, RATIO, real).kept_mask())  # the sibling


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_loss_of_each_token_is_told_beside_a_loss_of_ones_own(settings):
    """Where the call has labels; the loss that is taken may be another one, for which tokens are then chosen anew."""
    model, batch, dtype = model_and_batch("llama")
    take = lambda model, batch: model(**batch).logits.square().mean()  # noqa: E731
    found = scores_seen(model, batch, "token_loss", "gradient_score", take=take, again=True, **settings)["decoder"]
    logits = model(**batch).logits.transpose(1, 2)
    expected = F.cross_entropy(logits, shifted(batch["labels"]), reduction="none")
    torch.testing.assert_close(found["token_loss"], expected.float(), **close(torch.float32))
    layer = model.model.layers[-1]
    torch.testing.assert_close(found["gradient_score"], gradient_at(layer, model, batch, take, True).norm(dim=-1), **close(dtype))
    with pytest.raises(ConfigError, match="not the cross entropy of labels"):
        scores_seen(model, batch, "token_loss", take=margins, **settings)


# -- only what is asked for ------------------------------------------------------------------------------------------

COSTLY = {
    "attention_received": token_scores,
    "linear_loss_gradient": loss_gradient,
    "losses_of_logits": loss_gradient,
    "only_last_block": last_block,
}


@pytest.fixture
def computed(monkeypatch):
    """How often each costly function of the scores ran, and the last block by itself."""
    counts = dict.fromkeys(COSTLY, 0)

    def spy(name, function):
        def run(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return run

    for name, module in COSTLY.items():
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    return counts


def step_counted(computed, model, batch, scorer=None, take=loss_of, **settings):
    """A step; what the probe of the model computed is not counted."""
    with seeking_on(model, scorer, **settings):
        computed.update(dict.fromkeys(computed, 0))
        loss = take(model, batch)
        (loss[0] if isinstance(loss, tuple) else loss).backward()


@pytest.mark.parametrize(
    "settings, attention, gradient, losses",
    [
        (dict(token_scorer="random"), 0, 0, 0),
        (dict(token_scorer="true_gradient"), 0, 0, 0),
        (dict(token_scorer="context"), 1, 0, 0),
        (dict(token_scorer="gradient"), 0, 1, 0),
        (dict(token_scorer="loss"), 0, 0, 1),
        (dict(token_scorer="profit"), 0, 0, 1),
        (dict(token_scorer="softmax_residual"), 0, 0, 0),
        (dict(token_scorer="random", token_weight="dft"), 0, 0, 1),
        (dict(token_scorer="combined"), 1, 1, 0),
        (dict(token_scorer="combined", gradient_weight=0.0), 1, 0, 0),
        (dict(token_scorer="combined", context_weight=0.0), 0, 1, 0),
    ],
    ids=str,
)
def test_scores_are_computed_when_asked_for_and_only_then(computed, settings, attention, gradient, losses):
    """The last block runs by itself for its gradient alone: what it gave is there from the pass over all tokens."""
    model, batch, _ = model_and_batch("llama")
    step_counted(computed, model, batch, **settings)
    assert [*computed.values()] == [attention, gradient, losses, gradient]


@pytest.mark.parametrize("settings", [{}, {"token_gradient": "stream", "sequence_chunk_size": 16}], ids=str)
@pytest.mark.parametrize("name", ["loss", "softmax_residual"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_last_block_runs_where_its_output_is_not_at_hand(computed, kind, name, settings):
    """Where the head is given a transform of it, and of a stream, which ran with dropout. A loss of one's own chooses anew, with a pass over all
    tokens that gives it again."""
    if kind == "bert" and settings:
        pytest.skip("not causal")
    model, batch, _ = model_and_batch(kind)
    for take in (loss_of, lambda model, batch: model(**batch).logits.square().mean()):
        step_counted(computed, model, batch, take=take, token_scorer=name, **settings)
        assert computed["only_last_block"] == (kind == "bert" or bool(settings))


def test_scores_are_computed_once(computed):
    model, batch, _ = model_and_batch("llama")
    step_counted(computed, model, batch, lambda seen: seen.context_score + seen.gradient_score + seen.context_score + seen.token_loss)
    assert [*computed.values()] == [1, 1, 0, 1]


def test_a_scorer_that_looks_at_nothing_costs_nothing(computed):
    model, batch, _ = model_and_batch("llama")
    step_counted(computed, model, batch, lambda seen: torch.rand(seen.attention_mask.shape))
    assert not any(computed.values())


# -- memory ----------------------------------------------------------------------------------------------------------


def causal(start, stop):
    keys = torch.arange(stop)
    return (torch.arange(start, stop)[:, None] >= keys)[None, None], stop


def received_in_chunks(query, key):
    return attention_received(query, key, causal, scaling=0.3, row_chunk=16)[0]


def received_at_once(query, key):
    """The quadratic twin: the whole matrix, summed."""
    length = query.shape[2]
    weights = (query @ key.transpose(2, 3) * 0.3).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return weights.softmax(-1).mean(1).sum(1)


def peak_growth(function):
    """Peak of live bytes at 256, 512 and 1024 tokens, each divided by the one before."""
    peaks = []
    for length in (256, 512, 1024):
        query, key = torch.randn(2, 1, 4, length, 8).unbind(0)
        with LiveBytes() as live:
            function(query, key)
        peaks.append(live.peak_bytes)
    return [larger / smaller for smaller, larger in zip(peaks, peaks[1:])]


def test_memory_of_the_context_score_grows_with_the_row_not_with_its_square():
    assert max(peak_growth(received_in_chunks)) < 2.1
    query, key = torch.randn(2, 1, 4, 64, 8).unbind(0)
    torch.testing.assert_close(received_in_chunks(query, key), received_at_once(query, key), **close(torch.float32))


def test_a_quadratic_score_is_noticed():
    assert min(peak_growth(received_at_once)) > 3.5


# -- several scorers of one pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("kind", ["llama", "bert", "bart"])
def test_scorers_that_share_a_pass_choose_as_each_alone(kind, selection, caplog):
    model, batch, dtype = model_and_batch(kind)
    names = ("gradient", "context", *(["loss"] if kind != "bart" else []), "combined")  # tokens of an encoder predict nothing
    settings = {"token_selection": selection, "select_from": "labels"}

    def alone(name):
        with seeking_on(model, token_scorer=name, **settings) as seeking:
            found = seeking.inspect(batch)
            return found.values["decoder"], found.selection["decoder"].kept_mask(), found.probability["decoder"]

    with seeking_on(model, token_scorer=names[0], **settings) as seeking:
        others = [TokenSeekingConfig.of(seeking.config, token_scorer=name) for name in names[1:]]
        found = seeking.inspect(batch, others=others)
    assert "evaluation mode" not in caplog.text, "looking is no call that learns"
    for name, wrong, shared in zip(names[1:], names, found.others):
        values, kept, chances = alone(name)
        torch.testing.assert_close(shared.values["decoder"], values, **close(dtype))
        assert not torch.allclose(shared.values["decoder"].double(), alone(wrong)[0].double())  # the sibling
        if selection == "top":
            assert torch.equal(shared.selection["decoder"].kept_mask(), kept) and shared.probability["decoder"] is chances is None
        else:
            torch.testing.assert_close(shared.probability["decoder"], chances, **close(dtype))
            assert not torch.allclose(chances, alone(wrong)[2])


def test_a_reference_is_there_for_whichever_scorer_asks_for_it_and_is_loaded_once(tmp_path, monkeypatch):
    """The first of several scorers need not be the one that compares with another model."""
    model, batch, _ = model_and_batch("llama")
    reference, folder = reference_folder(tmp_path)
    loaded, load = [], method.reference_model
    monkeypatch.setattr(method, "reference_model", lambda *args: loaded.append(args) or load(*args))
    settings = {"token_scorer": "loss", "reference_model": folder, "select_from": "labels"}
    with seeking_on(model, **settings) as seeking:
        assert not loaded
        others = [TokenSeekingConfig.of(seeking.config, token_scorer=name) for name in ("random", "excess_loss")]
        first, again = (seeking.inspect(batch, others=others) for _ in range(2))
    assert len(loaded) == 1
    losses = [_losses_of(each, batch) for each in (model, reference)]
    labelled = shifted(batch["labels"]) != -100
    for found in (first, again):
        (_, excess), own = found.others, found.values["decoder"]
        values = excess.values["decoder"]
        torch.testing.assert_close(values[labelled].double(), (losses[0] - losses[1])[labelled].double(), **close(torch.float32))
        assert not torch.allclose(values[labelled], own[labelled])  # the sibling
        chosen = select(losses[0] - losses[1], RATIO, batch["attention_mask"].bool(), labelled)
        assert torch.equal(excess.selection["decoder"].kept_mask(), chosen.kept_mask())


@pytest.mark.parametrize("token_gradient", ["cut", "stream"])
@pytest.mark.parametrize("name", ["profit", "excess_loss"])
def test_tokens_without_a_label_are_the_last_to_be_kept_for_what_they_teach(tmp_path, name, token_gradient):
    """Their loss counts as 0: a probability of 1, and no excess at all."""
    model, batch, _ = model_and_batch("llama")
    reference, folder = reference_folder(tmp_path)
    batch["labels"][:, :6] = -100
    given = {"reference_model": folder} if name == "excess_loss" else {}
    kind = {"token_gradient": token_gradient} | ({"sequence_chunk_size": 5} if token_gradient == "stream" else {})
    kept = take_step(model, batch, token_scorer=name, **given, **kind).kept["decoder"]
    labelled, real = shifted(batch["labels"]) != -100, batch["attention_mask"].bool()
    losses = [_losses_of(each, batch) for each in (model, reference)]
    scores = {"profit": (-losses[0]).exp(), "excess_loss": losses[0] - losses[1]}[name]
    assert torch.equal(kept, select(scores.masked_fill(~labelled, -torch.inf), RATIO, real).kept_mask())
    assert not torch.equal(kept, select(scores, RATIO, real).kept_mask())  # the sibling: by a loss of 0


@pytest.mark.parametrize("token_gradient", ["cut", "stream"])
@pytest.mark.parametrize("ratio", [RATIO, 1.0])
def test_tokens_below_a_probability_are_left_out(ratio, token_gradient):
    """And the loss is the mean over the others; a row without any keeps its most probable token."""
    model, batch, _ = model_and_batch("llama", lengths=(13, 9, 5))
    batch["labels"][0, :3] = -100
    losses, labelled, real = _losses_of(model, batch), shifted(batch["labels"]) != -100, batch["attention_mask"].bool()
    scores = (-losses).exp().masked_fill(~labelled, -torch.inf)
    lowest = scores.amax(1).min()  # the best of some row
    least = float((lowest + scores[scores > lowest].min()) / 2)
    kind = {"token_gradient": token_gradient} | ({"sequence_chunk_size": 5} if token_gradient == "stream" else {})
    settings = {"token_scorer": "profit", "select_from": "labels", "token_ratio": ratio, **kind}
    taken = take_step(model, batch, profit_threshold=least, **settings)
    kept = taken.kept["decoder"]
    assert torch.equal(kept, select(scores, ratio, real, scores >= least).kept_mask())
    assert abs(taken.loss - losses[kept & labelled].mean()) <= 1e-12 * taken.loss
    assert (scores[kept & (scores < least)] == scores.amax(1)[scores.amax(1) < least]).all()
    without = take_step(model, batch, **settings).kept["decoder"] if ratio < 1 else labelled
    assert not torch.equal(kept, without)  # the sibling


@pytest.mark.parametrize("asked", [("token_loss",), ("gradient_score", "token_loss")], ids=["alone", "after a gradient"])
@pytest.mark.parametrize(
    "settings", [{"token_gradient": "cut"}, {"token_gradient": "stream", "sequence_chunk_size": 4}], ids=["cut", "stream"]
)
def test_scores_are_without_dropout_whatever_ran_with_it(settings, asked):
    model, batch, _ = model_and_batch("gpt2")
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.0
    for module in model.transformer.h[-1].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected, seen = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), {}
    model.train()

    def scorer(context):
        seen.update({name: getattr(context, name).clone() for name in asked})
        return torch.zeros(context.attention_mask.shape)

    with seeking_on(model, scorer, **settings):
        model(**batch).loss.backward()
    torch.testing.assert_close(seen["token_loss"].double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, dropout", [("bert", "classifier_dropout"), ("distilbert", "seq_classif_dropout")])
def test_scores_are_without_the_dropout_of_a_head(name, dropout):
    """Of a model in training mode, as those that are taken before each epoch."""
    scores = {}
    for p in (0.0, 0.5):
        model, batch, _ = model_and_batch(name, head="sequence_classification", **{dropout: p})
        with seeking_on(model, token_scorer="gradient") as seeking:
            torch.manual_seed(0)
            scores[p] = seeking.inspect(batch).values["decoder"]
        assert all(module.training for module in model.modules())
    assert scores[0.0].any() and torch.equal(scores[0.5], scores[0.0])
