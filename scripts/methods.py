"""Ways to run a step, by name: what `CausalLMStep` and `trace_causal_lm_step` are given; and real text to run them on.

    plain, checkpointing                 as transformers has them
    checkpointing + fused loss           the head's logits in chunks, recomputed: what rivals do
    checkpointing + logit-free loss      a stream of one chunk
    exact streaming N                    in chunks of N tokens; after commas: by chunks, attention kept, offloaded
    seeking R, TokenTune R, TokenSeek R  token seeking of a share R of the tokens: as it is by default, or with the preset of a paper

Behind streaming and seeking, before a comma, may stand ` + checkpointing`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_memtune import StreamingConfig, TokenSeekingConfig

LOGIT_FREE, FUSED_LOSS = "checkpointing + logit-free loss", "checkpointing + fused loss"
OFFLOADED = ", offloaded"
WHOLE_ROW = 2**20  # tokens of a chunk that is longer than any row
OF_CHECKPOINTING: dict[str, dict[str, Any]] = {
    "": {}, "fused loss": {"fused_loss": True}, "logit-free loss": {"strategy": StreamingConfig(sequence_chunk_size=WHOLE_ROW)},
}  # fmt: skip
OF_STREAMING: dict[str, dict[str, Any]] = {
    "by chunks": {"stream_order": "chunks"}, "attention kept": {"keep_attention_outputs": True}, "offloaded": {"kv_offload": True},
}  # fmt: skip
OF_SEEKING: dict[str, dict[str, Any]] = {
    "seeking": {}, "TokenTune": {"preset": "tokentune"}, "TokenSeek": {"preset": "tokenseek", "seek_schedule": "step"},
}  # fmt: skip


def options_of(name: str) -> dict[str, Any]:
    """What a step of this method is made with. Raises ValueError for a name of another form."""
    way, *more = name.split(", ")
    way, _, beside = way.partition(" + ")
    if name == "plain":
        return {}
    if way == "checkpointing" and beside in OF_CHECKPOINTING and not more:
        return {"checkpointing": True} | OF_CHECKPOINTING[beside]
    strategy = _strategy(way, more)
    if strategy is None or beside not in ("", "checkpointing"):
        raise ValueError(f"method {name!r}: expected one such as plain, {LOGIT_FREE}, exact streaming 512 + checkpointing, seeking 0.1")
    return {"strategy": strategy} | ({"checkpointing": True} if beside else {})


def _strategy(way: str, more: list[str]) -> StreamingConfig | None:
    kind, _, number = way.rpartition(" ")
    if kind == "exact streaming" and number.isdecimal() and set(more) <= set(OF_STREAMING):
        settings = {key: value for word in more for key, value in OF_STREAMING[word].items()}
        return StreamingConfig(sequence_chunk_size=int(number), **settings)
    if kind in OF_SEEKING and number.replace(".", "", 1).isdecimal() and not more:
        return TokenSeekingConfig(token_seeking=True, token_ratio=float(number), **OF_SEEKING[kind])
    return None


def chunk_of(name: str) -> int | None:
    """Tokens of its chunks; None where rows are not cut."""
    strategy = options_of(name).get("strategy")
    chunk = None if strategy is None else strategy.stream_chunk_size
    return None if chunk == WHOLE_ROW else chunk


def text_ids(model: Path, data: Path, rows: int, tokens: int) -> Tensor:
    """(rows, tokens) of the texts of a data set, end to end, and from the beginning again where they are too short."""
    from transformers import AutoTokenizer

    lines = map(json.loads, data.read_text().splitlines())
    text = "\n\n".join("\n".join(str(value) for value in line.values()) for line in lines)
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text[: 40 * rows * tokens])["input_ids"])
    return ids.repeat(-(-rows * tokens // len(ids)))[: rows * tokens].view(rows, tokens)
