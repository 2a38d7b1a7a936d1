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
        f"next: {remedy(found, room, run)}; hf-memtune plan tries all ways in order.",
    ]


def remedy(found, room, run) -> str:
    """The next thing to change: what makes smaller the part of the peak that decides."""
    from hf_memtune.levers.table import offers_of

    wanted = _wanted(found, room)
    if wanted is None and found.peak_phase == "evaluation":  # which nothing that makes a step smaller changes
        return less_evaluation(found)
    offers = [offer for offer in offers_of(run) if wanted is None or wanted & offer.changes.keys()]
    if not offers:
        return "a smaller model, or more memory" if wanted else "shorter rows, or a smaller model"
    best = next((offer for offer in offers if offer.missing is None), offers[0])
    return str(best) if best.missing is None else f"{best}; {best.missing}"


def _wanted(found, room) -> set[str] | None:
    """Settings, one of which it takes, since what is there in any case is too much; None: it is not."""
    settings, in_any_case = {"optim", "lora_r", "load_in_4bit"}, found.by_category["weights"]
    if in_any_case > room.tensor_bytes:
        return settings - {"optim", "lora_r"}
    if (in_any_case := in_any_case + found.by_category["gradients"]) > room.tensor_bytes:
        return settings - {"optim"}
    return settings if in_any_case + found.by_category["optimizer_state"] > room.tensor_bytes else None


def less_evaluation(found) -> str:
    """What makes the evaluation of an estimate need less."""
    rows = found.conditions["evaluation_rows"]
    return f"per_device_eval_batch_size={rows // 2}" if rows > 1 else "eval_fraction=0, or no eval_split (no rows are held out)"
