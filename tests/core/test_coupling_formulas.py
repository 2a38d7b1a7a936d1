"""Couplings as their formulas are written, by hand and under plain autograd.

The twin of test_coupling.py takes its half steps from the library, and so would take a wrong one.
"""

import pytest
import torch

from hf_memtune.core.coupling import FloatArithmetic, centred, meft1, meft2, meft3
from hf_memtune.core.recompute import Arguments, Parameters
from hf_memtune.core.reversible import EnterStreams, LayerRun, LeaveStreams, Tape, run_layer
from tests.support.coupling import gradients_of, inputs, stack_of
from tests.support.tolerances import NOTICED, RELATIVE

C, BETA = 0.25, 0.5


def centred_by_hand(gain):
    def run(layers, x):
        newest, older = x, x
        for layer, _ in layers:
            newest, older = C * older + gain * layer(newest) + (1 - C - gain) * newest, newest
        return newest, older

    return run


def meft1_by_hand(layers, x):
    h1 = h2 = x
    for layer, adapter in layers:
        h1 = C * h1 + layer(h2)
        h2 = BETA * h2 + adapter(h1)
        h1, h2 = h2, h1
    return h2, h1


def meft2_by_hand(layers, x):
    h1 = h2 = x
    for layer, adapter in layers:
        h1 = C * h1 + adapter(h2)
        h2 = BETA * h2 + layer(h1)
        h1, h2 = h2, h1
    return h1, h2


def meft3_by_hand(layers, x):
    h1 = h2 = x
    for attention, mlp in layers:
        h1 = C * h1 + attention(h2)
        h2 = BETA * h2 + mlp(h1)
    return h2, h1


FORMULAS = {
    "centred, post-norm": (centred(C, True), centred_by_hand(1.0)),
    "centred, pre-norm": (centred(C, False), centred_by_hand(1 + C)),
    "meft1": (meft1(C, BETA), meft1_by_hand),
    "meft2": (meft2(C, BETA), meft2_by_hand),
    "meft3": (meft3(C, BETA), meft3_by_hand),
}
WEIGHTS = 0.3, 0.7  # of the newest and of the older stream: both count, and otherwise


def ours(coupling, blocks, x, beside):
    tape = Tape(FloatArithmetic(torch.float64))
    newest, older = EnterStreams.apply(x, tape)
    for position, block in enumerate(blocks):
        run = LayerRun(coupling, block.functions(), tape, position, Arguments((beside,), {}), Parameters([block]), x.device)
        newest, older, _ = run_layer(run, newest, older)
    return LeaveStreams.apply(newest, older, tape, WEIGHTS)


def by_hand(formula, blocks, x, beside, crossed=False):
    def functions(block):
        both = [lambda x, run=run: run(x, beside)[0] for run in (block.layer, block.adapter)]
        return both[::-1] if crossed else both

    newest, older = formula([functions(block) for block in blocks], x)
    return WEIGHTS[0] * newest + WEIGHTS[1] * older


@pytest.mark.parametrize("name", FORMULAS)
def test_a_coupling_is_its_formula(name):
    coupling, formula = FORMULAS[name]
    blocks, (x, beside) = stack_of(3, dropout=0.0), inputs()

    def differs(other, **options):
        found, expected = ours(coupling, blocks, x, beside), by_hand(other, blocks, x, beside, **options)
        pairs = zip([found, *gradients_of(found, blocks, x, beside)], [expected, *gradients_of(expected, blocks, x, beside)])
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs if b.norm() > 0)

    assert differs(formula) <= RELATIVE[torch.float64]
    assert differs(formula, crossed=True) > NOTICED
    others = [other for other_name, (_, other) in FORMULAS.items() if other_name != name]
    assert all(differs(other) > NOTICED for other in others)
