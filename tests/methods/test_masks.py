"""Masks as pieces of the keys: put together again, they are the mask, for every rule, padding and packing; most of them need none."""

from functools import partial

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_causal_mask_function,
)

from hf_memtune.core.selection import Selection
from hf_memtune.methods.attention import masks
from hf_memtune.methods.attention.masks import Asked
from hf_memtune.methods.attention.spans import Rows, additive, attention_mask

TOKENS, ROWS = 24, 2


def chunked(size):
    return and_masks(chunked_overlay(size, torch.zeros(ROWS, dtype=torch.long)), causal_mask_function)


def image(batch, head, query, key):
    """Tokens 4 to 9 see one another both ways."""
    return (query >= 4) & (query < 10) & (key >= 4) & (key < 10)


RULES = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(5),
    "wide window": sliding_window_causal_mask_function(13),
    "chunked": chunked(7),
    "image": or_masks(causal_mask_function, image),
    "bidirectional": bidirectional_mask_function,
}


def rows(kind):
    real = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    if kind == "left":
        real[1, :7] = False
    if kind == "right":
        real[1, -7:] = False
    positions = torch.arange(TOKENS)[None].expand(ROWS, -1)
    segments = torch.stack([torch.arange(TOKENS) // 9, torch.arange(TOKENS) // 14]) if kind == "packed" else None
    return Rows(ROWS, TOKENS, None if kind in ("none", "packed") else real, positions, segments)


def selection_of(start, stop):
    """Two tokens of the chunk in one row, and one in the other."""
    index = torch.tensor([[start, stop - 1], [start + 1, start + 1]])
    return Selection(index, torch.tensor([[True, True], [True, False]]), (2, 1), TOKENS)


def asked_for(rule, span):
    return Asked("decoder", rule, span, span, partial(additive, dtype=torch.float32, hidden=-torch.inf))


def put_together(pieces, like):
    found = torch.zeros_like(like)
    for piece in pieces:
        keys, count = slice(piece.start, piece.stop), piece.stop - piece.start
        seen = torch.ones(like.shape[2], count, dtype=torch.bool) if piece.seen is None else piece.seen
        seen = seen.tril() if piece.causal else seen
        looking = torch.ones(1, 1, like.shape[2], dtype=torch.bool) if piece.looking is None else piece.looking
        found[..., keys] |= seen & looking[..., None]
        assert torch.equal((seen & looking[..., None]).any(-1).expand_as(found[..., 0]), looking.expand_as(found[..., 0]))
    return found


@pytest.fixture(autouse=True)
def small_squares(monkeypatch):
    monkeypatch.setattr(masks, "SQUARE", 4)
    monkeypatch.setattr(masks, "GROUP", 2)


@pytest.mark.parametrize("chosen", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("kind", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("rule", RULES)
def test_pieces_are_the_mask(rule, kind, chosen):
    own = rows(kind)
    for start, stop in [(0, 6), (6, 12), (10, 16), (16, 24), (0, 24)]:
        span = own.kept_of_chunk(selection_of(start, stop), start, stop) if chosen else own.chunk(start, stop)
        mask = attention_mask(RULES[rule], span, span).expand(ROWS, -1, -1, -1)
        asked = asked_for(RULES[rule], span)
        assert torch.equal(put_together(asked.pieces, mask), mask)
        assert [piece.start for piece in asked.pieces] == sorted({piece.start for piece in asked.pieces})
        assert torch.equal(asked.whole == 0, mask)


@pytest.mark.parametrize("kind, in_memory", [("none", 1), ("left", ROWS)])
def test_rows_with_the_same_mask_share_its_memory(kind, in_memory):
    """All rows have one: some layers look at that of each row."""
    whole = asked_for(causal_mask_function, rows(kind).chunk(16, 24)).whole
    assert whole.shape == (ROWS, 1, 8, 24) and whole.untyped_storage().nbytes() == in_memory * 8 * 24 * whole.itemsize


@pytest.mark.parametrize("rule", RULES)
def test_another_rule_is_noticed(rule):
    span = rows("none").chunk(16, 24)
    other = attention_mask(sliding_window_causal_mask_function(3), span, span).expand(ROWS, -1, -1, -1)
    assert not torch.equal(put_together(asked_for(RULES[rule], span).pieces, other), other)


def squares(pieces):
    """Keys of pieces with a mask of their own, by query and key."""
    return sum(piece.stop - piece.start for piece in pieces if piece.seen is not None and piece.seen.shape[2] > 1)


@pytest.mark.parametrize(
    "rule, kind, most", [("causal", "none", 0), ("causal", "left", 0), ("causal", "packed", 8), ("window", "none", 16)]
)
def test_masks_by_query_and_key_are_those_of_a_few_squares(rule, kind, most):
    span = rows(kind).chunk(16, 24)
    assert squares(asked_for(RULES[rule], span).pieces) <= most < span.visible


def test_what_is_seen_in_full_is_one_piece():
    assert [(p.start, p.stop, p.causal) for p in asked_for(causal_mask_function, rows("none").chunk(16, 24)).pieces] == [
        (0, 16, False),
        (16, 24, True),
    ]
    assert len(asked_for(bidirectional_mask_function, rows("none").chunk(0, 24)).pieces) == 1


def test_nothing_is_made_of_what_no_query_sees():
    pieces = asked_for(RULES["window"], rows("none").chunk(16, 24)).pieces
    assert min(piece.start for piece in pieces) == 12


@pytest.mark.parametrize("rule, kind", [("window", "none"), ("window", "left"), ("causal", "packed")])
def test_squares_are_asked_about_in_groups_first(rule, kind, monkeypatch):
    """What is out of reach takes one question for a group; what is found is the same."""
    asked = []
    monkeypatch.setattr(masks, "attention_mask", lambda *args: asked.append(args[3:]) or attention_mask(*args))

    def found(group):
        asked.clear()
        monkeypatch.setattr(masks, "GROUP", group)
        return asked_for(RULES[rule], rows(kind).chunk(20, 24)).pieces, len(asked)

    (grouped, few), (single, many) = found(2), found(100)
    like = torch.zeros(ROWS, 1, 4, 24, dtype=torch.bool)
    assert torch.equal(put_together(grouped, like), put_together(single, like)) and (few < many) is (rule == "window")


def test_a_stand_in_has_the_shape_of_the_mask_and_one_number():
    span = rows("left").chunk(16, 24)
    asked = asked_for(causal_mask_function, span)
    given = asked.stand_in()
    assert given.shape == (ROWS, 1, 8, 24) and given.dtype == torch.float32
    assert given.untyped_storage().nbytes() == 4 and given.isnan().all()
    assert asked.is_given(given) and asked.is_given(given[:, :, :, :24]) and asked.is_given(given.detach())
    assert not asked.is_given(given.clone()) and not asked.is_given(None)
    assert not asked.is_given(given[..., -5:]) and not asked.is_given(given[:, :, :3])  # a layer that cuts its mask has another one
