"""Whose turn it is: clients in a ring, each with its own line."""

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


class FairQueue(Generic[Item]):
    """A bounded queue that serves clients in turn, and each client's items in their order.

    A client that puts in twenty waits as long for its second as one that puts in one and comes
    later: between two items of one client every other client has its turn.
    """

    def __init__(self, most: int, most_each: int) -> None:
        """Hold ``most`` items at most, and ``most_each`` of one client."""
        self._most = most
        self._most_each = most_each
        self._lines: OrderedDict[str, deque[Item]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def check(self, client: str, retry_after: int = 1) -> None:
        """Raise ``Busy`` where one more of this client's has no room."""
        if self._size >= self._most:
            raise Busy(f"{self._size} jobs are waiting already: try again later", retry_after)
        if len(self._lines.get(client, ())) >= self._most_each:
            raise Busy(
                f"{self._most_each} of your jobs are waiting already: try again later", retry_after
            )

    def put(self, client: str, item: Item) -> None:
        """Put an item at the end of its client's line."""
        self._lines.setdefault(client, deque()).append(item)
        self._size += 1

    def pop(self) -> Item | None:
        """Take the next item, or None; its client goes to the end of the ring."""
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        item = line.popleft()
        self._size -= 1
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out before its turn; False where it does not wait."""
        line = self._lines.get(client)
        if line is None or item not in line:
            return False
        line.remove(item)
        self._size -= 1
        if not line:
            del self._lines[client]
        return True

    def __iter__(self) -> Iterator[Item]:
        """All items in the order in which they will be taken."""
        lines = [deque(line) for line in self._lines.values()]
        while lines:
            for line in lines:
                yield line.popleft()
            lines = [line for line in lines if line]
