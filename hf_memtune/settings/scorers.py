"""What is known of each built-in scorer of tokens: one table, which settings, methods and pages read. How they score: core/scorers.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScorerFacts:
    """A row of the table.

    reads: entries of SeekingContext that it asks for; None: of a function of one's own, which may ask for any. is_size: the size of its scores
    is that of a gradient, to which probabilities are to be proportional. changes_objective: it says which tokens should teach, not which of
    them stand for all.
    """

    reads: frozenset[str] | None = None
    is_size: bool = False
    changes_objective: bool = False

    def asks_for(self, *entries: str) -> bool:
        """Whether it is known to ask for one of these entries."""
        return self.reads is not None and not self.reads.isdisjoint(entries)

    def may_ask_for(self, *entries: str) -> bool:
        """Whether it is not known to leave them alone."""
        return self.reads is None or not self.reads.isdisjoint(entries)

    @property
    def reads_model(self) -> bool:
        """Whether it may need something of the pass over all tokens: not chance, nor the gradient that backward brings."""
        return self.reads is None or bool(self.reads - {"true_gradient"})

    @property
    def reads_loss(self) -> bool:
        """Whether it may need a loss, or the gradient of one: not chance, nor attention."""
        return self.reads is None or bool(self.reads - {"context_score"})

    @property
    def reads_token_loss(self) -> bool:
        """Whether it is known to ask for the loss of each token's own prediction, or for the gradient of that."""
        return self.asks_for("token_loss", "softmax_residual")

    @property
    def runs_last_block(self) -> bool:
        """Whether it is known to ask for gradients or losses that may take a run of the last block alone."""
        return self.reads_token_loss or self.asks_for("gradient_score")

    @property
    def known_in_backward(self) -> bool:
        """Whether it waits for the gradient of the loss that is taken."""
        return self.asks_for("true_gradient")


def _reading(*entries: str, **facts: bool) -> ScorerFacts:
    return ScorerFacts(frozenset(entries), **facts)


OF_ONES_OWN = ScorerFacts()
BUILT_IN = {
    "combined": _reading("context_score", "gradient_score"),
    "context": _reading("context_score"),
    "gradient": _reading("gradient_score"),
    "true_gradient": _reading("true_gradient", is_size=True),
    "softmax_residual": _reading("softmax_residual", is_size=True),
    "random": _reading(),
    "loss": _reading("token_loss"),
    "profit": _reading("token_loss", "has_label", changes_objective=True),
    "excess_loss": _reading("token_loss", "reference_loss", "has_label", changes_objective=True),
}


def facts_of(name: str | None) -> ScorerFacts:
    """Of a built-in scorer; of a registered one nothing is known."""
    return BUILT_IN.get(name or "", OF_ONES_OWN)
