"""Weights from a safetensors file, by several threads where MLX reads with the one that evaluates.

MLX 0.32.4 on CUDA takes each array's memory, copies the file into it and it onto the device, one
array after the other: 0.85 s for 1.72 GB, which are SD 1.5's UNet, from the page cache (an H100's
host). What four threads do overlaps: 0.29 s; eight are no faster. On Metal and on the CPU its own
threads read.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlx_maple.engine.attention import running_backend

READERS = 4


def read(file: Path, names: Sequence[str], backend: str | None = None) -> dict[str, mx.array]:
    """The named arrays of a file: read on CUDA, elsewhere when they are evaluated.

    Args:
        file: in the safetensors format.
        names: of arrays in it; what is not there is left out.
        backend: None is the one that runs.

    Raises:
        RuntimeError: MLX's, for a file that it cannot open, or not read to its end.
    """
    if (running_backend() if backend is None else backend) != "cuda":
        return _some(file, names)

    sizes = {name: array.nbytes for name, array in _some(file, names).items()}
    largest_first = sorted(sizes, key=lambda name: -sizes[name])

    def part(first: int) -> dict[str, mx.array]:
        stream = mx.new_stream(mx.default_device())
        try:
            with mx.stream(stream):
                found = _some(file, largest_first[first::READERS])
                mx.eval(found)
            mx.synchronize(stream)
            return found
        finally:
            mx.clear_streams()  # or MLX may end the process when the thread ends

    with ThreadPoolExecutor(READERS) as readers:
        return {
            name: array
            for each in readers.map(part, range(READERS))
            for name, array in each.items()
        }


def _some(file: Path, names: Sequence[str]) -> dict[str, mx.array]:
    arrays = cast(dict[str, mx.array], mx.load(str(file)))
    return {name: arrays[name] for name in names if name in arrays}
