"""How many tokens a method sees, keeps and learns from."""

from collections import Counter

from hf_memtune.methods.events import Listener


class Counts(Listener):
    """All that was told since it was made, by name: seen, kept, learned, recomputed."""

    def __init__(self):
        self.by_name: Counter = Counter()

    def counted(self, **counts):
        self.by_name.update({name: int(count) for name, count in counts.items()})

    @property
    def share_with_gradient(self) -> float:
        """Positions that ran with gradient, of the tokens seen: those of a stream, or else the kept ones."""
        return self.by_name.get("recomputed", self.by_name["kept"]) / self.by_name["seen"]
