"""Probabilities of draws, computed slowly."""

import torch


def slow_probability(scores, pool, draws):
    """One row, token by token: whoever would be more than certain is certain, and the others share what is left."""
    tokens = [t for t in range(len(scores)) if pool[t]]
    low, high = min(scores[t].item() for t in tokens), max(scores[t].item() for t in tokens)
    place = {t: (scores[t].item() - low) / (high - low) if high > low else 1.0 for t in tokens}
    share = {t: 0.5 / len(tokens) + 0.5 * place[t] / sum(place.values()) for t in tokens}
    certain = set()
    while True:
        rest = sum(share[t] for t in tokens if t not in certain)
        chance = {t: 1.0 if t in certain else (draws - len(certain)) * share[t] / rest for t in tokens}
        surplus = {t for t in tokens if t not in certain and chance[t] >= 1}
        if not surplus:
            return torch.tensor([chance.get(t, 0.0) for t in range(len(scores))], dtype=torch.float64)
        certain |= surplus
