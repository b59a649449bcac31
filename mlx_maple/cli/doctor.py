"""`maple doctor`: what this machine offers, and what is slow and why."""

import argparse
import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlx_maple import _OPENBLAS, __version__, _openblas
from mlx_maple.cli import DONE, _audit, _plan, _terminal

PACKAGES = ("mlx", "numpy", "Pillow", "safetensors", "huggingface_hub")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-m", "--model", metavar="MODEL", help="as for generate")
    parser.add_argument("-W", "--width", type=int, metavar="PIXELS", help="a multiple of 8")
    parser.add_argument("-H", "--height", type=int, metavar="PIXELS", help="a multiple of 8")
    _plan.add_arguments(parser)
    _audit.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Look, and print what was found."""
    if args.plan:
        return _plan.run(args)
    if args.audit:
        return _audit.run(args)
    found = examine()
    if args.json:
        print(json.dumps(found))
        return DONE
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name.replace('_', ' '):<16} {value}")
    advice = found["advice"]
    assert isinstance(advice, list)
    print()
    for line in advice or ["nothing is known to slow this machine down"]:
        print(f"- {line}")
    return DONE


def examine() -> dict[str, object]:
    """Facts about the machine, and advice as a list of sentences."""
    import mlx.core as mx

    from mlx_maple import loading, twins
    from mlx_maple.engine.attention import running_backend
    from mlx_maple.engine.compiled import compile_works
    from mlx_maple.engine.kernels import kernels_for

    backend = running_backend()
    dtype = loading.default_dtype()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cache = twins.cache_folder()
    device = mx.device_info()
    found: dict[str, object] = {
        "maple": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {_cores()} cores",
        "memory": _terminal.size(memory),
        "mlx_backend": backend,
        "mlx_device": device.get("device_name", "unknown"),
        "default_dtype": dtype,
        "kernels": kernels_for(backend, getattr(mx, dtype))[1],
        "compile": compile_works(backend)[1],
        "matrix_library": _matrix_library(backend),
        "hub": _hub(),
        "model_cache": f"{cache} ({_free(cache)})",
    }
    return {**found, "advice": _advice(backend, memory)}


def _advice(backend: str, memory: int) -> list[str]:
    advice = []
    if platform.system() == "Darwin" and platform.machine() != "arm64":
        advice.append(
            "this Python is not an arm64 one: MLX needs Apple Silicon and a native Python"
        )
    if backend == "cpu":
        if shutil.which("nvidia-smi"):
            advice.append(
                "an NVIDIA driver is here but MLX runs on the CPU: pip install 'mlx-maple[cuda]'"
            )
        advice.append(
            "MLX runs on the CPU, where a full-size SD 1.5 step at 512x512 takes tens of seconds: "
            "draw at 256x256, with few steps, or on a Mac with Apple Silicon or an NVIDIA card"
        )
        advice.append("16-bit matrix products are slow on the CPU: leave --dtype at float32 here")
    if backend == "cpu" and platform.system() == "Linux":
        if _OPENBLAS is None:
            advice.append(
                "OpenBLAS was not found, so that matrix products run 20 to 60 times slower than "
                "they could: apt-get install libopenblas0-pthread (Debian, Ubuntu) or "
                "dnf install openblas-threads (Fedora)"
            )
        if shutil.which("g++") is None:
            advice.append(
                "g++ was not found, with which MLX compiles fused kernels for the CPU: "
                "apt-get install g++"
            )
    if memory < 7e9:
        advice.append(
            "less than 8 GB of memory: a full-size SD 1.x model in float16 needs about 3 GB to "
            "draw at 512x512"
        )
    return advice


def _matrix_library(backend: str) -> str:
    if backend != "cpu":
        return f"MLX's own kernels ({backend})"
    if platform.system() == "Darwin":
        return "Accelerate"
    if _OPENBLAS is None:
        return "the reference BLAS (slow)"
    family = _openblas.kernels(ctypes.CDLL(_OPENBLAS))
    return f"{_OPENBLAS} ({family} kernels)" if family else _OPENBLAS


def _processor() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _hub() -> str:
    from huggingface_hub import constants

    state = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else constants.ENDPOINT
    return f"{state}, cache {constants.HF_HUB_CACHE}"


def _free(folder: Path) -> str:
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return "cannot be written, so that nothing is kept between runs"
    return f"{_terminal.size(shutil.disk_usage(place).free)} free"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
