"""Kernels that give attention to a part of the keys: each against the formulas, in float64, with autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch.backends import cuda

from hf_memtune.core import attention_kernels
from hf_memtune.core.attention_kernels import Attended, kernel_for
from tests.support import cuda_kernels
from tests.support.tolerances import NOTICED, close, tolerance

ROWS, QUERIES, KEYS, CHANNELS = 2, 5, 7, 8
KERNELS = {"fused": attention_kernels._CPU, "plain": attention_kernels.PLAIN}


def inputs(heads=6, key_heads=2, keys=KEYS, dtype=torch.float64, value_channels=CHANNELS):
    torch.manual_seed(0)
    shapes = (heads, QUERIES, CHANNELS), (key_heads, keys, CHANNELS), (key_heads, keys, value_channels)
    return [torch.randn(ROWS, *shape, dtype=torch.float64).to(dtype) for shape in shapes]


def mask_of(kind, dtype=torch.float64):
    if kind == "none":
        return None
    seen = torch.rand(ROWS, 1, 1 if kind == "by key" else QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
    seen[..., 0] = True
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def twin(query, key, value, mask, causal, scale):
    """Output and lse by the definition; whatever is shared is repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.mT * scale
    scores = scores if mask is None else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def check(kernel, query, key, value, mask, causal=False, scale=0.3):
    leaves = [part.double().requires_grad_() for part in (query, key, value)]
    expected, lse = twin(*leaves, None if mask is None else mask.double(), causal, scale)
    gradient = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(expected, leaves, gradient)
    found = kernel.forward(query, key, value, mask, causal, scale)
    of = kernel.backward(gradient.to(query.dtype), query, key, value, found, mask, causal, scale)
    assert found.output.dtype == query.dtype and [g.shape for g in of] == [part.shape for part in (query, key, value)]
    return [(found.output, expected), (found.lse, lse), *zip(of, grads)]


def worst(pairs) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "by key", "square"])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_their_formulas(kernel, heads, kind, dtype):
    parts = inputs(*heads, dtype=dtype)
    assert worst(check(KERNELS[kernel], *parts, mask_of(kind, dtype))) <= tolerance(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_causality_numbers_queries_and_keys_alike(kernel):
    parts = inputs(keys=QUERIES)
    assert worst(check(KERNELS[kernel], *parts, None, causal=True)) <= tolerance(torch.float64)
    found = KERNELS[kernel].forward(*parts, None, True, 0.3).output
    assert (found - KERNELS[kernel].forward(*parts, None, False, 0.3).output).norm() > NOTICED


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["as made", "dense"])
def test_weights_are_those_among_all_keys(kernel, layout):
    """The gradient for some keys, with output and lse of all: a part of what autograd gives at once."""
    kernel, (query, key, value) = KERNELS[kernel], inputs()
    whole = kernel.forward(query, key, value, None, False, 0.3)
    whole = Attended(*(part.contiguous() for part in whole)) if layout == "dense" else whole
    gradient = torch.randn_like(whole.output)
    expected = kernel.backward(gradient, query, key, value, whole, None, False, 0.3)
    parts = [kernel.backward(gradient, query, key[:, :, p], value[:, :, p], whole, None, False, 0.3) for p in (slice(0, 3), slice(3, KEYS))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], expected[0], **close(torch.float64))
    for number in (1, 2):
        torch.testing.assert_close(torch.cat([part[number] for part in parts], 2), expected[number], **close(torch.float64))
    own = kernel.forward(query, key[:, :, :3], value[:, :, :3], None, False, 0.3)
    alone = kernel.backward(gradient, query, key[:, :, :3], value[:, :, :3], own, None, False, 0.3)
    assert (alone[1] - parts[0][1]).norm() > NOTICED * parts[0][1].norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_infinite_lse_takes_a_query_out(kernel):
    kernel, (query, key, value) = KERNELS[kernel], inputs()
    found = kernel.forward(query, key, value, None, False, 0.3)
    without = found._replace(lse=found.lse.clone())
    without.lse[:, :, 1] = torch.inf
    gradient = torch.randn_like(found.output)
    of = kernel.backward(gradient, query, key, value, without, None, False, 0.3)
    gradient[:, :, 1] = 0
    expected = kernel.backward(gradient, query, key, value, found, None, False, 0.3)
    assert not of[0][:, :, 1].any() and not any(part.isnan().any() for part in of)
    for part, other in zip(of[1:], expected[1:]):
        torch.testing.assert_close(part, other, **close(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value_channels", [3, 13])
@pytest.mark.parametrize("kind", ["none", "square", "causal"])
def test_values_of_another_size(kind, value_channels, dtype):
    """Fused, with zeros for channels that are not there; and by the formulas."""
    is_causal = kind == "causal"
    parts = inputs(keys=QUERIES if is_causal else KEYS, dtype=dtype, value_channels=value_channels)
    mask, filled = mask_of("none" if is_causal else kind, dtype), kernel_for(parts[0], parts[2], masked=kind == "square")
    assert isinstance(filled, attention_kernels._Filled) and kernel_for(*parts[:2], masked=False) is attention_kernels._CPU
    for kernel in (filled, attention_kernels.PLAIN):
        assert worst(check(kernel, *parts, mask, causal=is_causal)) <= tolerance(dtype)


def test_channels_that_are_filled_with_more_than_zeros_are_noticed(monkeypatch):
    monkeypatch.setattr(attention_kernels, "pad", lambda part, sides: torch.nn.functional.pad(part, sides, value=0.1))
    parts = inputs(value_channels=13)
    assert worst(check(kernel_for(parts[0], parts[2], masked=False), *parts, None)) > NOTICED


# --- CUDA, by stand-ins that are as demanding as its kernels


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_aten", SimpleNamespace(**cuda_kernels.ATEN))
    monkeypatch.setattr(cuda, "can_use_flash_attention", cuda_kernels.can_use_flash)
    monkeypatch.setattr(cuda, "can_use_efficient_attention", cuda_kernels.can_use_efficient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "by key", "square"])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
def test_the_efficient_kernel_is_called_with_what_it_takes(on_cuda, heads, kind, dtype):
    """7 keys: rows of a mask of as many do not begin where the kernel can read."""
    parts = inputs(*heads, dtype=dtype)
    assert worst(check(attention_kernels._EFFICIENT, *parts, mask_of(kind, dtype))) <= tolerance(dtype)


@pytest.mark.parametrize("kernel", ["_FLASH", "_EFFICIENT"])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
def test_a_square_on_cuda(on_cuda, heads, kernel):
    parts = inputs(*heads, keys=QUERIES, dtype=torch.bfloat16)
    for causal in (True, False):
        assert worst(check(getattr(attention_kernels, kernel), *parts, None, causal=causal)) <= tolerance(torch.bfloat16)


@pytest.mark.parametrize("dtype, kernel", [(torch.bfloat16, "_FLASH"), (torch.float32, "_EFFICIENT")])
def test_values_of_another_size_on_cuda(on_cuda, monkeypatch, dtype, kernel):
    """As latent attention has them: fewer than queries and keys."""
    parts, kernel = inputs(dtype=dtype, value_channels=4), getattr(attention_kernels, kernel)
    monkeypatch.setattr(attention_kernels, "_fused", lambda widest, masked: attention_kernels._on_cuda(widest, masked))
    filled = kernel_for(parts[0], parts[2], masked=False)
    assert filled._kernel is kernel and worst(check(filled, *parts, None)) <= tolerance(dtype)


def test_the_stand_in_refuses_what_the_kernel_refuses(on_cuda, monkeypatch):
    parts, mask = inputs(dtype=torch.float32), mask_of("square", torch.float32)
    monkeypatch.setattr(attention_kernels, "_in_steps", lambda mask: mask)
    with pytest.raises(AssertionError, match="not correctly aligned"):
        attention_kernels._EFFICIENT.forward(*parts, mask, False, 0.3)


def test_which_kernel_of_cuda(on_cuda, monkeypatch):
    def chosen(dtype, channels=64, masked=False):
        return attention_kernels._on_cuda(torch.zeros(1, 2, 3, channels, dtype=dtype), masked)

    assert chosen(torch.bfloat16) is attention_kernels._FLASH
    assert chosen(torch.bfloat16, 200) is attention_kernels._EFFICIENT, "cards of desktops have no flash backward for it"
    assert chosen(torch.bfloat16, masked=True) is attention_kernels._EFFICIENT
    assert chosen(torch.float32) is attention_kernels._EFFICIENT
    assert chosen(torch.float32, 6) is chosen(torch.bfloat16, 12) is chosen(torch.float64) is attention_kernels.PLAIN
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda asked, debug=False: False)  # a card before Ampere
    assert chosen(torch.float16) is attention_kernels._EFFICIENT
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda asked, debug=False: False)
    assert chosen(torch.float16) is attention_kernels.PLAIN
