"""Give MLX's Linux CPU backend a fast BLAS.

MLX's Linux wheel links the reference BLAS, whose float32 matrix product runs at a few GFLOP/s.
Symbols resolve to whichever library entered the global scope first, so loading OpenBLAS there
before ``mlx.core`` is imported makes the same wheel 20 to 60 times faster. Where OpenBLAS is
absent, nothing changes but the speed.
"""

import ctypes
import sys

LIBRARIES = ("libopenblas.so.0", "libopenblas.so")


def preload() -> str | None:
    """Load OpenBLAS into the global scope; the library's name, or None where it is not to be had.

    Only Linux needs it, and only before ``mlx.core`` is imported; afterwards it is too late.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return None
    for name in LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
