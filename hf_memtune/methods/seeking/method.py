"""Token seeking and ditching on any transformers model (TokenSeek, arXiv 2601.19739; TokenTune, arXiv 2501.18824).

    with TokenSeeking(model, TokenSeekingConfig(token_seeking=True, token_ratio=0.1)):
        model(**batch).loss.backward()

All tokens are seen forward, and `model(**batch)` gives outputs for all of them. Backward goes through the kept ones. With
token_gradient=cut keys, values and hidden states of the others are constants. Exactly that: the gradients equal those of a full run in
which they are detached. With stream the gradient of their loss is the true one, through all tokens.

The loss. Where it is the cross entropy of the model's own labels, the tokens are chosen before the head, and it is that of the kept ones:
their mean (token_selection=top), or an unbiased estimate of the mean over all labels (sample). Any other loss is that of all tokens, and
the kept ones are chosen in backward. token_ratio=1 is plain training, but for what token_gradient=skip leaves out.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_memtune.core.replay import replayed
from hf_memtune.core.scorers import Scorer, TokenScorer, make_scorer
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.attention.records import Records
from hf_memtune.methods.events import Listeners
from hf_memtune.methods.facts import Facts
from hf_memtune.methods.head import Head
from hf_memtune.methods.method import Method
from hf_memtune.methods.overrides import Override
from hf_memtune.methods.seeking.choice import Choice, Chooser
from hf_memtune.methods.seeking.ditched import DitchedCall
from hf_memtune.methods.seeking.head import ChoosingHead
from hf_memtune.methods.seeking.inspection import Inspected, Inspection
from hf_memtune.methods.seeking.reference import ReferenceLoss, reference_model, require_same_tokens
from hf_memtune.methods.seeking.streamed import ChosenStream, SkippingStream
from hf_memtune.methods.seeking.targets import targets
from hf_memtune.methods.streaming.encoder import encode
from hf_memtune.methods.streaming.method import connected, means_of
from hf_memtune.settings.protocol import filled_in
from hf_memtune.settings.scorers import BUILT_IN, facts_of
from hf_memtune.settings.seeking import TokenSeekingConfig

Lookup = Callable[[dict[str, Any]], dict[str, Tensor]]
"""Maps the inputs of a call of the model to scores of its tokens that were computed before, (B, T) by stack."""


class TokenSeeking(Method[TokenSeekingConfig]):
    """Token seeking on one model, until `remove()`.

    model: a transformers model with a head, or a PEFT model around one. scorer: a callable that replaces
    `config.token_scorer`; it maps a SeekingContext to scores (batch, tokens), larger is kept.
    looks_only: nothing but `inspect` will be asked; the model's calls are its own. lookup: if set, gives the scores in place of the scorer.
    Raises ConfigError and UnsupportedModelError before the model is touched.
    """

    why_gathered = (
        "Here each process runs as many passes as its own tokens need, and single layers by themselves to score them. sequence_chunk_size without "
        "token_seeking works with FSDP2."
    )

    def __init__(
        self, model: nn.Module, config: TokenSeekingConfig, scorer: TokenScorer | None = None, check: bool = True, looks_only: bool = False
    ):
        require_seeking(config)
        self._given_scorer = scorer
        self._reference_loss: ReferenceLoss | None = None
        self._reference_name = ""
        self.lookup: Lookup | None = None
        super().__init__(model, config, check, looks_only)
        self._chooser = Chooser(self.config, self.scorer, self.facts, self.listeners, self._reference_loss)

    def prepare(self) -> None:
        """Settle what the settings leave to the model, and find the modules, by id, whose attention is the context score, for each stack."""
        self.config = self._settled(self.config)
        if self._given_scorer is not None and self.config.always_keep is None:
            self.config = TokenSeekingConfig.of(self.config, always_keep="none")  # token_scorer is not read, so it is not random
        self.scorer = resolve_scorer(self.config, self._given_scorer)
        weighs = self.config.token_weight == "dft"
        self.scores_last_block = weighs or (self.scorer.facts.runs_last_block and self.config.token_selection != "labelled")
        self._load_reference(self.config)
        self.context_modules: dict[int, str] = {}
        wanted = filled_in(self.config.context_layer)
        for name, stack in self.architecture.stacks.items():
            if not -len(stack.layers) <= wanted < len(stack.layers):
                raise ConfigError(
                    [
                        f"context_layer: got {wanted}, expected a layer of the {name} of {self.architecture.name}, which has "
                        f"{len(stack.layers)} (0 to {len(stack.layers) - 1}, or -{len(stack.layers)} to -1)."
                    ]
                )
            self.context_modules |= {id(module): name for module in stack.layers[wanted].modules()}
        if found := self._without_token_losses():
            raise ConfigError(found)

    def _settled(self, config: TokenSeekingConfig) -> TokenSeekingConfig:
        return config if self.architecture.task.loss_per_token else config.for_row_loss()

    @property
    def reference_model(self) -> nn.Module | None:
        """The model that token_scorer=excess_loss compares with, or None."""
        return None if self._reference_loss is None else self._reference_loss.model

    def _load_reference(self, settings: TokenSeekingConfig) -> None:
        """What token_scorer=excess_loss compares with, once, on the device of the model; where these settings read such a score."""
        if settings.token_selection == "labelled" or not facts_of(settings.token_scorer).asks_for("reference_loss"):
            return
        base, name = self.architecture.base, filled_in(settings.reference_model)
        if self._reference_loss is not None:
            if name != self._reference_name:
                raise ConfigError([f"reference_model: got {name!r} beside {self._reference_name!r}. Compare with one at a time."])
            return
        require_same_tokens(name, getattr(base.config, "_name_or_path", ""))  # before the weights are read
        reference = reference_model(name, next(base.parameters()).device)
        config = TokenSeekingConfig(token_seeking=True, token_scorer="loss", context_chunk_size=self.config.context_chunk_size)
        looking = TokenSeeking(reference, config, looks_only=True)
        vocabulary = looking.architecture.base.config.get_text_config().vocab_size
        self._reference_loss, self._reference_name = ReferenceLoss(reference, looking, vocabulary), name

    def require(self, facts: Facts) -> None:
        super().require(facts)
        if facts.needs_all_tokens is None:
            return
        if self.config.token_gradient != "stream":
            raise UnsupportedModelError(
                f"{self.architecture.name}: token_gradient: got {self.config.token_gradient!r}, expected 'stream': {facts.needs_all_tokens}"
            )
        self._require_context(self.scorer)

    def _require_context(self, scorer: Scorer) -> None:
        """That the context layer attends, where a scorer reads it and not every layer does."""
        layers = range(len(self.architecture.decoder.layers))
        cache = self.router.cache
        attending = [number for number in layers if cache is not None and cache.attends(number) and number not in cache.by_hand]
        if scorer.facts.asks_for("context_score") and layers[filled_in(self.config.context_layer)] not in attending:
            raise ConfigError(
                [
                    f"context_layer: got {self.config.context_layer}, which does not attend in {self.architecture.name}. Expected one of "
                    f"{', '.join(map(str, attending)) or 'none: no layer attends, so choose token_scorer=random'}."
                ]
            )

    def _without_token_losses(self) -> list[str]:
        """Settings that weigh or choose losses of tokens, on a head that has one loss for a row."""
        if self.architecture.task.loss_per_token:
            return []
        task = self.architecture.task.value
        return [
            f"{name}: got {got!r} with {self.architecture.name}, which has one loss for a row, not one for each token ({task}). "
            f"Expected {expected!r}; for exact gradients in less memory set sequence_chunk_size without token_seeking."
            for name, got, expected, is_wrong in (
                ("token_gradient", self.config.token_gradient, "cut", self.config.token_gradient != "cut"),
                ("token_selection", self.config.token_selection, "top", self.config.token_selection != "top"),
                ("token_scorer", self.scorer.name, "gradient", self.scorer.facts.known_in_backward),
                ("token_weight", self.config.token_weight, "none", self.config.token_weight != "none"),
            )
            if is_wrong
        ]

    # -- calls of the model

    def make_head(self, inputs: dict[str, Any]) -> ChoosingHead:
        return ChoosingHead(self.architecture.output_head, inputs)

    def run(self, call: BodyCall, head: Head | None) -> Any:
        """One call of the body."""
        self.listeners.tell("counted", seen=sum(rows.real_tokens() for rows in call.rows.values()))
        if self.config.streams:
            return self._run_stream(encode(call), head)
        self.listeners.tell("shaped", 1, call.decoder)
        if self.config.keeps_all:
            self.listeners.tell("counted", kept=sum(rows.real_tokens() for rows in call.rows.values()))
            return None  # all tokens, in the model's own way
        return self._run_ditched(call, head)

    def _run_ditched(self, call: BodyCall, head: Head | None) -> Any:
        run = DitchedCall(self.router, call, self._choice(call, head, self._stacks(call)), self._context_chunk(call), self._records())
        self._run_context(run)
        if self._chooses_at_once:
            run.choice.at_once()
            tensors = run.placed(run.take_outputs(), run.focus(live=True))
        else:
            tensors = list(replayed(run))
            self._await_labels(run, head, tensors[0])
        encoded = tensors.pop() if run.gives_encoded else call.encoder_output
        return run.outputs.rebuilt(tensors, encoded)

    def _stacks(self, call: BodyCall) -> tuple[str, ...]:
        """Whose tokens are chosen: not those of an encoder that ran before the body."""
        return ("decoder",) if self.config.streams or call.encoded is not None else tuple(self.architecture.stacks)

    def _run_stream(self, call: BodyCall, head: Head | None) -> Any:
        kind = SkippingStream if self.config.token_gradient == "skip" else ChosenStream
        run = kind(means_of(self, head), call, self._choice(call, head, ("decoder",)), self._records())
        run.choice.takes_all = self.config.keeps_all
        self.listeners.tell("shaped", run.count, call.decoder)
        self._run_context(run)
        run.run_last()
        output = connected(run, head)
        self._await_labels(run, head, output.last_hidden_state)
        return output

    def _run_context(self, run: DitchedCall | ChosenStream) -> None:
        self.listeners.tell("context_begins", run.stored)
        run.run_context()
        self.listeners.tell("context_ends")

    def _choice(self, call: BodyCall, head: Head | None, stacks: tuple[str, ...]) -> Choice:
        inputs = call.arguments if head is None else call.arguments | head.inputs
        precomputed = None if self.lookup is None else self.lookup(inputs)
        return Choice(self._chooser, call, inputs, precomputed, stacks)

    def _await_labels(self, run: DitchedCall | ChosenStream, head: Head | None, hidden: Tensor) -> None:
        """Let the head choose, where the scorer does not need the loss of all tokens."""
        if isinstance(head, ChoosingHead) and (self.config.token_selection == "labelled" or not self.scorer.facts.known_in_backward):
            head.choose_for(run, hidden)

    @property
    def _chooses_at_once(self) -> bool:
        """Whether the loss is one of rows, and the choice reads neither labels nor a gradient."""
        return not self.architecture.task.loss_per_token and (self.lookup is not None or not self.scorer.facts.reads_loss)

    def _context_chunk(self, call: BodyCall) -> int:
        return min(self.config.context_chunk_size, call.decoder.length) if self.facts.is_causal else call.decoder.length

    def _records(self) -> Records:
        config = self.config
        scores = self.lookup is None and self.scorer.facts.reads_model and not config.keeps_all and config.token_selection != "labelled"
        return Records(self.context_modules, wanted=scores or config.token_weight == "dft")

    # -- looking

    def inspect(self, inputs: dict[str, Any], scores: tuple[str, ...] = (), others: Sequence[TokenSeekingConfig] = ()) -> Inspection:
        """Score and select the tokens of a batch without training on them.

        scores: names of SeekingContext, such as "context_score", that the result is to hold. others: the settings of this method with
        another token_scorer or always_keep, whose choices of the same batch, from the same pass, the result is to hold in `others`.
        """
        self.router  # raises when removed
        choosers = [self.chooser_of(config) for config in others]
        found = Inspection(scores, {name: value for name, value in inputs.items() if value is not None}, choosers)
        take_off = Override(self.architecture.base, partial(self._look, found)).put_on()
        try:
            with torch.no_grad(), self.aside(), contextlib.suppress(Inspected):
                self.architecture.head_model(**inputs)
            return found
        finally:
            take_off()

    def chooser_of(self, config: TokenSeekingConfig) -> Chooser:
        config = self._settled(config)
        scorer = resolve_scorer(config, None)
        if self.facts.needs_all_tokens is not None:
            self._require_context(scorer)
        self._load_reference(config)
        return Chooser(config, scorer, self.facts, Listeners(), self._reference_loss)

    def _look(self, found: Inspection, forward: Callable, *args, **kwargs):
        """In place of the body."""
        self.router.call_begins()
        call = BodyCall(self.architecture, forward, args, kwargs, self.router.packs)
        call = encode(call) if self.config.streams else call
        size = self.config.stream_chunk_size
        chunk = self._context_chunk(call) if size is None else min(size, call.decoder.length)
        stacks = self._stacks(call)
        silent = Chooser(self.config, self.scorer, self.facts, Listeners(), self._reference_loss)
        choice = Choice(silent, call, found.inputs, None, stacks)
        DitchedCall(self.router, call, choice, chunk, Records(self.context_modules)).run_context()
        found.see(choice, targets(self.architecture, found.inputs))
        raise Inspected


def require_seeking(config: TokenSeekingConfig) -> None:
    """Raises ConfigError for settings in which it is off, some of which then say something else."""
    if not config.token_seeking:
        raise ConfigError(
            ["token_seeking: got False, expected True where token seeking is asked for: TokenSeekingConfig(token_seeking=True)."]
        )


def resolve_scorer(config: TokenSeekingConfig, scorer: TokenScorer | None) -> Scorer:
    """The scorer to use: the user's own callable, or the one of that name. Raises ConfigError for an unknown name."""
    if scorer is not None:
        name = getattr(scorer, "__name__", type(scorer).__name__)
        return Scorer(f"{name} (your own)" if name in BUILT_IN else name, scorer)  # what is known of the built-in one is not true of it
    weights = filled_in(config.context_weight), filled_in(config.gradient_weight)
    return make_scorer(filled_in(config.token_scorer), *weights, config.token_selection == "sample")
