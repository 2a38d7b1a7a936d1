"""Several sequences in one row: positions that restart and no mask, as transformers tells packed rows itself."""

import pytest
import torch

from hf_memtune import Streaming, StreamingConfig
from hf_memtune.architectures import describe
from hf_memtune.methods.attention.batch import BodyCall
from tests.support.composition import checkpointed
from tests.support.packing import packed_batch, unpacked
from tests.support.scores import column_sums, scores_seen
from tests.support.stepping import assert_equal_step, has_float32_inside, plain_twin, stream, take_step, token_twin
from tests.support.tiny_models import CAUSAL, tiny_model
from tests.support.tolerances import NOTICED, close
from tests.support.twin import gradients, worst_difference

SPREAD = {"context_normalize": "mean", "gradient_weight": 4.0}
CHUNKS = [4, 512]  # boundaries inside sequences, and none
RATIOS = [1.0, 0.999]  # the model's own way; all tokens, but through the method, since budgets are rounded up


@pytest.mark.parametrize("chunk, ratio", [(4, 0.999), (512, 0.999), (512, 1.0)])
@pytest.mark.parametrize("name", CAUSAL)
def test_all_tokens_kept_is_plain_training(name, chunk, ratio):
    model, batch = tiny_model(name), packed_batch()
    loss = model(**batch).loss
    expected = gradients(model, loss)
    taken = take_step(model, batch, token_ratio=ratio, context_chunk_size=chunk)
    assert_equal_step(taken, loss.detach(), expected, torch.float64, float32_inside=True)  # transformers' loss is in float32


LENGTHS = {
    "cu_seq_lens_q": torch.tensor([0, 5, 8], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 5, 8]),
    "max_length_q": 5,
    "max_length_k": 5,
}
RESTARTING, COUNTING, JUMPING = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]), torch.arange(8), torch.tensor([0, 1, 2, 3, 100, 101, 102, 103])
ONE, TWO = None, [0] * 5 + [1] * 3


@pytest.mark.parametrize(
    "kernel, positions, more, expected",
    [
        ("flash_attention_2", RESTARTING, {}, TWO),
        ("flash_attention_2", RESTARTING, {"attention_mask": torch.ones(1, 8)}, TWO),  # which its mask function makes None of
        ("flash_attention_2", torch.tensor([2, 3, 4, 0, 1, 2, 3, 4]), {}, [0] * 3 + [1] * 5),  # a row cut in the middle of a sequence
        ("flash_attention_2", JUMPING, {}, ONE),  # a sequence begins at the lowest position, and nowhere else
        ("flash_attention_2", COUNTING, LENGTHS, TWO),
        ("flash_attention_2", COUNTING, LENGTHS | {"max_length_k": None}, ONE),  # lengths count where all of them are given
        ("flash_attention_2", COUNTING, {}, ONE),
        ("sdpa", RESTARTING, {}, TWO),
        ("sdpa", RESTARTING, {"attention_mask": torch.ones(1, 8)}, ONE),
        ("sdpa", JUMPING, {}, [0] * 4 + [1] * 4),
        ("sdpa", COUNTING, LENGTHS, ONE),
    ],
)
def test_sequences_are_told_apart_as_the_kernel_of_the_model_does(kernel, positions, more, expected):
    """transformers 5.23: `_flash_attention_forward` and `flash_attention_mask` for flash, `_preprocess_mask_arguments` for the others."""
    model = tiny_model("llama")
    model.config._attn_implementation_internal = kernel
    inputs = {"input_ids": torch.arange(8)[None], "position_ids": positions[None], "use_cache": False, **more}
    segments = BodyCall(describe(model), model.model.forward, (), inputs).decoder.segments
    if expected is None:
        assert segments is None or len(segments.unique()) == 1
    else:
        assert (segments - segments.min()).tolist() == [expected]


@pytest.mark.parametrize("name, packs", [("llama", True), ("mistral-sliding", True), ("gpt2", True), ("gpt-oss", False), ("afmoe", False)])
def test_it_is_known_whether_masks_are_given_positions(name, packs):
    """Against what plain training does: whether another first sequence changes the logits of the second."""
    model, batch = tiny_model(name), packed_batch()
    with Streaming(model, StreamingConfig(sequence_chunk_size=4)) as streaming:
        assert streaming.router.packs is packs
    inputs = {"position_ids": batch["position_ids"], "use_cache": False}
    last = batch["position_ids"].shape[1] - 1
    with torch.no_grad():
        one = model(input_ids=batch["input_ids"], **inputs).logits[:, last]
        other = model(input_ids=torch.cat([batch["input_ids"][:, :1] + 1, batch["input_ids"][:, 1:]], dim=1), **inputs).logits[:, last]
    assert torch.equal(one, other) is packs


@pytest.mark.parametrize("scorer", ["combined", "random"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", CAUSAL)
def test_every_gradient_equals_the_twin(name, chunk, scorer):
    model, batch = tiny_model(name), packed_batch()
    taken = take_step(model, batch, token_scorer=scorer, context_chunk_size=chunk, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept, "causal_lm")
    assert_equal_step(taken, loss, expected, torch.float64, has_float32_inside(name))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_packed_sequences_learn_as_if_each_had_a_row(name, chunk, ratio):
    model, batch = tiny_model(name), packed_batch()
    taken = take_step(model, batch, token_ratio=ratio, context_chunk_size=chunk)
    parts = list(unpacked(batch))
    labels = sum(row["labels"].shape[1] - 1 for row in parts)
    alone = sum(model(**row).loss * (row["labels"].shape[1] - 1) for row in parts) / labels
    assert worst_difference(taken.gradients, gradients(model, alone)) <= 1e-6


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_context_score_stays_inside_a_sequence(name, chunk):
    model, batch = tiny_model(name), packed_batch()
    found = scores_seen(model, batch, "context_score", context_chunk_size=chunk)["decoder"]["context_score"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[-1]
    expected = column_sums(weights, torch.ones_like(batch["input_ids"], dtype=torch.bool))
    torch.testing.assert_close(found, expected.double(), **close(torch.float64, float32_inside=True))


def test_one_row_of_positions_serves_every_row():
    model, batch = tiny_model("llama"), packed_batch(((5, 8), (5, 8)))
    taken = take_step(model, batch, **SPREAD)
    shared = take_step(model, batch | {"position_ids": batch["position_ids"][:1]}, **SPREAD)
    assert_equal_step(shared, taken.loss, taken.gradients, torch.float64)


def test_positions_beside_a_mask_do_not_pack():
    """As in transformers: with an attention mask, positions are positions and nothing else."""
    model, batch = tiny_model("llama"), packed_batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    taken = take_step(model, batch, **SPREAD)
    loss, expected = token_twin(model, batch, taken.kept, "causal_lm")
    assert_equal_step(taken, loss, expected, torch.float64)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_positions_pack_where_the_model_itself_lets_them(use_cache, step):
    """Where a body makes a cache, as it does by default, it does not keep sequences apart; nor does a stream. step: 2 leaves positions out."""
    model, batch = tiny_model("llama"), packed_batch()
    batch |= {"position_ids": step * batch["position_ids"], "use_cache": use_cache}
    found = stream(model, batch, 4)
    loss, expected = plain_twin(model, batch)
    assert abs(found.loss - loss) <= 1e-9 and worst_difference(found.gradients, expected) <= 1e-9
    other, _ = plain_twin(model, batch | {"use_cache": use_cache is False})
    assert abs(other - loss) > 1e-3  # the sibling


def test_with_checkpointing_no_cache_is_made():
    model, batch = checkpointed(tiny_model("llama"), False), packed_batch() | {"use_cache": True}
    loss, expected = plain_twin(model, batch)
    found = stream(model, batch, 4)
    assert abs(found.loss - loss) <= 1e-9 and worst_difference(found.gradients, expected) <= 1e-9


@pytest.mark.parametrize("name", CAUSAL)
def test_rows_that_are_not_kept_apart_are_noticed(name):
    model, batch = tiny_model(name), packed_batch()
    taken = take_step(model, batch, token_ratio=0.999)
    mixed = {k: v for k, v in batch.items() if k != "position_ids"}
    assert worst_difference(taken.gradients, gradients(model, model(**mixed).loss)) > NOTICED
