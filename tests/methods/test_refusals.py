"""A model or batch on which ditching would not be exact is refused by name, with the reason and what to do instead."""

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_memtune import Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, register_scorer
from hf_memtune.core import scorers
from hf_memtune.errors import ConfigError, MemTuneError, TokenScoreError, UnsupportedModelError
from hf_memtune.methods.attention import routing
from tests.support.removal import traces
from tests.support.stepping import Ear, model_and_batch, seeking_on, take_step
from tests.support.tolerances import NOTICED, tolerance
from tests.support.twin import ditching, gradients, shifted, worst_difference

_LLAMA = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_BERT = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
_LINEAR = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)

# config, class, and what the message must name
CANNOT_DITCH = {
    "state space": (lambda: tf.MambaConfig(vocab_size=61, hidden_size=32, state_size=4, num_hidden_layers=2), tf.MambaForCausalLM, "hand a state on"),
    "recurrent": (lambda: tf.RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32), tf.RwkvForCausalLM, "RwkvBlock"),
    "linear attention": (lambda: tf.Qwen3NextConfig(**_LLAMA, **_LINEAR, **_EXPERTS, head_dim=8), tf.Qwen3NextForCausalLM, "hand a state on"),
    "short convolution": (lambda: tf.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"] * 2), tf.Lfm2ForCausalLM, "hand a state on"),
    "beside attention": (lambda: tf.FalconH1Config(**_LLAMA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1), tf.FalconH1ForCausalLM, "hand a state on"),
    "relative bias": (lambda: tf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4), tf.T5ForConditionalGeneration, "alone"),
    "Fourier": (lambda: tf.FNetConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2), tf.FNetForMaskedLM, "FNetLayer"),
    "relative positions": (lambda: tf.DebertaV2Config(**_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]), tf.DebertaV2ForMaskedLM, "DebertaV2Layer"),
    "attention of its own": (lambda: tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), tf.BloomForCausalLM, "written by hand"),
    "ready-made masks": (lambda: tf.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), tf.FalconForCausalLM, "written by hand"),
    "work after the interface": (lambda: tf.DiffLlamaConfig(**_LLAMA), tf.DiffLlamaForCausalLM, "differ"),
    "shared layers": (lambda: tf.AlbertConfig(**_BERT, embedding_size=32), tf.AlbertForMaskedLM, "none"),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT_DITCH)
def test_a_model_that_cannot_be_exact_is_refused(case):
    config, build, named = CANNOT_DITCH[case]
    model = build(config())
    with pytest.raises(UnsupportedModelError) as refused:
        seeking_on(model)
    message = str(refused.value)
    assert build.__name__ in message
    assert named in message
    assert "activation checkpointing" in message  # the remedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_does_not_hide_a_mixer_beside_attention(dtype):
    """What it adds can be smaller than the rounding of hidden states: it is refused for what it is, not for what it does."""
    config, build, named = CANNOT_DITCH["beside attention"]
    with pytest.raises(UnsupportedModelError, match=named):
        seeking_on(build(config()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_precision_leads_to_a_false_refusal(dtype):
    for name in ("llama", "gemma2", "bert", "bart"):
        model, _, _ = model_and_batch(name, dtype=dtype)
        seeking = seeking_on(model)
        assert seeking.facts.tail_problem is None
        seeking.remove()


# -- parts that are missing or in the way ----------------------------------------------------------------------------


def test_a_bare_body_is_refused():
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no head.*AutoModelForCausalLM"):
        seeking_on(tf.LlamaModel(tf.LlamaConfig(**_LLAMA)))


def test_a_model_of_another_library_is_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        seeking_on(nn.Linear(2, 2))


def test_an_encoder_decoder_with_another_head_is_refused():
    model, _, _ = model_and_batch("bart", head="sequence_classification")
    with pytest.raises(UnsupportedModelError, match="sequence-to-sequence"):
        seeking_on(model)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_prompt_learning_is_refused(config):
    model, _, _ = model_and_batch("llama", dtype=torch.float32)
    settings = dict(task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=3, token_dim=32, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError, match="virtual tokens.*LoRA"):
        seeking_on(peft.get_peft_model(model, config(**settings)))


def test_a_last_block_that_reads_keys_of_others_can_be_chosen_by_attention_and_not_by_gradient():
    """Gemma 3n shares keys between layers: ditching is exact, and the last block cannot run alone."""
    torch.manual_seed(0)
    settings = {**_LLAMA, "num_hidden_layers": 5}
    layers = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    shared = dict(head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=61, num_kv_shared_layers=2, laurel_rank=4)
    config = tf.Gemma3nTextConfig(
        **settings, **shared, sliding_window=8, altup_num_inputs=2, layer_types=layers, activation_sparsity_pattern=[0.0] * 5
    )
    model = tf.Gemma3nForCausalLM(config).train()
    for scorer in ("combined", "gradient", "loss"):
        with pytest.raises(UnsupportedModelError, match="token_scorer=context or random"):
            seeking_on(model, token_scorer=scorer)
    batch = {"input_ids": torch.randint(5, 61, (2, 13)), "use_cache": False}
    batch["labels"] = batch["input_ids"]
    expected = gradients(model, model(**batch).loss)
    for scorer, chunk in [("context", 512), ("random", 4), ("context", 4)]:
        taken = take_step(model, batch, token_scorer=scorer, context_chunk_size=chunk, token_ratio=1.0)
        assert worst_difference(taken.gradients, expected) <= 10 * tolerance(torch.float32)  # AltUp and its float32 norms


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_context_layer_that_does_not_exist_is_refused(layer):
    model, _, _ = model_and_batch("llama")
    with pytest.raises(ConfigError, match=f"context_layer: got {layer}.*LlamaForCausalLM.*0 to 2"):
        seeking_on(model, context_layer=layer)


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    model, _, _ = model_and_batch("llama")
    with pytest.raises(ConfigError, match="'magic'.*combined.*register_scorer"):
        seeking_on(model, token_scorer="magic")


def test_every_problem_of_the_settings_is_told_at_once():
    with pytest.raises(ConfigError) as refused:
        TokenSeekingConfig(token_ratio=0.0, gradient_norm="l3", context_chunk_size=0)
    assert len(refused.value.problems) == 3


def test_a_registered_scorer_can_be_named(monkeypatch):
    monkeypatch.setattr(scorers, "_REGISTERED", {})
    register_scorer("early", lambda seen: -torch.arange(seen.attention_mask.shape[1]).expand(seen.attention_mask.shape).float())
    model, batch, _ = model_and_batch("llama")
    taken = take_step(model, batch, token_scorer="early")
    assert taken.kept["decoder"][0].tolist() == [True] * 5 + [False] * 8


# -- scores and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer, got",
    [
        (lambda seen: torch.zeros(2), r"\(2,\)"),
        (lambda seen: torch.zeros(2, 12), r"\(2, 12\)"),
        (lambda seen: [[0.0] * 13] * 2, "list"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(scorer, got):
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(TokenScoreError, match=rf"returned {got}, expected a tensor of shape \(2, 13\)"):
        take_step(model, batch, scorer=scorer)


@pytest.mark.parametrize("settings", [{"token_ratio": 0.5}, {"token_gradient": "stream", "sequence_chunk_size": 4}])
def test_calls_inside_of_torch_func_are_refused(settings):
    model, batch, _ = model_and_batch("llama")

    def loss_of(parameters):
        return torch.func.functional_call(model, parameters, kwargs=batch).loss

    given = dict(model.train().named_parameters())
    expected = torch.func.grad(loss_of)(given)
    with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings)):
        with pytest.raises(MemTuneError, match="torch.func.*loss.backward"):
            torch.func.grad(loss_of)(given)
        loss_of(given).backward()
    assert expected.keys() >= {name for name, parameter in given.items() if parameter.grad is not None} != set()


def test_scores_without_an_order_are_refused():
    """NaN would silently sort before every number."""
    model, batch, _ = model_and_batch("llama")
    with pytest.raises(TokenScoreError, match="NaN"):
        take_step(model, batch, scorer=lambda seen: torch.full(seen.attention_mask.shape, torch.nan))


def test_padding_may_have_any_score():
    model, batch, _ = model_and_batch("llama")
    plain = take_step(model, batch, scorer=lambda seen: torch.arange(13.0).expand(2, -1))
    padded = take_step(model, batch, scorer=lambda seen: torch.arange(13.0).expand(2, -1).masked_fill(~seen.attention_mask, torch.nan))
    assert plain.kept["decoder"].equal(padded.kept["decoder"])


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"attention_mask": torch.ones(2, 13, 13, dtype=torch.bool)}, "3 dimensions.*position_ids that restart"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"output_attentions": True}, "output_attentions=True"),
        ({"past_key_values": "filled"}, "past_key_values"),
    ],
)
def test_a_batch_that_cannot_be_ditched_is_refused(extra, message):
    model, batch, _ = model_and_batch("llama")
    if extra.get("past_key_values") == "filled":
        with torch.no_grad():
            extra = {"past_key_values": model(input_ids=batch["input_ids"], use_cache=True).past_key_values}
    with pytest.raises(MemTuneError, match=message):
        take_step(model, batch | extra)


def test_an_empty_cache_is_no_reason():
    """Trainers of others hand one over; what is in it after the call, nobody reads in training."""
    model, batch, dtype = model_and_batch("llama")
    expected = take_step(model, batch)
    taken = take_step(model, batch | {"past_key_values": tf.DynamicCache(), "use_cache": True})
    assert worst_difference(taken.gradients, expected.gradients) <= tolerance(dtype)


# -- what was refused once -------------------------------------------------------------------------------------------


def router_losses(model, batch, kept=None):
    """The model's own loss with that of its routers. kept: (B, T), tokens that everything comes from, the others being constants."""
    if kept is None:
        return model(**batch, output_router_logits=True)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]

    def cut(module, args, output):
        logits, *rest = output
        flat = kept.flatten()[:, None]
        return torch.where(flat, logits, logits.detach()), *rest

    hooks = [gate.register_forward_hook(cut, prepend=True) for gate in gates]  # before transformers records them
    try:
        with ditching(model, {"decoder": kept}):
            return model(**batch, output_router_logits=True)
    finally:
        [hook.remove() for hook in hooks]


@pytest.mark.parametrize("chunk", [4, 512])
def test_the_loss_of_routers_is_that_of_all_tokens_and_its_gradient_that_of_the_kept(chunk):
    model, batch, _ = model_and_batch("mixtral", router_aux_loss_coef=0.5)
    plain, ear = router_losses(model, batch), Ear()
    with seeking_on(model, context_chunk_size=chunk) as seeking:
        seeking.listeners.add(ear)
        outputs = router_losses(model, batch)
        found = gradients(model, outputs.loss)
    kept = ear.selections[0]["decoder"].kept_mask()
    twin = router_losses(model, batch, kept)
    target = shifted(batch["labels"]).masked_fill(~kept, -100)
    loss = F.cross_entropy(twin.logits.flatten(0, 1), target.flatten()) + 0.5 * twin.aux_loss
    assert abs(outputs.aux_loss - plain.aux_loss) <= tolerance(torch.float64)
    assert worst_difference(found, gradients(model, loss)) <= tolerance(torch.float64, float32_inside=True)  # of transformers' loss
    whole = router_losses(model, batch, kept)
    without = F.cross_entropy(whole.logits.flatten(0, 1), target.flatten())
    assert worst_difference(found, gradients(model, without)) > NOTICED


def test_a_config_that_asks_for_every_hidden_state_is_refused():
    model, batch, _ = model_and_batch("llama", output_hidden_states=True)
    with pytest.raises(MemTuneError, match="output_hidden_states=True"):
        take_step(model, batch)


def test_rows_past_the_length_of_changing_frequencies_are_refused():
    config = tf.LlamaConfig(
        **_LLAMA | {"max_position_embeddings": 8}, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    model = tf.LlamaForCausalLM(config)
    batch = {"input_ids": torch.arange(5, 18)[None]}
    with pytest.raises(UnsupportedModelError, match="dynamic.*past 8 tokens.*13"):
        take_step(model, batch | {"labels": batch["input_ids"]})


def test_a_decoder_without_input_says_what_to_put_in():
    model, batch, _ = model_and_batch("bart")
    del batch["labels"]
    with seeking_on(model), pytest.raises(MemTuneError, match="the batch has neither decoder_input_ids nor decoder_inputs_embeds"):
        model(**batch)


def test_checking_can_be_left_out_and_then_nothing_is_compared():
    """For traced models, whose tensors have no values. The sibling: what the check would have refused, it lets pass."""
    config, build, _ = CANNOT_DITCH["work after the interface"]
    TokenSeeking(build(config()), TokenSeekingConfig(token_seeking=True), check=False).remove()


def test_a_second_method_on_one_model_is_refused():
    """Its calls would go through the first one's: chunks of chunks."""
    model, batch, _ = model_and_batch("llama")
    with seeking_on(model) as first:
        with pytest.raises(ConfigError, match="a method of hf_memtune is on this model already"):
            seeking_on(model)
        looking = TokenSeeking(model, first.config, looks_only=True)  # which is no second one
        assert looking.inspect(batch).selection
        looking.remove()
    seeking_on(model).remove()


# -- attention that would be another one -----------------------------------------------------------------------------

EVERY_METHOD = pytest.mark.parametrize(
    "put_on",
    [
        seeking_on,
        *(partial(Streaming, config=StreamingConfig(sequence_chunk_size=5, stream_order=order)) for order in ("chunks", "layers")),
    ],
    ids=["seeking", "chunks", "layers"],
)


@EVERY_METHOD
def test_an_attention_function_that_is_not_known_is_refused(put_on, monkeypatch):
    """A window that is wider than the probe has tokens would not be seen."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def near(module, query, key, value, mask, **kwargs):
        apart = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])[None]
        return sdpa(module, query, key, value, ((apart >= 0) & (apart < 10))[None, None], **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "near", near)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "near", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, batch, _ = model_and_batch("llama")
    model.set_attn_implementation("near")
    before = traces(model)
    with pytest.raises(UnsupportedModelError, match="attn_implementation: got 'near', a function that hf_memtune does not know"):
        put_on(model)
    assert traces(model) == before
    model.set_attn_implementation("sdpa")  # the remedy
    with put_on(model):
        model.set_attn_implementation("near")  # too late to be looked at, but not to be noticed
        with pytest.raises(UnsupportedModelError, match="got 'near'"):
            model(**batch)


@pytest.mark.parametrize("name, is_known", [
    ("flash_attention_2", True), ("flex_attention", True), ("kernels-community/flash-attn3", True), (None, True),
    ("flash_attention_mine", False), ("my-org/linear-attention", False), ("paged|sdpa", False),
])  # fmt: skip
def test_kernels_that_sdpa_may_stand_for(name, is_known):
    assert routing._is_exact(name) is is_known


@EVERY_METHOD
def test_a_call_that_is_to_look_ahead_is_refused(put_on):
    model, batch, _ = model_and_batch("llama")
    with put_on(model):
        with pytest.raises(MemTuneError, match="is_causal: got False in a call of LlamaForCausalLM"):
            model(**batch, is_causal=False)
        model(**batch, is_causal=True).loss.backward()


LOWER = torch.tril(torch.ones(13, 13, dtype=torch.bool))[None, None].expand(2, -1, -1, -1)


def added(seen=0.0, hidden=torch.finfo(torch.float64).min):
    """A mask of numbers that are added to the scores."""
    return torch.zeros(LOWER.shape, dtype=torch.float64).add_(torch.as_tensor(seen)).masked_fill_(~LOWER, hidden)


# and what the message must name
MORE_THAN_VISIBILITY = {
    "a bias": (added(torch.linspace(-1, 1, 13)), "neither 0 nor the lowest"),
    "a number that is not low enough": (added(hidden=-1e9), "neither 0 nor the lowest"),
    "a mask for each head": (LOWER.expand(-1, 4, -1, -1), "one for each head"),
    "a learned bias": (added().requires_grad_(), "requires a gradient"),
}


@EVERY_METHOD
@pytest.mark.parametrize("case", MORE_THAN_VISIBILITY)
def test_a_mask_that_says_more_than_who_looks_at_whom_is_refused(put_on, case):
    mask, named = MORE_THAN_VISIBILITY[case]
    model, batch, dtype = model_and_batch("llama", lengths=(13, 13))
    batch["attention_mask"] = added()
    with put_on(model):
        with pytest.raises(MemTuneError, match=rf"attention_mask: got .*{named}"):
            model(**batch | {"attention_mask": mask})
        model(**batch).loss.backward()  # and one that does not is not
