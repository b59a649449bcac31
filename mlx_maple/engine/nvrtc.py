"""CUDA kernels compiled once for a machine: NVIDIA's run-time compiler, and a folder that keeps.

``mx.fast.cuda_kernel`` compiles its kernels anew in every process, a second or more for each with
the headers that MLX puts before them; drawing one picture would begin with a quarter of a minute.
Here they are compiled without any header, by the library that MLX has loaded for itself, and what
came out lies in the cache folder. MLX runs it through ``mx.fast.precompiled_cuda_kernel``.

What the headers would bring, numbers of 16 bits, is defined in ``PRELUDE`` by the instructions that
convert them.

MLX looks a kernel up by its name and a hash of its whole machine code at every call: 3.7 us for
20 kB, as much again as the rest of a launch, some 160 times a step. The code is handed over once,
by a launch that does nothing, and every later call gives eight bytes that hash alike (``_alias``).
Where MLX does not take them for the kernel that it has, the code itself is given as before.
"""

import ctypes
import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_maple.engine.verdict import folder, write

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
TYPES = {mx.float16: "half_t", mx.bfloat16: "bfloat_t", mx.float32: "float"}
WORD = (1 << 64) - 1
FACTOR, SEED = 0xC6A4A7935BD1E995, 0xC70F6907  # of MurmurHash64A, and libstdc++'s own
# Our kernels use two dimensions: a launch with three is idle. It is of a cluster's size.
IDLES, IDLE_GRID = "if (gridDim.z > 1) return;", (8, 1, 2)
PRELUDE = """
typedef unsigned int uint32_t;
#define INFINITY __int_as_float(0x7f800000)
struct half_t {
  unsigned short bits;
  half_t() = default;
  __device__ explicit half_t(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
struct bfloat_t {
  unsigned short bits;
  bfloat_t() = default;
  __device__ explicit bfloat_t(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const { return __uint_as_float(uint32_t(bits) << 16); }
};
"""


class CompileError(Exception):
    """The compiler is not there, or refuses; in one line."""


class Kernel:
    """A kernel with the call of MLX's own, for arrays whose types it is compiled for as needed.

    Args:
        name: of the function.
        input_names: of arrays.
        output_names: of arrays.
        source: the function's body.
        header: functions that it calls.
        cluster: blocks that see each other's memory; more than one need compute capability 9.
    """

    def __init__(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        cluster: int = 1,
    ) -> None:
        self._name = name
        self._names = tuple(input_names), tuple(output_names)
        self._source = source
        self._header = header
        self._clusters = f"__cluster_dims__({cluster}, 1, 1) " if cluster > 1 else ""
        self._codes: dict[Any, bytes] = {}  # or what stands for them

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        scalars: Mapping[str, int | float],
        template: Sequence[tuple[str, int | mx.Dtype]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Describe a launch: ``scalars`` are told by value, ``template`` when it is compiled."""
        types = tuple(a.dtype for a in inputs), tuple(output_dtypes)
        threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        key = tuple(template), types, tuple(type(value) for value in scalars.values()), threads
        name = "_".join([self._name, *(_word(value) for _, value in template)])
        if key not in self._codes:
            code = compiled(self._text(name, types, scalars, template, threads))
            self._codes[key] = _handed_over(name, code, types, len(scalars))
        return _launch(
            name,
            self._codes[key],
            inputs=list(inputs),
            output_shapes=[tuple(shape) for shape in output_shapes],
            output_dtypes=list(output_dtypes),
            scalars=[
                _bits(value) if isinstance(value, float) else value for value in scalars.values()
            ],
            grid=grid,
            threadgroup=threadgroup,
        )

    def _text(
        self,
        name: str,
        types: tuple[tuple[mx.Dtype, ...], tuple[mx.Dtype, ...]],
        scalars: Mapping[str, int | float],
        template: Sequence[tuple[str, int | mx.Dtype]],
        threads: int,
    ) -> str:
        arguments = [
            f"{const}{TYPES[dtype]}* {argument}"
            for const, names, dtypes in zip(("const ", ""), self._names, types, strict=True)
            for argument, dtype in zip(names, dtypes, strict=True)
        ]
        # MLX 0.32 takes no float from Python here: its bits come as an integer.
        floats = [argument for argument, value in scalars.items() if isinstance(value, float)]
        arguments += [f"int {n}_bits" if n in floats else f"int {n}" for n in scalars]
        told = [f"const float {n} = __int_as_float({n}_bits);" for n in floats]
        told += [
            f"using {word} = {TYPES[value]};"
            if isinstance(value, mx.Dtype)
            else f"constexpr int {word} = {value};"
            for word, value in template
        ]
        # The compiler then gives a thread no more registers than so many can have.
        bounds = f"{self._clusters}__launch_bounds__({threads})"
        head = f'extern "C" __global__ void {bounds} {name}({", ".join(arguments)}) {{'
        return "\n".join([PRELUDE, self._header, head, IDLES, *told, self._source, "}"])


def _launch(name: str, code: bytes, **options: Any) -> list[mx.array]:
    return mx.fast.precompiled_cuda_kernel(
        name=name, compiled_source=code, ensure_row_contiguous=True, **options
    )


def _handed_over(
    name: str,
    code: bytes,
    types: tuple[tuple[mx.Dtype, ...], tuple[mx.Dtype, ...]],
    scalars: int,
) -> bytes:
    """Have MLX load a kernel; what to give it from then on: a stand-in if it takes that."""
    inputs, outputs = types
    for given in (code, stand_in := _alias(_hash(code))):
        try:
            idle = _launch(
                name,
                given,
                inputs=[mx.zeros(1, dtype) for dtype in inputs],
                output_shapes=[(1,)] * len(outputs),
                output_dtypes=list(outputs),
                scalars=[0] * scalars,
                grid=IDLE_GRID,
                threadgroup=(1, 1, 1),
            )
            mx.eval(idle)
        except RuntimeError:  # eight bytes are no machine code: MLX looks kernels up differently
            if given is code:
                raise
            return code
    return stand_in


def _hash(code: bytes) -> int:
    """What libstdc++'s ``std::hash`` makes of a string: MurmurHash64A with its own seed."""
    whole = len(code) // 8 * 8
    words = _stirred(np.frombuffer(code[:whole], "<u8") * np.uint64(FACTOR)) * np.uint64(FACTOR)
    value = SEED ^ (len(code) * FACTOR & WORD)
    for word in words.tolist():
        value = (value ^ word) * FACTOR & WORD
    if len(code) > whole:
        value = (value ^ int.from_bytes(code[whole:], "little")) * FACTOR & WORD
    return _stirred(_stirred(value) * FACTOR & WORD)


def _alias(value: int) -> bytes:
    """The eight bytes with that hash. Each step of ``_hash`` has an inverse for one word."""
    back = pow(FACTOR, -1, WORD + 1)
    word = _stirred(_stirred(value) * back & WORD) * back & WORD
    word ^= SEED ^ (8 * FACTOR & WORD)
    return (_stirred(word * back & WORD) * back & WORD).to_bytes(8, "little")


def _stirred(word: Any) -> Any:
    """Its own inverse, since the shift is more than half of the word."""
    return word ^ (word >> np.uint64(47) if isinstance(word, np.ndarray) else word >> 47)


def compiled(text: str) -> bytes:
    """Machine code for the device that runs, out of the cache or the compiler.

    Raises:
        CompileError: if the compiler is missing or refuses.
    """
    architecture = _architecture()
    library = _library()
    version = _version(library)
    key = hashlib.sha256(f"{architecture} {version} {text}".encode()).hexdigest()[:32]
    kept = folder() / f"{key}.cubin"
    try:
        code = kept.read_bytes()
        if code.startswith(b"\x7fELF"):
            return code
    except OSError:
        pass
    code = _compile(library, text, architecture)
    write(kept, code)
    return code


def compiler() -> str:
    """Which compiler there is, or why there is none."""
    try:
        return _version(_library())
    except CompileError as error:
        return str(error)


def _compile(library: ctypes.CDLL, text: str, architecture: str) -> bytes:
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"maple.cu", 0, None, None
        ),
    )
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        result = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        if result:
            log = _bytes(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            lines = log.splitlines()
            errors = [line for line in lines if "error" in line]
            raise CompileError([*errors, *lines, "the compiler gives no reason"][0][:200])
        return _bytes(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, result: int) -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(library.nvrtcGetErrorString(result).decode())


def _library() -> ctypes.CDLL:
    """The compiler that MLX's CUDA backend has loaded, by the names that it goes by."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CompileError(f"none of {', '.join(LIBRARIES)} can be loaded")


def _version(library: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _architecture() -> str:
    """Such as sm_90a; from Hopper on with the letter that unlocks all of its instructions."""
    info = mx.device_info()
    major = int(info["compute_capability_major"])
    return f"sm_{major}{info['compute_capability_minor']}{'a' if major >= 9 else ''}"


def _bits(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def _word(value: int | mx.Dtype) -> str:
    return TYPES[value] if isinstance(value, mx.Dtype) else str(value)
