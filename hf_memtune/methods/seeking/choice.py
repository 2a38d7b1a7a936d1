"""Which tokens of one call are kept: chosen once, as soon as what the scorer reads is known.

Where the loss is the cross entropy of the model's own labels, that is before the head, which then sees the kept tokens alone. For any other
loss, and for scores of the true gradient, it is when backward has brought dL/dhidden of all tokens.

Shape legend: B rows of a batch, T tokens in a row, D hidden size.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_memtune.core.loss import IGNORED
from hf_memtune.core.recompute import forget_casts
from hf_memtune.core.sampling import Draw, probabilities, sample
from hf_memtune.core.scorers import Scorer, SeekingContext
from hf_memtune.core.selection import Selection, select
from hf_memtune.errors import ConfigError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.events import Listeners
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.overrides import evaluating
from hf_memtune.methods.seeking.forced import forced_tokens
from hf_memtune.methods.seeking.last_block import LastBlock
from hf_memtune.methods.seeking.loss_gradient import Known, LossGradient, OfRows, OfTargets
from hf_memtune.methods.seeking.reference import ReferenceLoss
from hf_memtune.methods.seeking.targets import LABEL_NAMES, targets
from hf_memtune.methods.seeking.token_scores import TokenScores
from hf_memtune.settings.protocol import filled_in
from hf_memtune.settings.seeking import TokenSeekingConfig

NOT_WEIGHED = (
    "token_weight: got 'dft', but a loss of this step has its tokens chosen after it is taken: it is not the cross entropy of the model's own logits, or "
    "their head is no plain linear layer. Neither that loss nor the head would be weighed. Leave token_weight out; where a trainer has such a loss of "
    "its own, as trl's loss_type=dft, set that in its place."
)
NOT_LEFT_OUT = (
    "token_scorer: got {!r}, which says which tokens teach, but a loss of this step has its tokens chosen after it is taken: it is not the cross entropy "
    "of the model's own logits, or their head is no plain linear layer. The head, which is trained here, would learn from the tokens that are left out. "
    "Train without it (model.get_output_embeddings().requires_grad_(False), or LoRA on the layers alone), or train by MemEfficientTrainer on labels."
)
FLOORS = {True: 0.25, False: 0.5}  # share of even draws, by whether scores are sizes of gradients


@dataclass(frozen=True)
class Chooser:
    """How the calls of one model choose. listeners: who is told. reference: of scores that compare with another model."""

    config: TokenSeekingConfig
    scorer: Scorer
    facts: Facts
    listeners: Listeners
    reference: ReferenceLoss | None = None

    @property
    def draw(self) -> Draw:
        """How token_selection=sample draws."""
        return Draw(floor_of(self.config, self.scorer), self.scorer.facts.is_size, self.config.weight_cap)

    @property
    def threshold(self) -> float | None:
        """The score below which tokens are left out, or None; not of a function in the place of the scorer that the settings name."""
        return self.config.threshold if self.scorer.name == self.config.token_scorer else None


def floor_of(config: TokenSeekingConfig, scorer: Scorer) -> float:
    """Share of even draws."""
    return FLOORS[scorer.facts.is_size] if config.sample_floor is None else config.sample_floor


class Choice:
    """The choice of one call. inputs: of the call of the model; precomputed: scores (B, T) by stack, from an earlier pass, or None.

    stacks: whose tokens are chosen. takes_all: whether every token is kept, one of padding that carries a label too, as in plain
    training. selection: by stack, None before the choice. target: (B, T) int64, the labels it was made for, or None. scores: what they
    were chosen by.
    """

    takes_all = False
    _is_counted = True

    def __init__(self, chooser: Chooser, call: BodyCall, inputs: dict, precomputed: dict[str, Tensor] | None, stacks: tuple[str, ...]):
        self.chooser, self.call, self.precomputed, self.stacks = chooser, call, precomputed, stacks
        self.inputs = {name: value for name, value in inputs.items() if value is not None}
        self.block: LastBlock | None = None  # set by who ran the pass over all tokens
        self.selection: dict[str, Selection] | None = None
        self.target: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.scores: TokenScores | None = None

    @property
    def decoder(self) -> Selection:
        """The kept tokens that have outputs."""
        return self.made["decoder"]

    @property
    def made(self) -> dict[str, Selection]:
        """The selection, of a choice that is made."""
        assert self.selection is not None, "tokens are chosen by_labels, at_once or by_gradient"
        return self.selection

    def seen(self, stack: str) -> SeekingContext:
        """What a scorer sees of a stack, of a choice that is being made, or is."""
        assert self.scores is not None, "scores are let go of with the choice"
        return self.scores.context(stack)

    def again(self) -> "Choice":
        """For another loss of the same call, whose tokens are counted already."""
        other = Choice(self.chooser, self.call, self.inputs, self.precomputed, self.stacks)
        other.takes_all, other._is_counted = self.takes_all, False
        return other

    # -- the three times to choose

    def by_labels(self, target: Tensor, hidden: Tensor | None = None) -> None:
        """Before the head: target (B, T) is the label of each position's own prediction, -100 for none. hidden: (B, T, D), what the head is
        given, where that is what the body returned."""
        if hidden is not None and self.block is not None:
            self.block.known = hidden
        self._see_rows_of_labels(target != IGNORED)
        real = None if self.takes_all else self.call.decoder.scored
        # padding is never kept: what it would predict must not sway the scores
        self.target = target if real is None else target.masked_fill(~real, IGNORED)
        architecture = self.call.architecture
        self._choose(OfTargets(architecture, self.chooser.facts, self.target, self.without_labels()), self.target != IGNORED)
        self._count(learned=self.learned.sum())
        if self._is_counted and not self.takes_all and self.chooser.config.token_selection == "top":
            self.chooser.listeners.tell("loss_of_kept")

    def at_once(self) -> None:
        """After the pass over all tokens: for scores that read no loss, or the model's own loss of rows."""
        labels = {k: v for k, v in self.inputs.items() if k in LABEL_NAMES}
        assert self.block is not None  # the pass over all tokens comes first
        self._choose(OfRows(self.call.architecture, self.chooser.facts, self.without_labels(), labels, self.block.output), None)

    def by_gradient(self, gradient: Tensor | None) -> None:
        """In backward: gradient (B, T, D) is dL/dhidden, None for 0; a token without any has no part in the loss."""
        self._require_nothing_of_the_loss()
        if gradient is None:  # a loss of router logits alone
            rows = self.call.decoder
            gradient = torch.zeros(rows.batch, rows.length, 1, device=rows.positions.device)
        labelled = (gradient != 0).any(-1)
        self._see_rows_of_labels(labelled)
        target = targets(self.call.architecture, self.inputs)
        of_labels = None if target is None else OfTargets(self.call.architecture, self.chooser.facts, target, self.without_labels())
        if not self.call.architecture.task.loss_per_token:  # the gradient of one position is that of all tokens of its row
            self._choose(Known(gradient, of_labels), None, gradient)
            return
        self._choose(Known(gradient, of_labels), labelled, gradient)
        self._count(learned=(self.decoder.kept_mask() & labelled).sum())

    def _require_nothing_of_the_loss(self) -> None:
        """Raises ConfigError where what is learned is to be another loss, which was taken already, and of which the head has its gradient."""
        found, scorer = [], self.chooser.scorer
        if self.chooser.config.token_weight == "dft":
            found.append(NOT_WEIGHED)
        head = self.call.architecture.head_model.get_output_embeddings()
        if scorer.facts.changes_objective and head is not None and any(p.requires_grad for p in head.parameters()):
            found.append(NOT_LEFT_OUT.format(scorer.name))
        if found:
            raise ConfigError(found)

    @property
    def learned(self) -> Tensor:
        """(B, T) bool: kept tokens with a label."""
        assert self.target is not None  # of a choice by labels
        return self.decoder.kept_mask() & (self.target != IGNORED)

    @property
    def weight(self) -> Tensor | None:
        """(B, T): what the loss of each kept token counts for; None: 1 each."""
        if self.decoder.weight is None:
            return None
        zeros = torch.zeros(
            self.decoder.index.shape[0], self.decoder.length, dtype=self.decoder.weight.dtype, device=self.decoder.weight.device
        )
        return zeros.scatter(1, self.decoder.index, self.decoder.weight)

    def scale(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """What the summed loss of the kept tokens is multiplied by to stand for that of all labels of `target`: a scalar of `dtype`.

        top: the number of labels over that of kept ones, so that the loss is the mean over the kept. sample: the weights see to it; only
        labels on padding, which can never be kept, are left.
        """
        labels = (target != IGNORED).sum()
        assert self.target is not None  # of a choice by labels
        counted = self.learned.sum() if self.chooser.config.token_selection == "top" else (self.target != IGNORED).sum()
        return labels.to(dtype) / counted.clamp_min(1)

    # -- choosing

    def _choose(self, loss: LossGradient, labelled: Tensor | None, gradient: Tensor | None = None) -> None:
        labels = self.inputs.get("labels")
        if labels is None and self.target is not None:
            labels = F.pad(self.target, (1, -1), value=IGNORED) if self.call.architecture.shifts_labels else self.target
        assert self.block is not None  # the pass over all tokens comes first
        self.scores = TokenScores(self.chooser.config, self.chooser.facts, self.block, loss, labels, gradient, self.chooser.reference)
        self.selection = {name: self._select(name, labelled if name == "decoder" else None) for name in self.stacks}
        forget_casts()  # those of scores
        self._count(kept=sum(self._kept(name) for name in self.stacks))
        self.chooser.listeners.tell("chosen", self.selection)

    def _count(self, **counts: Tensor | int) -> None:
        if self._is_counted:
            self.chooser.listeners.tell("counted", **counts)

    def _kept(self, stack: str) -> Tensor | int:
        return self.call.rows[stack].real_tokens() if self.takes_all else sum(self.made[stack].counts)

    def _select(self, stack: str, labelled: Tensor | None) -> Selection:
        config, rows = self.chooser.config, self.call.rows[stack]
        if self.takes_all:
            return select(rows.positions.new_zeros(rows.batch, rows.length), 1.0)
        self.values[stack] = self._scores_of(stack)
        given = self.values[stack], self._ratio, rows.scored, *self._eligible(stack, labelled)
        found = sample(*given, how=self.chooser.draw) if config.token_selection == "sample" else select(*given)
        return self._weighed(found, stack) if config.token_weight == "dft" and stack == "decoder" else found

    @property
    def _ratio(self) -> float:
        return 1.0 if self.chooser.config.token_selection == "labelled" else filled_in(self.chooser.config.token_ratio)

    def _scores_of(self, stack: str) -> Tensor:
        rows = self.call.rows[stack]
        if self.chooser.config.token_selection == "labelled":
            return torch.zeros(rows.batch, rows.length, device=rows.positions.device)
        if self.precomputed is not None:
            return self.precomputed[stack]
        with torch.no_grad(), evaluating(self.call.architecture.head_model):
            return self.chooser.scorer(self.seen(stack))

    def _weighed(self, found: Selection, stack: str) -> Selection:
        """Each kept token's loss times the probability of its label (DFT, arXiv 2508.05629, eq. 9). Tokens of an encoder have no loss."""
        with torch.no_grad(), evaluating(self.call.architecture.head_model):
            probability = found.gather((-self.seen(stack).token_loss).exp(), fill=1)
        return replace(found, weight=probability if found.weight is None else found.weight * probability)

    def _eligible(self, stack: str, labelled: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Candidates and forced tokens, (B, T) bool or None, as `select` and `sample` take them."""
        config = self.chooser.config
        forced = forced_tokens(
            self.call.architecture,
            self.call.rows[stack],
            config.kept_always == "first_last",
            self.chooser.facts.is_causal,
            self.call.input_ids(stack),
            self.inputs,
        )
        is_of_labels = config.token_selection == "labelled" or config.select_from == "labels"
        candidates = labelled if is_of_labels else None
        if (least := self.chooser.threshold) is not None:
            above = self.values[stack] >= least
            candidates = above if candidates is None else candidates & above
        return candidates, forced

    # -- looking

    def of_other(self, chooser: Chooser) -> "Choice":
        """What another scorer chooses of this call, once this choice is made by labels or at once, from what was computed for it."""
        other = Choice(chooser, self.call, self.inputs, None, self.stacks)
        other._is_counted = False
        other.block, other.target, other.scores = self.block, self.target, self.scores
        other.selection = {name: other._select(name, other._labelled(name)) for name in self.stacks}
        return other

    def probability(self, stack: str) -> Tensor | None:
        """(B, T) float64: with which each token is kept by a choice by labels or at once; None where none is drawn."""
        config, rows = self.chooser.config, self.call.rows[stack]
        if config.token_selection != "sample":
            return None
        eligible = self._eligible(stack, self._labelled(stack))
        return probabilities(self.values[stack], self._ratio, rows.scored, *eligible, how=self.chooser.draw)

    def _labelled(self, stack: str) -> Tensor | None:
        return None if self.target is None or stack != "decoder" else self.target != IGNORED

    def without_labels(self) -> dict:
        """The inputs of the call of the model, for its head."""
        return {k: v for k, v in self.inputs.items() if k not in (*LABEL_NAMES, "num_items_in_batch")}

    def _see_rows_of_labels(self, labelled: Tensor) -> None:
        """The usual sequence-to-sequence batch has no mask for its decoder, whose padding shows in its labels alone."""
        if self.call.architecture.is_encoder_decoder and self.call.arguments.get("decoder_attention_mask") is None:
            self.call.rows["decoder"] = replace(self.call.decoder, labelled_until=_up_to_last(labelled))


def _up_to_last(labelled: Tensor) -> Tensor:
    """(B, T) bool. A row without any label is taken whole."""
    positions = torch.arange(labelled.shape[1], device=labelled.device)
    last = torch.where(labelled, positions, -1).amax(1, keepdim=True)
    return (positions <= last) | (last < 0)
