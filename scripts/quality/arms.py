"""Arms: ways to train one model on the same rows. An arm is its name, from which its settings follow.

    plain                                   all tokens, ordinary backpropagation
    streaming                               all tokens, exact gradients in chunks: must equal plain
    SCORER/SELECTION/GRADIENT/RATIO[/labels]    token seeking, such as random/sample/stream/10%/labels

SCORER: random, context, gradient, combined, combined-mean (context_normalize=mean) or loss. SELECTION: top or sample.
GRADIENT: cut, stream or skip. RATIO: the percentage of tokens that are kept. labels: chosen among labelled tokens only.
"""

from itertools import product

PLAIN, STREAMING, TOKENTUNE, LABELS = "plain", "streaming", "random/top/cut", "/labels"
SCORERS = ("random", "context", "gradient", "combined", "combined-mean", "loss")
SELECTIONS = ("top", "sample")
GRADIENTS = ("cut", "stream", "skip")
# rows are short here: 128 tokens are two chunks of a stream, or four chunks of which some can be skipped
CHUNKS = {"cut": {}, "stream": {"sequence_chunk_size": 64}, "skip": {"sequence_chunk_size": 32, "skip_threshold": 0.01}}


def crossed(scorers=SCORERS, selections=SELECTIONS, gradients=GRADIENTS, ratios=("10%",), suffix: str = "") -> tuple[str, ...]:
    """The names of every combination, the scorer changing slowest."""
    return tuple("/".join(parts) + suffix for parts in product(scorers, selections, gradients, ratios))


def settings_of(arm: str) -> dict:
    """The fields of TokenSeekingConfig, or of StreamingConfig; none for plain training. Raises ValueError for another name."""
    if arm == PLAIN:
        return {}
    if arm == STREAMING:
        return dict(CHUNKS["stream"])
    scorer, selection, gradient, ratio, pool = parts_of(arm)
    return {
        "token_scorer": scorer.removesuffix("-mean"),
        "context_normalize": "mean" if scorer.endswith("-mean") else "sum",
        "token_selection": selection,
        "token_gradient": gradient,
        "token_ratio": float(ratio.removesuffix("%")) / 100,
        "select_from": pool,
        "always_keep": "first_last" if (scorer, selection) == ("random", "top") else "none",  # as in TokenTune
        **CHUNKS[gradient],
    }


def parts_of(arm: str) -> tuple[str, str, str, str, str]:
    """Scorer, selection, gradient, ratio and pool of an arm of token seeking. Raises ValueError for another name."""
    parts = arm.removesuffix(LABELS).split("/")
    allowed = (SCORERS, SELECTIONS, GRADIENTS)
    if len(parts) != 4 or not all(part in known for part, known in zip(parts, allowed)) or not parts[3].endswith("%"):
        raise ValueError(f"arm {arm!r}: expected plain, streaming or SCORER/SELECTION/GRADIENT/RATIO[/labels], such as {TOKENTUNE}/10%")
    scorer, selection, gradient, ratio = parts
    return scorer, selection, gradient, ratio, "labels" if arm.endswith(LABELS) else "all"


def is_seeking(arm: str) -> bool:
    return arm not in (PLAIN, STREAMING)


def install(arm: str, model):
    """The strategy of this arm on the model, to be removed after use; None for plain training."""
    from hf_memtune import TokenSeeking, TokenSeekingConfig

    if arm == PLAIN:
        return None
    if arm == STREAMING:
        from hf_memtune import Streaming, StreamingConfig

        return Streaming(model, StreamingConfig(**settings_of(arm)))
    return TokenSeeking(model, TokenSeekingConfig(token_seeking=True, **settings_of(arm)))
