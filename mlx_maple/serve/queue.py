"""Whose turn it is: peers in a ring, in each its clients in a ring, each with its own line."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Busy(Exception):
    """No more can wait; one line.

    Attributes:
        retry_after: whole seconds until it may be worth while to ask again.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class Ring(Generic[Item]):
    """Lines that are served in turn, each in its order; a line's items are items or rings."""

    def __init__(self) -> None:
        self.lines: OrderedDict[str, deque[Item]] = OrderedDict()

    def pop(self) -> Item | None:
        """Take the next item, or None; its line goes to the end of the ring."""
        if not self.lines:
            return None
        name, line = next(iter(self.lines.items()))
        item = line.popleft()
        if line:
            self.lines.move_to_end(name)
        else:
            del self.lines[name]
        return item

    def remove(self, name: str, item: Item) -> bool:
        """Take an item out before its turn; False where it does not wait."""
        line = self.lines.get(name)
        if line is None or item not in line:
            return False
        line.remove(item)
        if not line:
            del self.lines[name]
        return True

    def __iter__(self) -> Iterator[Item]:
        """All items in the order in which they will be taken."""
        lines = [deque(line) for line in self.lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]


class FairQueue(Generic[Item]):
    """A bounded queue that serves peers in turn, and each peer's clients in turn.

    A client is "peer/name": the peer is an address, the name is what it calls itself. Names are
    free to make up, so they only share out their own peer's turns, and bounds go by the peer. One
    that puts in twenty waits as long for its second as one that puts in one and comes later.
    """

    def __init__(self, most: int, most_each: int) -> None:
        """Hold ``most`` items at most, and ``most_each`` of one peer."""
        self._most = most
        self._most_each = most_each
        self._peers: OrderedDict[str, Ring[Item]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._sizes.values())

    def check(self, client: str, retry_after: int = 1) -> None:
        """Raise ``Busy`` where one more of this client's has no room."""
        if len(self) >= self._most:
            raise Busy(f"{len(self)} jobs are waiting already: try again later", retry_after)
        if self._sizes.get(_peer(client), 0) >= self._most_each:
            raise Busy(
                f"{self._most_each} jobs from your address are waiting already: try again later",
                retry_after,
            )

    def put(self, client: str, item: Item) -> None:
        """Put an item at the end of its client's line."""
        peer = _peer(client)
        ring = self._peers.setdefault(peer, Ring())
        ring.lines.setdefault(client, deque()).append(item)
        self._sizes[peer] = self._sizes.get(peer, 0) + 1

    def pop(self) -> Item | None:
        """Take the next item, or None; its peer goes to the end of the ring."""
        if not self._peers:
            return None
        peer, ring = next(iter(self._peers.items()))
        item = ring.pop()
        self._peers.move_to_end(peer)
        self._one_less(peer)
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out before its turn; False where it does not wait."""
        peer = _peer(client)
        if peer not in self._peers or not self._peers[peer].remove(client, item):
            return False
        self._one_less(peer)
        return True

    def __iter__(self) -> Iterator[Item]:
        """All items in the order in which they will be taken."""
        rest: Ring[Item] = Ring()
        for peer, ring in self._peers.items():
            rest.lines[peer] = deque(ring)
        return iter(rest)

    def _one_less(self, peer: str) -> None:
        self._sizes[peer] -= 1
        if not self._sizes[peer]:
            del self._sizes[peer], self._peers[peer]


def _peer(client: str) -> str:
    return client.partition("/")[0]
