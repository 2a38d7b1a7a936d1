"""Arms: ways to fine-tune one encoder. An arm is its name; most are flags of `hf-memtune glue`."""

FULL, LORA, ADAPTERS = "full", "LoRA", "adapters"
RANK = 8
FLAGS = {
    FULL: (),
    LORA: ("--lora_r", str(RANK), "--lora_alpha", "16"),
    ADAPTERS: (),  # put in by `prepare`
    "MEFT1 float": ("--reversible", "meft1", "--reversible_numerics", "float"),
    "MEFT1 exact": ("--reversible", "meft1"),
    "centred exact": ("--reversible", "centred"),
}
DESCRIBED = {
    FULL: "every parameter",
    LORA: f"LoRA, r = {RANK}, on all linear layers; and the head",
    ADAPTERS: f"one adapter beside each MLP, r = {RANK}, ordinary gradients; and pooler and head",
    "MEFT1 float": "the published coupling and inverse, lambda = 0.1, adapters r = 8 (two a layer); and pooler and head",
    "MEFT1 exact": "the same in fixed point, lambda = 1/8, gradients exact",
    "centred exact": "the centred coupling, c = 1/16, the adapters of `adapters`, gradients exact",
}


def flags_of(arm: str) -> list[str]:
    """The flags of `hf-memtune glue` for an arm. Raises ValueError for another name."""
    if arm not in FLAGS:
        raise ValueError(f"arm {arm!r}: expected one of {', '.join(FLAGS)}")
    rank = ["--adapter_rank", str(RANK)] if "--reversible" in FLAGS[arm] else []
    return [*FLAGS[arm], *rank]


def prepare(arm: str, model) -> None:
    """Put ordinary adapters into `model`, for the arm that has no flag: those of the centred coupling, in layers that stay as they are.

    It is what make_reversible gives the layers above a reversible part; of a part with no layers there is no setting.
    """
    from contextlib import ExitStack

    from hf_memtune import ReversibleConfig
    from hf_memtune.architectures.stacks import layer_stacks
    from hf_memtune.methods.reversible.adapters import Switch, freeze_but, places_of, put_adapters, trained_parameters

    if arm != ADAPTERS:
        return
    config, stacks, kept = ReversibleConfig(reversible="centred", adapter_rank=RANK).filled(), layer_stacks(model), ExitStack()
    for stack in stacks:
        for layer in stack.layers:
            put_adapters(layer, stack.layout("an adapter"), config, places_of(config.reversible, False), Switch(), kept)
    freeze_but(model, trained_parameters(model, stacks, config), kept)
