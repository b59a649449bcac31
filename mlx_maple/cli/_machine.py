"""What memory this machine has and what of it is free, as far as the system says."""

import resource
import sys
from pathlib import Path


def resident() -> int:
    """Peak resident memory in bytes: Linux counts it in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> float | None:
    """Bytes that this process may still take, or None where the system does not say (not Linux)."""
    found = [_meminfo_available(), _cgroup_free(), _address_space_free()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def device_memory() -> int | None:
    """Bytes that the device has, or None where nothing says it."""
    import mlx.core as mx

    info = mx.device_info()
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if isinstance(found := info.get(name), int):
            return found
    free = free_memory()
    return None if free is None else int(free)


def _meminfo_available() -> float | None:
    """What can be had without another process losing anything, and what can be swapped out."""
    rows = (line.partition(":") for line in _lines("/proc/meminfo"))
    found = {name: value for name, _, value in rows}
    if "MemAvailable" not in found:
        return None
    kilobytes = (found.get(name, "0 kB").split()[0] for name in ("MemAvailable", "SwapFree"))
    return 1024.0 * sum(map(int, kilobytes))


def _cgroup_free() -> float | None:
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        return float(limit[0]) - float(used[0])
    return None


def _address_space_free() -> float | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _lines("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return float(limit) - float(pages[0].split()[0]) * resource.getpagesize()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
