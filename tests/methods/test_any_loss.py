"""Whatever loss is taken of a call, or of several, its gradient is that of plain training: a method changes the backward pass alone."""

from collections.abc import Callable
from contextlib import nullcontext

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.core.logits import LazyLogits
from tests.support.composition import whole_error
from tests.support.stepping import Ear, model_and_batch, seeking_on
from tests.support.tiny_models import batch_for, tiny_model
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import ditching, gradients, shifted, worst_difference

EXACT = tolerance(torch.float64)
CHUNKS = [1, 5]  # of rows of 13 and 9 tokens


def streaming_on(model, chunk=5):
    return Streaming(model, StreamingConfig(sequence_chunk_size=chunk))


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def token_losses(model, batch):
    """(B, T), in the dtype of the logits; 0 where there is no label."""
    logits = model(**inputs_of(batch)).logits
    return F.cross_entropy(logits.flatten(0, 1), shifted(batch["labels"]).flatten(), reduction="none").view(batch["labels"].shape)


def log_likelihoods(model, batch):
    """(B,), of whole rows."""
    return -token_losses(model, batch).sum(1)


def float64_loss(logits, labels, vocab_size, **kwargs):
    """In place of transformers' loss of causal models, which is taken in float32."""
    return F.cross_entropy(logits.flatten(0, 1), shifted(labels).flatten())


def with_lora(model):
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


# -- losses: of a model and a batch ------------------------------------------------------------------------------------


def weighted_by_position(model, batch):
    losses = token_losses(model, batch)
    return (losses * torch.linspace(0, 2, losses.shape[1])).sum() / 7


def mean_of_rows(model, batch):
    labels = (shifted(batch["labels"]) != -100).sum(1)
    return (token_losses(model, batch).sum(1) / labels).mean()


def mean_of_tokens(model, batch):
    logits = model(**inputs_of(batch)).logits
    return F.cross_entropy(logits.flatten(0, 1), shifted(batch["labels"]).flatten())


def smoothed(model, batch, amount=0.1):
    logits = model(**inputs_of(batch)).logits
    return F.cross_entropy(logits.flatten(0, 1), shifted(batch["labels"]).flatten(), label_smoothing=amount)


def smoothed_by_transformers(model, batch, amount=0.1):
    return LabelSmoother(amount)(model(**inputs_of(batch)), batch["labels"], shift_labels=True)


def teacher_logits(batch):
    with torch.no_grad():
        return tiny_model("llama", seed=8)(**inputs_of(batch)).logits


def real_of(batch):
    return batch["attention_mask"][..., None]


def distilled(model, batch, temperature=2.0):
    """Forward KL against the logits of another model."""
    target = (teacher_logits(batch) / temperature).log_softmax(-1)
    found = (model(**inputs_of(batch)).logits / temperature).log_softmax(-1)
    return (F.kl_div(found, target, reduction="none", log_target=True) * real_of(batch)).sum() * temperature**2 / 22


def reverse_distilled(model, batch):
    target, found = teacher_logits(batch).log_softmax(-1), model(**inputs_of(batch)).logits.log_softmax(-1)
    return (found.exp() * (found - target) * real_of(batch)).sum() / 22


def own_loss_and_one_of_its_logits(model, batch, share=0.3):
    model.loss_function = float64_loss
    outputs = model(**batch)
    return outputs.loss + share * (outputs.logits.logsumexp(-1).square() * batch["attention_mask"]).mean()


def of_the_body_alone(model, batch, power=2):
    hidden = model.base_model(**inputs_of(batch)).last_hidden_state
    return (hidden.pow(power) * torch.linspace(-1, 2, hidden.shape[-1]) * real_of(batch)).mean()


def value_and_policy(model, batch, share=0.5):
    """A further head on the hidden states of the body, beside the model's own: two calls."""
    return mean_of_tokens(model, batch) + share * of_the_body_alone(model, batch)


def entropy(model, batch, tokens=8):
    """Of what may come next, in some tokens of the middle alone: most tokens have no part in the loss."""
    logits = model(**inputs_of(batch)).logits[:, 2 : 2 + tokens]
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def of_one_logit(model, batch):
    return model(**inputs_of(batch)).logits[0, 8, 17]


def product_of_calls(model, batch):
    other = batch_for(model, lengths=(11, 12), seed=4)
    return mean_of_tokens(model, batch) * mean_of_rows(model, other)


def tripled(model, batch):
    return 3 * mean_of_tokens(model, batch)


# by name: the loss, and one that must not pass for it
LOSSES: dict[str, tuple[Callable, Callable]] = {
    "weights by position": (weighted_by_position, mean_of_tokens),
    "three times": (tripled, mean_of_tokens),
    "means of rows": (mean_of_rows, mean_of_tokens),
    "label smoothing": (smoothed, mean_of_tokens),
    "transformers' label smoothing": (smoothed_by_transformers, mean_of_tokens),
    "distillation": (distilled, lambda model, batch: distilled(model, batch, 1.0)),
    "reverse distillation": (reverse_distilled, distilled),
    "own loss and one of its logits": (own_loss_and_one_of_its_logits, lambda *args: own_loss_and_one_of_its_logits(*args, 0)),
    "the body alone": (of_the_body_alone, lambda *args: of_the_body_alone(*args, 1)),
    "two heads": (value_and_policy, lambda *args: value_and_policy(*args, 0)),
    "entropy of a few": (entropy, mean_of_tokens),
    "one logit": (of_one_logit, mean_of_tokens),
    "a product of two calls": (product_of_calls, lambda model, batch: mean_of_tokens(model, batch) + mean_of_rows(model, batch)),
}


@pytest.mark.parametrize("name, chunk", [*(("llama", chunk) for chunk in CHUNKS), ("gpt2", CHUNKS[-1])])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss_of_a_stream_is_learned_as_in_plain_training(loss, name, chunk):
    model, batch, _ = model_and_batch(name)
    take, wrong = LOSSES[loss]
    expected_loss = take(model, batch)
    expected = gradients(model, expected_loss)
    with streaming_on(model, chunk):
        found_loss = take(model, batch)
        found = gradients(model, found_loss)
    assert found.keys() == expected.keys()
    assert abs(found_loss - expected_loss) <= EXACT * max(1, abs(expected_loss))
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, gradients(model, wrong(model, batch))) > NOTICED


# -- preferences -------------------------------------------------------------------------------------------------------


def preferences(model):
    """Two batches, prompts of which are alike and have no labels."""
    chosen, rejected = batch_for(model, lengths=(13, 9), seed=1), batch_for(model, lengths=(12, 13), seed=2)
    for batch in (chosen, rejected):
        batch["labels"][:, :4] = -100
    return chosen, rejected


def dpo(model, pair, beta=0.5, together=False):
    """Rafailov et al. 2023, eq. 7. together: both in one call, as TRL does it."""
    with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        reference = [log_likelihoods(model, batch) for batch in pair]
    if together:
        chosen, rejected = log_likelihoods(model, concatenated(pair)).chunk(2)
    else:
        chosen, rejected = (log_likelihoods(model, batch) for batch in pair)
    return -F.logsigmoid(beta * (chosen - reference[0] - rejected + reference[1])).mean()


def concatenated(pair):
    width = max(batch["labels"].shape[1] for batch in pair)
    padding = {"labels": -100, "input_ids": 0, "attention_mask": 0}
    return {
        name: torch.cat([F.pad(batch[name], (0, width - batch[name].shape[1]), value=fill) for batch in pair])
        for name, fill in padding.items()
    }


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_dpo_with_adapters(chunk, together):
    """The reference is the model without its adapters; chosen and rejected may be calls of their own."""
    model = with_lora(tiny_model("llama"))
    pair = preferences(model)
    loss = dpo(model, pair, together=together)
    expected = gradients(model, loss)
    with streaming_on(model, chunk):
        found = gradients(model, dpo(model, pair, together=together))
        calls = gradients(model, dpo(model, pair, together=not together))
    assert abs(float(loss) - 0.6931) > NOTICED  # the adapters do something
    assert worst_difference(found, expected) <= EXACT and worst_difference(calls, expected) <= EXACT
    assert worst_difference(found, gradients(model, dpo(model, pair, beta=0.1))) > NOTICED
    assert worst_difference(found, gradients(model, dpo(model, pair[::-1]))) > NOTICED


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_penalty_against_the_model_without_adapters(chunk):
    """KL of every token against a reference, which is the same model called in between."""
    model, batch, _ = model_and_batch("llama")
    model = with_lora(model)

    def penalised(share):
        logits = model(**inputs_of(batch)).logits
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs_of(batch)).logits.log_softmax(-1)
        found = logits.log_softmax(-1)
        likely = found.gather(-1, batch["input_ids"].roll(-1, 1)[..., None])
        return -(likely * real_of(batch)).mean() + share * (found.exp() * (found - reference) * real_of(batch)).sum(-1).mean()

    expected = gradients(model, penalised(0.7))
    with streaming_on(model, chunk):
        found = gradients(model, penalised(0.7))
    assert found and worst_difference(found, expected) <= EXACT
    assert worst_difference(found, gradients(model, penalised(0))) > NOTICED


# -- experts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_loss_of_routers(chunk):
    """It is one of all tokens together: the router logits of chunks are put together, and their gradient taken apart."""
    model, batch, _ = model_and_batch("mixtral", router_aux_loss_coef=0.5)
    model.loss_function = float64_loss

    def take(share=0.5):
        model.router_aux_loss_coef = share
        return model(**batch, output_router_logits=True)

    plain = take()
    expected = gradients(model, plain.loss)
    with streaming_on(model, chunk):
        outputs = take()
        found = gradients(model, outputs.loss)
    assert abs(outputs.loss - plain.loss) <= EXACT and abs(outputs.aux_loss - plain.aux_loss) <= EXACT
    for logits, others in zip(outputs.router_logits, plain.router_logits, strict=True):
        assert logits.requires_grad
        torch.testing.assert_close(logits, others, rtol=EXACT, atol=EXACT)
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, gradients(model, take(0).loss)) > NOTICED


@pytest.mark.parametrize("chunk", CHUNKS)
def test_router_logits_alone_have_a_gradient(chunk):
    model, batch, _ = model_and_batch("mixtral")

    def take(layer=1):
        return model(**inputs_of(batch), output_router_logits=True).router_logits[layer].logsumexp(-1).square().mean()

    expected = gradients(model, take())
    with streaming_on(model, chunk):
        found = gradients(model, take())
    assert {name for name, g in found.items() if g.any()} == {name for name, g in expected.items() if g.any()}
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, gradients(model, take(2))) > NOTICED


# -- ways of going backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_scaled_for_half_precision(chunk):
    """The gradient that comes is 2**16 times what it will be: nothing in between may look at its size."""
    model, batch, _ = model_and_batch("llama")
    expected = gradients(model, mean_of_tokens(model, batch))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with streaming_on(model, chunk):
        found = gradients(model, scaler.scale(mean_of_tokens(model, batch)))
    assert worst_difference({name: g / 2.0**16 for name, g in found.items()}, expected) <= EXACT
    assert worst_difference(found, expected) > NOTICED


def test_two_losses_of_one_call_under_autocast():
    """Backward runs outside of it, where the second loss finds the tokens again that the first has had."""
    model, batch, _ = model_and_batch("llama", dtype=torch.float32)

    def loss(cast=nullcontext):
        torch.manual_seed(0)
        with cast():
            outputs = model(**batch)
            return outputs.loss + outputs.logits.float().logsumexp(-1).mean()

    with seeking_on(model, token_ratio=0.5, token_gradient="cut") as seeking:
        wide, narrow = gradients(model, loss()), gradients(model, loss(lambda: torch.autocast("cpu", torch.bfloat16)))
        seeking.lookup = lambda inputs: {"decoder": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]).double()}
        other = gradients(model, loss())
    assert whole_error(narrow, wide) <= tolerance(torch.bfloat16) < whole_error(other, wide)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_autograd_grad_leaves_nothing_on_parameters(chunk, tied):
    model, batch, _ = model_and_batch("llama", tie_word_embeddings=tied)
    names, parameters = zip(*model.named_parameters())
    there = [torch.randn_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, there):
        parameter.grad = gradient.clone()

    def asked_for(some, take=mean_of_tokens):
        return torch.autograd.grad(take(model, batch), some)

    expected, few = asked_for(parameters), asked_for(parameters[3:5])
    with streaming_on(model, chunk):
        found, found_few = asked_for(parameters), asked_for(parameters[3:5])
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, there))
    assert worst_difference(dict(zip(names, found)), dict(zip(names, expected))) <= EXACT
    assert worst_difference(dict(zip(names[3:5], found_few)), dict(zip(names[3:5], few))) <= EXACT
    others = asked_for(parameters, mean_of_rows)
    assert worst_difference(dict(zip(names, found)), dict(zip(names, others))) > NOTICED


def test_a_gradient_on_parameters_would_be_noticed():
    model, batch, _ = model_and_batch("llama")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with streaming_on(model):
        mean_of_tokens(model, batch).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def accumulated(model, losses):
    model.zero_grad(set_to_none=True)
    for take in losses:
        take().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_accumulate(chunk, tied):
    """A second micro-batch adds to what is there, in place where nobody looks."""
    model, batch, _ = model_and_batch("llama", tie_word_embeddings=tied)
    other = batch_for(model, lengths=(7, 12), seed=6)
    takes = [lambda: mean_of_tokens(model, batch), lambda: mean_of_rows(model, other), lambda: of_the_body_alone(model, batch)]
    expected = accumulated(model, takes)
    with streaming_on(model, chunk):
        found = accumulated(model, takes)
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, accumulated(model, takes[:2])) > NOTICED


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_hooks_of_parameters_fire_once_with_the_whole_gradient(chunk, tied, there):
    """there: whether a gradient is there from an earlier micro-batch."""
    model, batch, _ = model_and_batch("llama", tie_word_embeddings=tied)

    def hooked(scale):
        fired = {"before": {}, "after": {}}

        def before(name, gradient):
            fired["before"][name] = fired["before"].get(name, 0) + 1
            return gradient * scale

        def after(name, parameter):
            fired["after"][name] = fired["after"].get(name, 0) + 1

        handles = []
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if number % 3 != 1:  # a third has hooks of one kind, a third of both, and a third none
                handles.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: after(name, p)))
            if number % 3 == 2:
                handles.append(parameter.register_hook(lambda g, name=name: before(name, g)))
        model.zero_grad(set_to_none=True)
        if there:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        mean_of_tokens(model, batch).backward()
        [handle.remove() for handle in handles]
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        assert all(count == 1 for counts in fired.values() for count in counts.values())
        return found, fired

    expected, counts = hooked(3)
    with streaming_on(model, chunk):
        found, fired = hooked(3)
    assert fired == counts and len(fired["after"]) > len(fired["before"]) > 3
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, hooked(1)[0]) > NOTICED


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_embeddings_of_ones_own_have_a_gradient(chunk, trained):
    """Soft prompts, adversarial noise: also where nothing of the model itself is trained."""
    model, batch, _ = model_and_batch("llama")
    model.requires_grad_(trained)
    leaf = torch.randn(2, 13, 32, dtype=torch.float64, requires_grad=True)

    def take(power):
        embeds = leaf * torch.linspace(0.1, 2, 13)[None, :, None]
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), shifted(batch["labels"]).flatten()) + embeds.pow(power).mean()
        found = gradients(model, loss)
        gradient, leaf.grad = leaf.grad, None
        return found | {"embeds": gradient}

    expected = take(2)
    with streaming_on(model, chunk):
        found = take(2)
    assert found.keys() == expected.keys() and len(found) == (1 if not trained else len(list(model.parameters())))
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, take(4)) > NOTICED


# -- outputs are what they were ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bart", "bert"])
@pytest.mark.parametrize("method", ["streaming", "cut", "stream"])
def test_outputs_are_those_of_all_tokens(name, method):
    """Of the class, with the fields and the values of the plain call; cut off nowhere, and detached nowhere."""
    if name == "bert" and method != "cut":
        pytest.skip("bidirectional")
    model, batch, _ = model_and_batch(name)
    model.config.use_cache = False
    plain = model(**batch)
    kind = {} if method == "cut" else {"token_gradient": "stream", "sequence_chunk_size": 5}
    with streaming_on(model) if method == "streaming" else seeking_on(model, **kind):
        outputs = model(**batch)
        as_tuple = model(**batch, return_dict=False)
    assert type(outputs) is type(plain) and outputs.keys() == plain.keys()
    assert type(outputs.logits) is LazyLogits and outputs.logits.requires_grad
    for found in (outputs.logits, as_tuple[1]):
        torch.testing.assert_close(found + 0, plain.logits, rtol=EXACT, atol=EXACT)
    assert len(as_tuple) == len(plain.to_tuple())
    if method == "streaming":
        assert abs(outputs.loss - plain.loss) <= tolerance(torch.float32) * plain.loss
    else:
        assert abs(outputs.loss - plain.loss) > NOTICED


@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("method", ["streaming", "cut", "stream"])
def test_a_loss_on_the_output_of_an_encoder(method, beside, selection):
    """Contrastive, say. beside: with one of the logits. In a cut the encoder learns from its own kept tokens."""
    model, batch, _ = model_and_batch("bart")
    inputs = inputs_of(batch) | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    def take(factor=torch.ones(2, 13), power=2):
        outputs = model(**inputs)
        hidden = outputs.encoder_last_hidden_state
        hidden = hidden.detach() + factor[..., None] * (hidden - hidden.detach())
        return (hidden * torch.linspace(-1, 1, 32)).pow(power).mean() + beside * outputs.logits.logsumexp(-1).square().mean()

    ear = Ear()
    kind = {} if method == "cut" else {"token_gradient": "stream", "sequence_chunk_size": 5}
    settings = dict(token_selection=selection, token_scorer="random", always_keep="none", **kind)
    with streaming_on(model) if method == "streaming" else seeking_on(model, **settings) as installed:
        installed.listeners.add(ear)
        found = gradients(model, take())
    if method == "streaming":
        expected = gradients(model, take())
    else:
        chosen = ear.selections[0]
        hook = model.model.register_forward_hook(weighted_hidden([dense(chosen["decoder"])]))
        with ditching(model, {stack: each.kept_mask() for stack, each in chosen.items()}) if method == "cut" else nullcontext():
            expected = gradients(model, take(dense(chosen["encoder"])) if method == "cut" else take())
        hook.remove()
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, gradients(model, take(power=4))) > NOTICED


# -- token seeking: any loss, whose tokens are chosen in backward ----------------------------------------------------------


def weighted_hidden(weights):
    """Hooks that let the gradient of the last hidden states pass with these factors, (B, T), one for each call to come."""
    waiting = list(weights)

    def hook(module, args, output):
        hidden, factor = output.last_hidden_state, waiting.pop(0)[..., None]
        output.last_hidden_state = hidden.detach() + factor * (hidden - hidden.detach())
        return output

    return hook


def dense(selection):
    """(B, T) float64: what the gradient of each token counts for."""
    factor = torch.zeros(selection.index.shape[0], selection.length, dtype=torch.float64)
    weight = torch.ones_like(selection.index, dtype=torch.float64) if selection.weight is None else selection.weight.double()
    return factor.scatter(1, selection.index, weight * selection.valid)


def twin_of_calls(model, take, selections, cut):
    """The gradient of a loss of several calls, in each of which the kept tokens alone send theirs to the body."""
    hook = model.model.register_forward_hook(weighted_hidden([dense(each) for each in selections]))
    try:
        if not cut:
            return gradients(model, take(model))
        kept, forward = [each.kept_mask() for each in selections], model.forward

        def within(*args, **kwargs):
            with ditching(model, {"decoder": kept.pop(0)}):
                return forward(*args, **kwargs)

        model.forward = within
        try:
            return gradients(model, take(model))
        finally:
            del model.forward
    finally:
        hook.remove()


def pair_loss(model, pair, beta=0.5):
    """DPO without a reference (CPO)."""
    chosen, rejected = (log_likelihoods(model, batch) for batch in pair)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


SOUGHT = {
    "weights by position": (lambda model: weighted_by_position(model, batch_for(model)), 1),
    "distillation": (lambda model: distilled(model, batch_for(model)), 1),
    "entropy of a few": (lambda model: entropy(model, batch_for(model)), 1),
    "preferences": (lambda model: pair_loss(model, preferences(model)), 2),
}


@pytest.mark.parametrize(
    "scorer, select_from, selection",
    [
        ("true_gradient", "all", "top"),
        ("true_gradient", "labels", "sample"),
        ("random", "all", "sample"),
        ("random", "labels", "top"),
        ("combined", "all", "top"),
        ("combined", "labels", "sample"),
    ],
)
@pytest.mark.parametrize("token_gradient", ["cut", "stream"])
@pytest.mark.parametrize("loss", SOUGHT)
def test_tokens_of_any_loss_are_chosen_in_backward(loss, token_gradient, selection, scorer, select_from):
    """The loss is that of all tokens; its gradient is that of the kept ones, weighted by chance where they were drawn."""
    model = tiny_model("llama")
    take, calls = SOUGHT[loss]
    plain = take(model).detach()
    ear = Ear()
    settings = dict(token_gradient=token_gradient, token_selection=selection, token_scorer=scorer, select_from=select_from)
    spread = dict(gradient_weight=4.0, context_normalize="mean")
    with seeking_on(model, sequence_chunk_size=5, context_chunk_size=4, **spread, **settings) as seeking:
        seeking.listeners.add(ear)
        found_loss = take(model)
        assert not ear.selections
        found = gradients(model, found_loss)
    assert len(ear.selections) == calls
    selections = [each["decoder"] for each in reversed(ear.selections)]  # backward comes to the last call first
    cut = token_gradient == "cut"
    assert abs(found_loss - plain) <= EXACT * max(1, abs(plain))
    assert worst_difference(found, twin_of_calls(model, take, selections, cut)) <= EXACT
    assert worst_difference(found, gradients(model, take(model))) > NOTICED
    if calls > 1:
        assert worst_difference(found, twin_of_calls(model, take, selections[::-1], cut)) > NOTICED


def added(logits, batch, share=0.3):
    """What `own_loss_and_one_of_its_logits` adds."""
    return share * (logits.logsumexp(-1).square() * batch["attention_mask"]).mean()


@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("token_gradient", ["cut", "stream"])
def test_a_loss_beside_the_models_own(token_gradient, selection):
    """The model's own has its kept tokens before the head. In a cut the other one has tokens of its own, in a stream it has all."""
    model, ear, cut = tiny_model("llama"), Ear(), token_gradient == "cut"
    batch = batch_for(model)
    settings = dict(token_gradient=token_gradient, token_selection=selection, token_scorer="random", always_keep="none")
    with seeking_on(model, sequence_chunk_size=5, context_chunk_size=4, **settings) as seeking:
        seeking.listeners.add(ear)
        found = gradients(model, own_loss_and_one_of_its_logits(model, batch))
    assert len(ear.selections) == 1 + cut
    first, *others = (each["decoder"] for each in ear.selections)

    def own(logits):
        target, factor = shifted(batch["labels"]), dense(first)
        labels = target != -100
        count = (labels & first.kept_mask()).sum() if selection == "top" else labels.sum()
        return (F.cross_entropy(logits.transpose(1, 2), target, reduction="none") * factor).sum() / count

    with ditching(model, {"decoder": first.kept_mask()}) if cut else nullcontext():
        alone = gradients(model, own(model(**inputs_of(batch)).logits))
    if cut:  # two backward passes
        other = twin_of_calls(model, lambda model: added(model(**inputs_of(batch)).logits, batch), others, cut)
        expected = {name: g + other[name] for name, g in alone.items()}
    else:  # one, of the sum: norms round to float32 what comes together
        logits = model(**inputs_of(batch)).logits
        expected = gradients(model, own(logits) + added(logits, batch))
    assert worst_difference(found, expected) <= EXACT
    assert worst_difference(found, alone) > NOTICED


@pytest.mark.parametrize("token_gradient", ["cut", "stream"])
def test_tokens_without_a_part_in_the_loss_take_none_of_the_budget(token_gradient):
    """select_from=labels, of a loss that has no labels: of those with a gradient."""
    model, ear = tiny_model("llama"), Ear()
    batch = batch_for(model)
    settings = dict(token_scorer="random", always_keep="none", token_gradient=token_gradient, sequence_chunk_size=5)
    for select_from in ("labels", "all"):
        with seeking_on(model, select_from=select_from, **settings) as seeking:
            seeking.listeners.add(ear)
            gradients(model, entropy(model, batch, 3))
    those, others = (each["decoder"].kept_mask() for each in ear.selections)
    assert those[:, 2:5].all() and those.sum() == 6
    assert others.sum() == 9 and not others[:, 2:5].all()
    assert ear.counts["learned"] == 6 + int(others[:, 2:5].sum())


# -- sample: an unbiased estimate of the gradient of any loss --------------------------------------------------------------

DRAWS, STEPS = 64, 64  # copies of a pair in a batch, each drawn from by itself; batches


@pytest.fixture(scope="module")
def pair():
    """A small model, a preference, and the gradient of the body's parameters; the head learns from all tokens in any case."""
    model = tiny_model("llama", num_hidden_layers=2, hidden_size=16, intermediate_size=24)
    model.lm_head.requires_grad_(False)
    chosen, rejected = ({name: rows[:1] for name, rows in batch.items()} for batch in preferences(model))
    return model, (chosen, rejected), gradients(model, pair_loss(model, (chosen, rejected)))


def estimates(pair, steps=STEPS, **settings):
    """Mean gradients over DRAWS draws each, (steps, parameters), and the gradient of all tokens, (parameters)."""
    model, batches, expected = pair
    copies = [{name: value.expand(DRAWS, -1).clone() for name, value in batch.items()} for batch in batches]
    settings = {"token_scorer": "true_gradient", "token_gradient": "stream", "select_from": "labels", "sequence_chunk_size": 6} | settings
    torch.manual_seed(1)
    with seeking_on(model, **settings):
        found = [gradients(model, pair_loss(model, copies)) for _ in range(steps)]
    flat = lambda gradients: torch.cat([gradients[name].flatten() for name in expected])  # noqa: E731
    return torch.stack([flat(each) for each in found]), flat(expected)


def errors_of_means(found, expected):
    """Root mean square relative error of the mean over 1, 4 and 16 batches of draws."""
    means = (found.view(-1, many, found.shape[1]).mean(1) for many in (1, 4, 16))
    return [float((mean - expected).square().sum(1).mean().sqrt() / expected.norm()) for mean in means]


def test_the_mean_gradient_of_samples_converges_to_that_of_all_tokens(pair):
    found, expected = estimates(pair, token_selection="sample")
    few, more, many = errors_of_means(found, expected)
    # four times the draws, half the error; the last is known from 4 means alone
    assert 1.5 < few / more < 2.7 and 1.4 < more / many < 4.5 and many < 0.05
    spread = found.std(0)
    z = ((found.mean(0) - expected) / spread * STEPS**0.5)[spread > EXACT * expected.abs().max()]
    assert len(z) > len(expected) / 2
    # coordinates depend on each other, so that the bounds are wide
    assert 0.3 < z.square().mean().sqrt() < 2 and z.abs().max() < 6


@pytest.mark.parametrize("settings", [{"token_selection": "top"}, {"token_selection": "sample", "token_gradient": "cut"}], ids=str)
def test_other_estimates_stay_away_from_it_however_many_are_drawn(pair, settings):
    """The siblings: the largest gradients alone, and weights without the gradient through the other tokens."""
    found, expected = estimates(pair, steps=16, **settings)
    few, more, many = errors_of_means(found, expected)
    assert many > 0.1 and few / more < 1.4 and more / many < 1.4
