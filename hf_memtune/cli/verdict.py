"""The last lines of an answer: whether it fits, and the next thing to change."""


def verdict(peak_bytes: int, room, run) -> list[str]:
    """room: a Room of memory.cards, or None where nothing was said of the memory. run: a Run of levers."""
    from hf_memtune.levers.table import offers_of
    from hf_memtune.units import format_bytes

    if room is None:
        return ["Name the memory there is for a verdict: --budget 24GiB, or --gpu rtx4090."]
    spare = room.tensor_bytes - peak_bytes
    place = f"{format_bytes(room.tensor_bytes)} of tensors ({room.source})"
    if spare >= 0:
        return [
            f"verdict: fits {place}, with {format_bytes(spare)} to spare.",
            "next: train with these settings; hf-memtune longest says how far rows and batches can grow.",
        ]
    offers = [offer for offer in offers_of(run, one_each=True) if offer.missing is None]
    following = str(offers[0]) if offers else "shorter rows, or a smaller model"
    return [
        f"verdict: does not fit {place}: {format_bytes(-spare)} too much.",
        f"next: {following}; hf-memtune plan tries all ways in order.",
    ]
