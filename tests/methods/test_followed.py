"""Attention that is written by hand, that chooses its keys, or whose masks are made elsewhere: followed through the cache or by parts of masks."""

from functools import partial

import pytest
import torch

from hf_memtune import MemTuneError, Streaming, StreamingConfig, TokenSeeking, TokenSeekingConfig, checkpoint_in_two_levels
from hf_memtune.errors import UnsupportedModelError
from hf_memtune.methods.attention.passes import ContextPass, StreamPass
from tests.support.any_type import TOKENS, batch_of, tiny
from tests.support.composition import whole_error
from tests.support.tolerances import NOTICED
from tests.support.twin import gradients

ALLOWED = 1e-5  # of the whole gradient; parts compute in float32
# biases for distance, added to scores or to masks; local layers; rotary embeddings by hand; a head of two models in one; attention that
# makes more of keys and values than the interface tells (differences of two, a mask of values); relative biases with an encoder
BY_HAND = ["bloom", "falcon", "mpt", "gpt_neo", "roformer", "diffllama", "doge", "t5", "umt5"]
CHOOSING = ["deepseek_v32", "glm_moe_dsa", "hy_v4"]
SEQ2SEQ = ("t5", "umt5")


def kind_of(name):
    return "seq2seq" if name in SEQ2SEQ else "causal"


def plain(model, batch):
    return gradients(model, model(**batch).loss)


def streamed(model, batch, chunk=7, **settings):
    with Streaming(model, StreamingConfig(sequence_chunk_size=chunk), **settings) as streaming:
        return gradients(model, model(**batch).loss), streaming.router.cache


def test_blocks_of_keys_are_refused():
    """The model hides the others itself, by the name of the attention function: a run through another one would see them all."""
    with pytest.raises(UnsupportedModelError, match="block_indices.*activation checkpointing"):
        Streaming(tiny("minimax_m3_vl_text"), StreamingConfig(sequence_chunk_size=7))


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe"])
@pytest.mark.parametrize(
    "make",
    [
        partial(Streaming, config=StreamingConfig(sequence_chunk_size=7)),
        partial(TokenSeeking, config=TokenSeekingConfig(token_seeking=True)),
    ],
)
def test_experts_that_count_their_tokens_are_refused(name, make):
    """They take none once they are full, which those of a chunk are later than those of a row."""
    with pytest.raises(UnsupportedModelError, match="router.*counts the tokens.*expert_capacity=.*activation checkpointing"):
        make(tiny(name, "seq2seq"))


def test_layers_that_run_again_on_whole_rows_count_as_before():
    model = tiny("switch_transformers", "seq2seq", expert_capacity=3)
    batch = batch_of(model, "seq2seq", "right")
    expected = plain(model, batch)
    handle = checkpoint_in_two_levels(model)
    assert whole_error(plain(model, batch), expected) <= ALLOWED
    handle.restore()
    full = model(**batch).loss
    for module in model.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = TOKENS
    assert abs(model(**batch).loss - full) > NOTICED * full  # sibling: experts were full


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", BY_HAND + CHOOSING)
def test_gradients_equal_plain_backpropagation(name, padding):
    model = tiny(name, kind_of(name))
    batch = batch_of(model, kind_of(name), padding)
    expected = plain(model, batch)
    if not all(gradient.isfinite().all() for gradient in expected.values()):
        pytest.skip("padding on this side makes NaN of the model's own gradients")
    found, cache = streamed(model, batch)
    assert cache.has_indices if name in CHOOSING else cache.by_hand
    assert whole_error(found, expected) <= ALLOWED


@pytest.mark.parametrize("name", ["bloom", "mpt", "diffllama", "t5"])
def test_checkpointing_inside_chunks(name):
    model = tiny(name, kind_of(name))
    batch = batch_of(model, kind_of(name), "right")
    expected = plain(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert whole_error(streamed(model, batch)[0], expected) <= ALLOWED


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "t5"])
def test_without_earlier_keys_it_is_refused(monkeypatch, name):
    """The sibling: chunks that see their own tokens alone."""
    model = tiny(name, kind_of(name))
    for kind in (ContextPass, StreamPass):
        monkeypatch.setattr(kind, "extended", lambda self, number, key, value: (key, value))
    with pytest.raises(UnsupportedModelError, match="another gradient|part of its tokens"):
        Streaming(model, StreamingConfig(sequence_chunk_size=7))


@pytest.mark.parametrize("name", CHOOSING)
def test_keys_to_choose_by_matter(monkeypatch, name):
    """The sibling: of 24 tokens each attends to 4, so that it matters which."""
    model = tiny(name)
    assert model.config.index_topk == 4
    batch = batch_of(model, "causal")
    expected = plain(model, batch)
    assert whole_error(streamed(model, batch)[0], expected) <= ALLOWED
    of_all = ContextPass.indexed
    monkeypatch.setattr(ContextPass, "indexed", lambda self, number, keys: torch.zeros_like(of_all(self, number, keys)))
    assert whole_error(streamed(model, batch, check=False)[0], expected) > NOTICED


def test_the_decoder_of_t5_teaches_its_encoder():
    model = tiny("t5", "seq2seq")
    batch = batch_of(model, "seq2seq", "right")
    found, _ = streamed(model, batch)
    expected = plain(model, batch)
    assert {name for name in found if name.startswith("encoder.block")} and found.keys() == expected.keys()
    assert (
        whole_error(
            {n: g for n, g in found.items() if n.startswith("encoder")}, {n: g for n, g in expected.items() if n.startswith("encoder")}
        )
        <= ALLOWED
    )


@pytest.mark.parametrize("name", ["bloom", "deepseek_v32"])
def test_leaving_tokens_out_is_refused_with_a_remedy_that_works(name):
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match="token_gradient=stream and sequence_chunk_size=512"):
        TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_gradient="cut"))
    TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_gradient="stream", sequence_chunk_size=512)).remove()


# -- masks that are made before the body


def causal(rows=1):
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(rows, 1, -1, -1).clone()


@pytest.mark.parametrize("as_numbers", [False, True])
@pytest.mark.parametrize("gradient", ["stream", "cut"])
def test_masks_of_all_tokens(gradient, as_numbers):
    """A dilated one, of four dimensions, as no rule of transformers makes it."""
    model = tiny("llama")
    mask = causal(2)
    mask[1, 0] &= (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)) % 3 != 1
    batch = batch_of(model, "causal") | {"attention_mask": mask}
    if as_numbers:
        batch["attention_mask"] = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    expected = plain(model, batch)
    if gradient == "stream":
        found, other = streamed(model, batch)[0], streamed(model, batch | {"attention_mask": causal(2)})[0]
    else:
        config = TokenSeekingConfig(token_seeking=True, token_ratio=1 - 1e-9, token_selection="top", token_gradient="cut")
        with TokenSeeking(model, config):
            found, other = plain(model, batch), plain(model, batch | {"attention_mask": causal(2)})
    assert whole_error(found, expected) <= ALLOWED
    assert whole_error(other, expected) > NOTICED


def with_blocks(blocks):
    """Tokens of a block see one another both ways, as those of an image do."""
    mask = causal()
    for start, stop in blocks:
        mask[..., start:stop, start:stop] = True
    return mask


@pytest.mark.parametrize("blocks", [((5, 9),), ((2, 8), (8, 15)), ((0, 24),), ((20, 24),)])
def test_chunks_do_not_cut_blocks(blocks):
    model = tiny("llama")
    batch = batch_of(model, "causal") | {"attention_mask": with_blocks(blocks)}
    expected = plain(model, batch)
    assert whole_error(streamed(model, batch)[0], expected) <= ALLOWED
    assert whole_error(plain(model, batch | {"attention_mask": causal()}), expected) > NOTICED


def test_scores_of_chunks_that_blocks_made_longer_are_those_of_the_whole_row():
    """The last block runs alone on chunks that begin where those of the pass over all tokens began."""
    model = tiny("llama")
    batch = batch_of(model, "causal") | {"attention_mask": with_blocks(((5, 9),))}
    found = []
    for chunk in (7, 24):
        settings = {"token_scorer": "gradient", "token_ratio": 0.5, "token_gradient": "stream", "sequence_chunk_size": chunk}
        with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings)) as seeking:
            asked = [seeking.inspect(batch, names).scores["decoder"] for names in (("gradient_score",), ("token_loss", "gradient_score"))]
            asked += [seeking.inspect(batch, ("gradient_score", "token_loss")).scores["decoder"]]
            found.append([scores[name] for scores in asked for name in sorted(scores)])
    for ours, whole in zip(*found):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-8)


def test_chunks_that_cut_blocks_are_noticed(monkeypatch):
    monkeypatch.setattr("hf_memtune.methods.attention.batch.may_begin", lambda mask: torch.ones(mask.shape[-1], dtype=torch.bool))
    model = tiny("llama")
    batch = batch_of(model, "causal") | {"attention_mask": with_blocks(((5, 9),))}
    with pytest.raises(MemTuneError, match="token 6 of a row attends to the token after it"):
        streamed(model, batch)


@pytest.mark.parametrize("chunk", [5, 7])
def test_images_of_gemma_3(chunk):
    """The text stack streams; what stands for an image is an input, whose tokens see one another; the vision tower learns too."""
    model = tiny("gemma3", vision_config={"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=91)
    batch = batch_of(model, "causal")
    batch["input_ids"][:, 5:9] = 91
    batch["labels"][:, 5:9] = -100
    batch |= {"pixel_values": torch.randn(2, 3, 28, 28, dtype=torch.float64), "token_type_ids": (batch["input_ids"] == 91).long()}
    expected = plain(model, batch)
    assert any("vision" in name and gradient.abs().max() > 0 for name, gradient in expected.items())
    assert whole_error(streamed(model, batch, chunk)[0], expected) <= ALLOWED
    without = plain(model, batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])})
    assert whole_error(without, expected) > NOTICED


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "got_ocr2"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_text_alone_of_models_with_towers(name, padding):
    model = tiny(name)
    batch = batch_of(model, "causal", padding)
    assert whole_error(streamed(model, batch)[0], plain(model, batch)) <= ALLOWED
