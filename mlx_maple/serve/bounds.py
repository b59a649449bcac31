"""How much is open at once, of all peers together and of each."""

from collections import Counter


class Bound:
    """A number of things that may be open: connections, streams, bytes."""

    def __init__(self, most: int, most_each: int) -> None:
        """Allow ``most`` in all, and ``most_each`` of one peer."""
        self._most = most
        self._most_each = most_each
        self._open: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def take(self, peer: str, count: int = 1) -> bool:
        """Count some more of a peer's; False, and nothing counted, where they have no room."""
        if self._size + count > self._most or self._open[peer] + count > self._most_each:
            self._forget(peer)
            return False
        self._open[peer] += count
        self._size += count
        return True

    def give(self, peer: str, count: int = 1) -> None:
        """They are open no more."""
        self._open[peer] -= count
        self._size -= count
        self._forget(peer)

    def _forget(self, peer: str) -> None:
        if not self._open[peer]:
            del self._open[peer]
