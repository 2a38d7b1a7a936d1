"""What a short probe of a model finds out about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """is_causal: no token looks at a later one. decoder_is_causal: none of the decoder's does. has_plain_head: the logits are the linear
    head's output. head_reads_body: that head is given what the body returns (masked language models transform it first). body_output: the
    class of what the model's body returns. tail_problem: why the last block cannot run alone, which the gradient score needs, or None.
    needs_all_tokens: why no token can be left out, and what to do instead, or None.
    """

    is_causal: bool
    decoder_is_causal: bool
    has_plain_head: bool
    head_reads_body: bool
    body_output: type
    tail_problem: str | None = None
    needs_all_tokens: str | None = None
