"""What the tests of scores share with others."""

import torch

from tests.support.stepping import loss_of, seeking_on


def scores_seen(model, batch, *names, take=lambda model, batch: loss_of(model, batch)[0], again=False, **settings):
    """The named entries of every SeekingContext of one step, in the order of asking, by stack.

    take: takes the loss. again: whether it chooses a second time, after the model's own loss, which is then not used.
    """
    seen = []

    def scorer(context):
        seen.append({name: getattr(context, name).detach().clone() for name in names})
        return torch.rand(context.attention_mask.shape)

    with seeking_on(model, scorer, **settings) as seeking:
        take(model, batch).backward()
        stacks = ("decoder",) if seeking.config.streams else tuple(seeking.architecture.stacks)
    model.zero_grad()
    assert len(seen) == len(stacks) * (1 + again)
    return dict(zip(stacks, seen[-len(stacks) :]))


def column_sums(weights, real, normalize="sum"):
    counted = weights.mean(1) * real[:, :, None]
    if normalize == "sum":
        return counted.sum(1)
    return counted.sum(1) / ((weights[:, 0] > 0) & real[:, :, None]).sum(1).clamp_min(1)
