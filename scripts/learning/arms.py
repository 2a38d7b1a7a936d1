"""Arms: ways to train one model on the same rows. An arm is its name, from which its settings follow.

Of the study `quality`:

    plain                                   all tokens, ordinary backpropagation
    checkpointing                           the same, and activations are computed anew in backward
    streaming                               all tokens, exact gradients in chunks: must equal plain
    SCORER/SELECTION/GRADIENT/RATIO[/labels]    token seeking, such as random/sample/stream/10%/labels
    every/labelled/GRADIENT/100%            every token with a label, none drawn
    streaming+checkpointing                 the same with both: layer by layer
    plain@N, checkpointing@N, ...           the same, N rows at a time, as with gradient accumulation

SCORER: whatever token_scorer takes; with -mean behind it context_normalize=mean. GRADIENT: cut, stream or skip. RATIO: the percentage of
tokens that are kept. labels: chosen among labelled tokens only. Of the study `glue`: the keys of FLAGS, of `qa`
those of QA, of `few_shot` those of FEW_SHOT.
"""

PLAIN, CHECKPOINTING, STREAMING, TOKENTUNE, LABELS = "plain", "checkpointing", "streaming", "random/top/cut", "/labels"
BY_LAYERS = f"{STREAMING}+{CHECKPOINTING}"
AT_ONCE = "@"
EVERY_LABEL = "every/labelled/cut/100%"
CHUNKS = {"cut": 0, "stream": 2, "skip": 4}  # of the longest row: a stream has two, or four of which some can be skipped
SKIPPED_BELOW = 0.01

FULL, LORA, ADAPTERS, RANK = "full", "LoRA", "adapters", 8
_RANKED = ("--adapter_rank", str(RANK))
# the flags of `hf-memtune glue`, and what the page says of them
FLAGS = {
    FULL: (),
    LORA: ("--lora_r", str(RANK), "--lora_alpha", "16"),
    ADAPTERS: (),  # put in by learning/glue.py
    "MEFT1 float": ("--reversible", "meft1", "--reversible_numerics", "float", *_RANKED),
    "MEFT1 exact": ("--reversible", "meft1", *_RANKED),
    "centred exact": ("--reversible", "centred", *_RANKED),
}
DESCRIBED = {
    FULL: "every parameter",
    LORA: f"LoRA, r = {RANK}, on all linear layers; and the head",
    ADAPTERS: f"one adapter beside each MLP, r = {RANK}, ordinary gradients; and pooler and head",
    "MEFT1 float": "the published coupling and inverse, lambda = 0.1, adapters r = 8 (two a layer); and pooler and head",
    "MEFT1 exact": "the same in fixed point, lambda = 1/8, gradients exact",
    "centred exact": "the centred coupling, c = 1/16, the adapters of `adapters`, gradients exact",
}

# the flags of `hf-memtune qa`: MEFT's width of 64; meft1 in the lowest 8 layers, as in the recipes, for it changes what all of them say
_WIDE = ("--adapter_rank", "64")
QA = {
    PLAIN: (),
    STREAMING: ("--sequence_chunk_size", "64"),
    LORA: FLAGS[LORA],
    "MEFT1 exact": ("--reversible", "meft1", "--reversible_layers", "8", *_WIDE),
    "centred exact": ("--reversible", "centred", *_WIDE),
}

# The lines of a recipe that say how to train, and what stands in their place. random: TokenSeek but for its scores. ours: without a preset.
OF_A_METHOD = ("token_seeking", "preset", "token_ratio", "token_scorer", "seek_schedule", "sequence_chunk_size")
_SEEKING = {"token_seeking": "true"}
FEW_SHOT: dict[str, dict[str, str]] = {
    "plain": {},
    "random": {**_SEEKING, "preset": "tokenseek", "token_scorer": "random", "seek_schedule": "step"},
    "tokentune": {**_SEEKING, "preset": "tokentune"},
    "tokenseek": {**_SEEKING, "preset": "tokenseek"},
    "ours-0.1": {**_SEEKING, "token_ratio": "0.1"},
    "ours-0.3": {**_SEEKING, "token_ratio": "0.3"},
    "streaming": {"sequence_chunk_size": "512"},
}
NAMED = {"glue": FLAGS, "qa": QA, "few_shot": FEW_SHOT}


def way_of(arm: str) -> str:
    """The arm without the rows that it runs at a time."""
    return arm.partition(AT_ONCE)[0]


def at_once(arm: str) -> int | None:
    """The rows that are run at a time; None where it is the whole batch."""
    number = arm.partition(AT_ONCE)[2]
    return int(number) if number else None


def is_exact(arm: str) -> bool:
    """Whether its gradient is that of plain training."""
    return way_of(arm) in (PLAIN, CHECKPOINTING, STREAMING, BY_LAYERS)


def is_seeking(arm: str) -> bool:
    return not is_exact(arm)


def parts_of(arm: str) -> tuple[str, str, str, str, str]:
    """Scorer, selection, gradient, ratio and pool of an arm of token seeking. Raises ValueError for a name of another form."""
    parts = arm.removesuffix(LABELS).split("/")
    if len(parts) != 4 or parts[2] not in CHUNKS or not parts[3].removesuffix("%").isdigit():
        raise ValueError(
            f"arm {arm!r}: expected plain, checkpointing, streaming, {BY_LAYERS} or SCORER/SELECTION/GRADIENT/RATIO[/labels], such as {TOKENTUNE}/10%"
        )
    return (*parts, "labels" if arm.endswith(LABELS) else "all")


def settings_of(arm: str, max_length: int) -> dict:
    """The fields of TokenSeekingConfig, or of StreamingConfig, for rows of so many tokens; none where nothing is installed."""
    if not is_seeking(arm):
        return _chunked("stream", max_length) if way_of(arm) in (STREAMING, BY_LAYERS) else {}
    from hf_memtune.settings.scorers import facts_of

    scorer, selection, gradient, ratio, pool = parts_of(arm)
    if selection == "labelled":
        return {"token_selection": selection, "token_gradient": gradient, **_chunked(gradient, max_length)}
    name = scorer.removesuffix("-mean")
    normalized = {"context_normalize": "sum" if name == scorer else "mean"} if facts_of(name).asks_for("context_score") else {}
    return {
        "token_scorer": name,
        **normalized,
        "token_selection": selection,
        "token_gradient": gradient,
        "token_ratio": float(ratio.removesuffix("%")) / 100,
        "select_from": pool,
        "always_keep": "first_last" if (scorer, selection) == ("random", "top") else "none",  # as in TokenTune
        **_chunked(gradient, max_length),
    }


def _chunked(gradient: str, max_length: int) -> dict:
    if not CHUNKS[gradient]:
        return {}
    settings = {"sequence_chunk_size": max_length // CHUNKS[gradient]}
    return settings | ({"skip_threshold": SKIPPED_BELOW} if gradient == "skip" else {})


def check(study: str, arm: str) -> None:
    """Raises ValueError, which names the arm, for one that the study cannot run."""
    if study in NAMED:
        if arm not in NAMED[study]:
            raise ValueError(f"arm {arm!r}: expected one of {', '.join(NAMED[study])}")
        return
    if AT_ONCE in arm and (is_seeking(arm) or not arm.partition(AT_ONCE)[2].isdigit() or at_once(arm) == 0):
        raise ValueError(f"arm {arm!r}: expected rows at a time behind a way with exact gradients, such as {PLAIN}{AT_ONCE}1")
    if is_seeking(arm):
        from hf_memtune import TokenSeekingConfig
        from hf_memtune.core.scorers import scorer_names

        settings = settings_of(arm, max_length=128)  # what is wrong does not depend on it
        if settings.get("token_scorer", "random") not in scorer_names():
            raise ValueError(f"arm {arm!r}: expected a scorer among {', '.join(scorer_names())}")
        try:
            TokenSeekingConfig(token_seeking=True, **settings)
        except ValueError as error:
            raise ValueError(f"arm {arm!r}: {error}") from None
