"""How slow this processor is just now, for bars on processor time.

A neighbour who shares a core's caches and memory slows processor time, too: the same case took 1.6
seconds alone and 2.3 beside another suite. What a bar means is seconds on a machine left alone.
"""

import time

ALONE = 0.42  # seconds of the work below, on the two-core machine that the bars were set on


def slowness() -> float:
    """How many times as long as there, and alone, work takes here and now; at least 1."""
    start = time.process_time()
    lists = [[i] for i in range(1_000_000)]
    assert sum(map(len, lists)) == len(lists)
    return max(1.0, (time.process_time() - start) / ALONE)
