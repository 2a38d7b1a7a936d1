"""Steps with dropout: their gradient is the slope of their loss, with the same random numbers in every evaluation."""

import torch

from tests.support.stepping import stream
from tests.support.tolerances import NOTICED

DROPOUT = {
    "gpt2": dict(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
    "gpt_neox": dict(attention_dropout=0.3, hidden_dropout=0.3),
    "bart": dict(attention_dropout=0.3, dropout=0.3, activation_dropout=0.3),
    "llama": dict(attention_dropout=0.3),
}
# Central differences of the loss of a step, whose random numbers are the same in every evaluation: as exact as the loss is
# smooth, which in Llama is no more than its norms, in float32, allow.
SLOPE_TOLERANCE = {"llama": NOTICED}
STEP = {"llama": 1e-3}


def seeded(model, batch, chunk, seed=3, order=None):
    torch.manual_seed(seed)
    return stream(model, batch, chunk, order)


def slope_error(model, batch, chunk, step=1e-5, order=None):
    """Relative error of the streamed gradient as the slope of the streamed loss, along the gradient itself and across."""
    found = seeded(model, batch, chunk, order=order).gradients
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    size = sum(g.square().sum() for g in found.values()).sqrt()
    random = {name: torch.randn_like(p) * found[name].norm() / p.numel() ** 0.5 for name, p in parameters.items()}
    errors = []
    for direction in (found, {name: g + random[name] for name, g in found.items()}):
        expected = sum((found[name] * d).sum() for name, d in direction.items())
        up, down = (moved_loss(model, batch, chunk, parameters, direction, sign * step / size, order) for sign in (1, -1))
        errors.append(abs((up - down) / (2 * step / size) - expected) / abs(expected))
    return float(max(errors))


def moved_loss(model, batch, chunk, parameters, direction, distance, order):
    with torch.no_grad():
        before = {name: p.clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.add_(direction[name] * distance)
    loss = seeded(model, batch, chunk, order=order).loss
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(before[name])
    return loss
