"""Whose turn it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_maple.serve.queue import Busy, FairQueue

CLIENTS = ("a/1", "a/2", "b/1", "c")


def drained(queue):
    taken = []
    while (item := queue.pop()) is not None:
        taken.append(item)
    return taken


def test_a_client_with_many_does_not_hold_up_one_with_few():
    queue = FairQueue(100, 100)
    for number in range(5):
        queue.put("greedy", f"g{number}")
    queue.put("modest", "m0")
    assert drained(queue) == ["g0", "m0", "g1", "g2", "g3", "g4"]


def test_names_of_one_peer_share_its_turns():
    """A name is free to make up: ten of them are no more than one."""
    queue = FairQueue(100, 6)
    for number in range(6):
        queue.put(f"greedy/name{number % 3}", f"g{number}")
    queue.put("modest/name", "m0")
    queue.put("modest/name", "m1")
    with pytest.raises(Busy, match="your address"):
        queue.check("greedy/another")
    queue.check("modest/name")
    assert drained(queue) == ["g0", "m0", "g1", "m1", "g2", "g3", "g4", "g5"]
    queue.check("greedy/another")


def test_clients_of_one_peer_take_turns_too():
    queue = FairQueue(100, 100)
    for number in range(3):
        queue.put("home/page", f"p{number}")
    queue.put("home/bot", "b0")
    assert drained(queue) == ["p0", "b0", "p1", "p2"]


def test_bounds_are_told_with_a_time():
    queue = FairQueue(3, 2)
    queue.put("a", 1)
    queue.put("a", 2)
    with pytest.raises(Busy) as one:
        queue.check("a", 9)
    assert one.value.retry_after == 9
    queue.check("b")
    queue.put("b", 3)
    with pytest.raises(Busy):
        queue.check("c")


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(0, 99)), max_size=30), st.data())
def test_every_item_comes_once_in_the_order_that_was_told(pairs, data):
    queue = FairQueue(1000, 1000)
    items = [(client, number, i) for i, (client, number) in enumerate(pairs)]
    for item in items:
        queue.put(item[0], item)
    gone = data.draw(st.lists(st.sampled_from(items), unique=True) if items else st.just([]))
    for item in gone:
        assert queue.remove(item[0], item)
        assert not queue.remove(item[0], item)
    told = list(queue)
    assert len(queue) == len(told) == len(items) - len(gone)
    taken = drained(queue)
    assert taken == told
    assert sorted(taken) == sorted(set(items) - set(gone))
    for client in CLIENTS:  # each client's own order is kept
        own = [item[2] for item in taken if item[0] == client]
        assert own == sorted(own)
