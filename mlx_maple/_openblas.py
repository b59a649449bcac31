"""Give MLX's Linux CPU backend a fast BLAS.

MLX's Linux wheel links the reference BLAS, whose float32 matrix product runs at a few GFLOP/s.
Symbols resolve to whichever library entered the global scope first, so loading OpenBLAS there
before ``mlx.core`` is imported makes the same wheel 20 to 60 times faster. Where OpenBLAS is
absent, nothing changes but the speed.

OpenBLAS picks its kernels by a list of processors. One that is younger than the library is not in
it and gets kernels of 2004 for SSE3, a third as fast or slower: 0.3.21, which Debian 12
has, does not know Sapphire Rapids. So the choice is looked at, and made again by what the processor
can do.
"""

import _ctypes
import ctypes
import os
import sys
from pathlib import Path

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")
CORETYPE = "OPENBLAS_CORETYPE"  # OpenBLAS's own variable; whoever sets it is left in charge

# Kernels that no processor with AVX2 should get, and what to take instead: the first whose needs,
# as /proc/cpuinfo spells them, the processor meets.
OUTDATED = ("Prescott", "Core2", "Generic")
KERNELS = {
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}


def preload() -> str | None:
    """Load OpenBLAS into the global scope; the library's name, or None where it is not to be had.

    Only Linux needs it, and only before ``mlx.core`` is imported; afterwards it is too late.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        better = None if CORETYPE in os.environ else better_kernels(kernels(library), _features())
        if better is None:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return name
        # The choice is made while the library is loaded, and never again: so it is loaded anew. The
        # variable goes at once, for numpy and child processes bring libraries of their own.
        _ctypes.dlclose(library._handle)
        os.environ[CORETYPE] = better
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        finally:
            del os.environ[CORETYPE]
        return name
    return None


def kernels(library: ctypes.CDLL) -> str:
    """Which kernels a loaded OpenBLAS has picked; "" where it was built for one processor only."""
    try:
        ask = library.openblas_get_corename
    except AttributeError:
        return ""
    ask.restype = ctypes.c_char_p
    return (ask() or b"").decode("ascii", "replace")


def better_kernels(picked: str, features: set[str]) -> str | None:
    """Kernels to insist on instead of those ``picked``; None where the choice is good."""
    if picked not in OUTDATED:
        return None
    return next((name for name, needs in KERNELS.items() if needs <= features), None)


def _features() -> set[str]:
    """What the first processor can do, in the words of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
