"""The scores of one batch, computed from what the context pass left behind, each when a scorer first asks for it.

Shape legend: B rows of a batch, H heads, T tokens in a row, D hidden size, C channels of a head.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_memtune.architectures import Architecture
from hf_memtune.settings.methods import TokenSeekingConfig
from hf_memtune.core.labelled import put_labelled, take_labelled
from hf_memtune.core.loss import IGNORED, linear_loss_gradient, logit_rows
from hf_memtune.core.owed import OwedGradients
from hf_memtune.core.scorers import SeekingContext
from hf_memtune.core.scoring import attention_received, gradient_magnitude
from hf_memtune.core.store import KeyValueStore
from hf_memtune.errors import ConfigError, UnsupportedModelError
from hf_memtune.methods.attention.batch import BodyCall
from hf_memtune.methods.overrides import forward_as
from hf_memtune.methods.attention.passes import Records, StreamPass, WholePass
from hf_memtune.methods.attention.positions import at_positions
from hf_memtune.methods.attention.spans import attention_mask
from hf_memtune.methods.seeking.tail import only_last_block

if TYPE_CHECKING:
    from hf_memtune.methods.installed import InstalledStrategy


@dataclass
class TokenScores:
    """Lazy scores of one batch. `target` (B, T) int64 is the label of each position's own prediction, -100 for none.

    encoded: the output of the encoder, where the decoder of an encoder-decoder model goes in chunks.
    """

    architecture: Architecture
    config: TokenSeekingConfig
    seeking: "InstalledStrategy"
    call: BodyCall
    records: Records
    store: KeyValueStore
    chunk: int
    inputs: dict[str, Any]
    labels: dict[str, Tensor]
    target: Tensor | None
    encoded: Tensor | None = None
    _token_losses: dict[int, Tensor] = field(default_factory=dict)

    def context(self, stack: str) -> SeekingContext:
        """What a scorer sees of one stack."""
        rows = self.call.rows[stack]
        real = rows.scored
        if real is None:
            real = torch.ones(rows.batch, rows.length, dtype=torch.bool, device=rows.positions.device)
        compute: dict[str, Callable[[], Tensor]] = {
            "context_score": lambda: self.context_score(stack),
            "gradient_score": lambda: self.gradient_scores[stack],
            "token_loss": lambda: self.token_loss(stack),
            "last_hidden_state": lambda: self.last_hidden_state(stack),
        }
        return SeekingContext(self.call.input_ids(stack), real, self.labels.get("labels"), compute)

    def context_score(self, stack: str) -> Tensor:
        """(B, T): attention received in the context layer, eq. 3."""
        module, rule, call = self.records.calls[stack]
        rows = self.call.rows[stack]

        def visible(start: int, stop: int):
            span = rows.chunk(start, stop, visible=rows.length if self.chunk == rows.length else stop)
            return attention_mask(rule, span, span), span.visible

        query = torch.cat(self.records.queries[stack], dim=2)
        key, _ = self.store.prefix(module, rows.length)
        received, seen_by = attention_received(query, key, visible, real=rows.scored, **call)
        return received / seen_by.clamp_min(1) if self.config.context_normalize == "mean" else received

    @cached_property
    def gradient_scores(self) -> dict[str, Tensor]:
        """(B, T) for each stack: magnitude of the loss gradient at the last block's input, eq. 4."""
        self._require_tail()
        gradients = self._streamed_gradient() if self._streams else self._whole_gradient()
        return {stack: gradient_magnitude(g, self.config.gradient_norm) for stack, g in gradients.items()}

    def _require_tail(self) -> None:
        if self.seeking.facts.tail_problem:
            raise UnsupportedModelError(self.seeking.facts.tail_problem)

    @property
    def _streams(self) -> bool:
        return self.architecture.task.loss_per_token and self.chunk < self.call.rows["decoder"].length

    def _streamed_gradient(self) -> dict[str, Tensor]:
        """Chunks from last to first: what later chunks owe to a chunk's keys and values is complete when its turn comes."""
        rows, gradient, owed = self.call.rows["decoder"], [], OwedGradients()
        chunks = list(zip(range(0, rows.length, self.chunk), self.records.hidden["decoder"]))
        for start, hidden in reversed(chunks):
            hidden = hidden.requires_grad_()
            output = self._tail_chunk(rows.chunk(start, start + hidden.shape[1]), hidden, owed)
            cotangent = self._loss_gradient(output.detach(), start)
            gradient += torch.autograd.grad(output, hidden, cotangent)
        return {"decoder": torch.cat(gradient[::-1], dim=1)}

    def _tail_chunk(self, span, hidden: Tensor, owed: OwedGradients) -> Tensor:
        """(B, chunk, D): the last block's output for a chunk, differentiable where its input is."""
        spans = {name: rows.whole() for name, rows in self.call.rows.items()} | {"decoder": span}
        tail = StreamPass(spans, self.store, self.seeking.places, self.seeking.kernel_knows_causal, owed)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(hidden.requires_grad))
            stack.enter_context(at_positions(self.architecture, self.call, spans))
            stack.enter_context(self.seeking.running(tail))
            stack.enter_context(only_last_block(self.architecture.decoder.layers, hidden))
            return self.call.forward(**self.call.at(spans, self.encoded)).last_hidden_state

    def _whole_gradient(self) -> dict[str, Tensor]:
        """The last block on all tokens at once, through the model's own attention."""
        leaves = {name: torch.cat(parts, dim=1).requires_grad_() for name, parts in self.records.hidden.items()}
        with torch.enable_grad():
            body = self._whole_body(leaves)
            if self.architecture.task.loss_per_token:
                roots = body().last_hidden_state
                cotangents = self._loss_gradient(roots.detach(), 0)
            else:
                roots, cotangents = self._head(body, **self.labels).loss, None
            found = torch.autograd.grad(roots, list(leaves.values()), cotangents, allow_unused=True)
        return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found)}

    def _whole_body(self, leaves: dict[str, Tensor]) -> Callable:
        """The model's body from the inputs of its last blocks on, called like the body."""
        whole = self._whole_pass()
        arguments = self.call.arguments | self.call.at(whole.spans)
        if self.architecture.is_encoder_decoder:
            arguments["encoder_outputs"] = (self._encoder_output(leaves),)

        def body(*args, **kwargs):
            with self.seeking.running(whole), only_last_block(self.architecture.decoder.layers, leaves["decoder"]):
                return self.call.forward(**arguments)

        return body

    def _whole_pass(self) -> WholePass:
        spans = {name: rows.whole() for name, rows in self.call.rows.items()}
        return WholePass(spans, self.store, self.seeking.places, self.seeking.kernel_knows_causal)

    def _encoder_output(self, leaves: dict[str, Tensor]) -> Tensor:
        """The encoder's last block, from its recorded input, so that the decoder's gradient reaches it."""
        layers, encoder = self.architecture.stacks["encoder"].layers, self.architecture.stacks["encoder"].module
        with self.seeking.running(self._whole_pass()), only_last_block(layers, leaves["encoder"]):
            return encoder(**self.call.encoder_arguments()).last_hidden_state

    def _loss_gradient(self, hidden: Tensor, start: int) -> Tensor:
        """d(summed loss)/d(last hidden state) for one chunk, (B, chunk, D); keeps the token losses on the way."""
        target = self.target[:, start : start + hidden.shape[1]]
        gradient, losses = torch.zeros_like(hidden), torch.zeros(target.shape, device=hidden.device)
        labelled = target != IGNORED
        of_head = self._linear_head_gradient if self.seeking.facts.head_reads_body else self._own_head_gradient
        flat, loss = of_head(take_labelled(hidden, labelled), take_labelled(target, labelled))
        self._token_losses[start] = put_labelled(loss.to(losses.dtype), labelled, losses)
        return put_labelled(flat, labelled, gradient)

    def _linear_head_gradient(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        head = self.architecture.output_head
        bias = None if head.bias is None else head.bias.detach()
        return linear_loss_gradient(hidden_ND, head.weight.detach(), bias, target_N)

    def _own_head_gradient(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """The same through the model's own head, where it does more than one product; heads see tokens one by one."""
        rows = logit_rows(self.architecture.base.config.get_text_config().vocab_size)
        parts = [self._own_head_part(*pair) for pair in zip(hidden_ND.split(rows), target_N.split(rows))]
        gradients, losses = zip(*parts)
        return torch.cat(gradients), torch.cat(losses)

    def _own_head_part(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = self._head(lambda *a, **k: self.seeking.facts.body_output(last_hidden_state=leaf[None])).logits[0]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
            return torch.autograd.grad(losses.sum(), leaf)[0], losses.detach()

    def _head(self, body: Callable, **labels: Tensor):
        """The model's own head on what `body` returns in place of its body."""
        model = self.architecture.head_model
        with forward_as(self.architecture.base, body):
            return type(model).forward(model, **self.inputs, **labels)

    def token_loss(self, stack: str) -> Tensor:
        """(B, T) float32: loss of each position's own prediction, 0 without a label."""
        if self.architecture.is_encoder_decoder and stack == "encoder":
            raise ConfigError([
                f"token_scorer: the tokens of the encoder of {self.architecture.name} predict nothing, so they cannot be ranked by "
                "loss. Choose context, gradient or combined."
            ])
        if not self.architecture.task.loss_per_token:
            raise ConfigError([
                f"token_scorer: {self.architecture.name} has one loss for a row, not one for each token ({self.architecture.task.value})"
                ", so tokens cannot be ranked by loss. Choose context, gradient or combined."
            ])
        self._require_tail()
        if not self._token_losses:
            start = 0
            for hidden in self.last_hidden_state(stack).split(self.chunk, dim=1):
                self._loss_gradient(hidden, start)
                start += hidden.shape[1]
        return torch.cat([self._token_losses[start] for start in sorted(self._token_losses)], dim=1)

    def last_hidden_state(self, stack: str) -> Tensor:
        """(B, T, D): what comes out of the stack, recomputed from its last block's input."""
        rows, parts = self.call.rows["decoder"], []
        if self.chunk == rows.length:
            with torch.no_grad():
                leaves = {name: torch.cat(chunks, dim=1) for name, chunks in self.records.hidden.items()}
                if self.architecture.is_encoder_decoder and stack == "encoder":
                    return self._encoder_output(leaves)
                return self._whole_body(leaves)().last_hidden_state
        for start, hidden in zip(range(0, rows.length, self.chunk), self.records.hidden["decoder"]):
            parts.append(self._tail_chunk(rows.chunk(start, start + hidden.shape[1]), hidden.detach(), OwedGradients()))
        return torch.cat(parts, dim=1)
