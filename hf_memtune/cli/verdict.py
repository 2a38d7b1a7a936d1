"""The last lines of an answer: whether it fits, and the next thing to change."""


def verdict(found, room, run) -> list[str]:
    """found: a MemoryEstimate. room: a Room of memory.cards, or None where nothing was said of the memory. run: a Run of levers."""
    from hf_memtune.units import format_bytes

    if room is None:
        return ["Name the memory there is for a verdict: --budget 24GiB, or --gpu rtx4090."]
    spare = room.tensor_bytes - found.peak_bytes
    place = f"{format_bytes(room.tensor_bytes)} of tensors ({room.source})"
    if spare >= 0:
        return [
            f"verdict: fits {place}, with {format_bytes(spare)} to spare.",
            "next: train with these settings; hf-memtune longest says how far rows and batches can grow.",
        ]
    return [
        f"verdict: does not fit {place}: {format_bytes(-spare)} too much.",
        f"next: {_remedy(found, room, run)}; hf-memtune plan tries all ways in order.",
    ]


def _remedy(found, room, run) -> str:
    """The next thing to change, for the phase that needs most: what makes a step smaller changes no evaluation."""
    from hf_memtune.levers.table import least_offers

    if found.peak_phase == "evaluation":
        return less_evaluation(found)
    offers = least_offers(run)
    if sum(found.by_category[name] for name in ("weights", "gradients", "optimizer_state")) > room.tensor_bytes:
        offers = [offer for offer in offers if offer.changes.keys() & {"optim", "lora_r", "load_in_4bit"}]  # no other makes these smaller
    return str(offers[0]) if offers else "shorter rows, or a smaller model"


def less_evaluation(found) -> str:
    """What makes the evaluation of an estimate need less."""
    rows = found.conditions["evaluation_rows"]
    return f"per_device_eval_batch_size={rows // 2}" if rows > 1 else "eval_fraction=0, or no eval_split (no rows are held out)"
