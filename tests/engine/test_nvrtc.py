"""CUDA kernels compiled once a machine, by a compiler that is stood in for, and by a real one."""

import ctypes
import os
import re

import mlx.core as mx
import pytest

from mlx_maple.engine import kernels, nvrtc
from mlx_maple.engine.kernels import Norm, kernels_of
from mlx_maple.engine.nvrtc import CompileError, Kernel, compiled

ELF = b"\x7fELF"


class Compiler:
    """What of the library is called: machine code is the text's length behind the magic word."""

    def __init__(self, *, log: str | None = None, fails_at: str | None = None) -> None:
        self.log = log  # of a compilation that fails
        self.fails_at = fails_at
        self.texts: list[str] = []
        self.options: list[list[bytes]] = []
        self.destroyed = 0
        self.version = 13, 1

        def error_string(result):
            return b"NVRTC_ERROR_OUT_OF_MEMORY"

        self.nvrtcGetErrorString = error_string  # takes a restype, as a foreign function does

    def _result(self, name: str) -> int:
        return 1 if name == self.fails_at else 0

    def nvrtcVersion(self, major, minor):
        major._obj.value, minor._obj.value = self.version
        return self._result("version")

    def nvrtcCreateProgram(self, program, text, name, count, headers, names):
        assert (count, headers, names) == (0, None, None)
        program._obj.value = 7
        self.texts.append(text.decode())
        return self._result("create")

    def nvrtcCompileProgram(self, program, count, options):
        assert program.value == 7
        self.options.append([options[i] for i in range(count)])
        return 6 if self.log is not None else 0

    def nvrtcGetProgramLogSize(self, program, size):
        size._obj.value = len(self.log.encode()) + 1
        return 0

    def nvrtcGetProgramLog(self, program, buffer):
        buffer.raw = self.log.encode() + b"\0"
        return 0

    def nvrtcGetCUBINSize(self, program, size):
        size._obj.value = len(self._code)
        return self._result("size")

    def nvrtcGetCUBIN(self, program, buffer):
        buffer.raw = self._code
        return 0

    @property
    def _code(self) -> bytes:
        return ELF + b"\0%d" % len(self.texts[-1])

    def nvrtcDestroyProgram(self, program):
        self.destroyed += 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(folder, monkeypatch):
    return use(Compiler(), monkeypatch)


def use(found, monkeypatch):
    monkeypatch.setattr(nvrtc, "_library", lambda: found)
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_90a")
    return found


# The cache ---------------------------------------------------------------------------------------


def test_a_text_is_compiled_once_and_kept(compiler, folder):
    code = compiled("a kernel")
    assert code == ELF + b"\x008"
    assert compiler.texts == ["a kernel"] and compiler.destroyed == 1
    assert b"--gpu-architecture=sm_90a" in compiler.options[0]
    (kept,) = folder.iterdir()
    assert kept.suffix == ".cubin" and kept.read_bytes() == code
    assert compiled("a kernel") == code and len(compiler.texts) == 1
    compiled("another kernel")
    assert len(compiler.texts) == 2 and len(list(folder.iterdir())) == 2


def test_another_device_or_compiler_compiles_anew(compiler, monkeypatch):
    compiled("a kernel")
    compiler.version = 13, 2
    compiled("a kernel")
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_89")
    compiled("a kernel")
    assert len(compiler.texts) == 3
    assert b"--gpu-architecture=sm_89" in compiler.options[2]


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b"\x7fEL"])
def test_what_is_no_machine_code_is_made_again(compiler, folder, damage):
    code = compiled("a kernel")
    (kept,) = folder.iterdir()
    kept.write_bytes(damage)
    assert compiled("a kernel") == code and len(compiler.texts) == 2
    assert [path.read_bytes() for path in folder.iterdir()] == [code]


def test_a_cache_that_cannot_be_written_costs_time_only(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "file"))
    assert compiled("a kernel") == compiled("a kernel")
    assert len(compiler.texts) == 2
    assert (tmp_path / "file").read_text() == ""


def test_nothing_half_written_is_left(compiler, folder, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert compiled("a kernel").startswith(ELF)
    assert list(folder.iterdir()) == []


# Errors ------------------------------------------------------------------------------------------


def test_a_refused_text_is_one_line_of_error_and_is_not_kept(folder, monkeypatch):
    log = 'maple.cu(3): warning: odd\nmaple.cu(7): error: identifier "x" is undefined\n1 error'
    compiler = use(Compiler(log=log), monkeypatch)
    with pytest.raises(CompileError) as raised:
        compiled("a kernel")
    assert str(raised.value) == 'maple.cu(7): error: identifier "x" is undefined'
    assert compiler.destroyed == 1 and not folder.exists()


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("nvrtc: invalid value for -arch\nfor this device\n", "nvrtc: invalid value for -arch"),
        ("", "the compiler gives no reason"),
        ("w" * 999, "w" * 200),
    ],
)
def test_a_log_without_an_error_is_told_as_it_begins(log, reason, folder, monkeypatch):
    use(Compiler(log=log), monkeypatch)
    with pytest.raises(CompileError) as raised:
        compiled("a kernel")
    assert str(raised.value) == reason


@pytest.mark.parametrize("call", ["version", "create", "size"])
def test_a_failing_call_is_named(call, folder, monkeypatch):
    use(Compiler(fails_at=call), monkeypatch)
    with pytest.raises(CompileError, match="NVRTC_ERROR_OUT_OF_MEMORY"):
        compiled("a kernel")


def test_a_compiler_that_is_not_there(monkeypatch, folder):
    monkeypatch.setattr(nvrtc, "LIBRARIES", ("libnothing.so.1", "libnothing.so"))
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_90a")
    with pytest.raises(CompileError) as raised:
        compiled("a kernel")
    reason = "none of libnothing.so.1, libnothing.so can be loaded"
    assert str(raised.value) == nvrtc.compiler() == reason


def test_which_compiler_there_is(compiler):
    assert nvrtc.compiler() == "13.1"


@pytest.mark.parametrize(
    ("major", "minor", "name"),
    [(7, "5", "sm_75"), (8, 9, "sm_89"), (9, 0, "sm_90a"), (12, 0, "sm_120a")],
)
def test_architectures(major, minor, name, monkeypatch):
    info = {"compute_capability_major": major, "compute_capability_minor": minor}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert nvrtc._architecture() == name


# Calls -------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    found = []

    def launch(**given):
        found.append(given)
        shapes = zip(given["output_shapes"], given["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    return found


def scale(**changes):
    kernel = changes.pop("kernel", None) or Kernel(
        name="scale", input_names=["x", "w"], output_names=["y"], source="BODY", header="HEADER"
    )
    call = {
        "inputs": [mx.zeros((3,), mx.float16), mx.zeros((3,))],
        "scalars": {"n": 3, "eps": -1.0, "big": 2.5},
        "template": [("T", mx.float16), ("V", 4)],
        "grid": (256, 2, 1),
        "threadgroup": (64, 2, 1),
        "output_shapes": [[3]],
        "output_dtypes": [mx.bfloat16],
    }
    return kernel(**{**call, **changes})


def test_the_text_of_a_kernel(compiler, launches):
    (y,) = scale()
    assert y.shape == (3,) and y.dtype == mx.bfloat16
    (text,) = compiler.texts
    assert text.startswith(nvrtc.PRELUDE)
    assert text.removeprefix(nvrtc.PRELUDE).strip() == "\n".join(
        [
            "HEADER",
            'extern "C" __global__ void __launch_bounds__(128) scale_half_t_4('
            "const half_t* x, const float* w, bfloat_t* y, int n, int eps_bits, int big_bits) {",
            nvrtc.IDLES,
            "const float eps = __int_as_float(eps_bits);",
            "const float big = __int_as_float(big_bits);",
            "using T = half_t;",
            "constexpr int V = 4;",
            "BODY",
            "}",
        ]
    )
    launch = launches[-1]
    assert launch["name"] == "scale_half_t_4" and len(launch["compiled_source"]) == 8
    assert launch["grid"] == (256, 2, 1) and launch["threadgroup"] == (64, 2, 1)
    assert launch["output_shapes"] == [(3,)] and launch["ensure_row_contiguous"]


def test_numbers_go_by_value_and_floats_by_their_bits(compiler, launches):
    scale()
    # 0xbf800000 as a signed number, and 0x40200000
    assert launches[-1]["scalars"] == [3, -0x40800000, 0x40200000]
    for value in (0.0, -0.0, 1e-5, 1e30, float("inf")):
        bits = mx.array([nvrtc._bits(value)], dtype=mx.int32).view(mx.float32).item()
        assert bits == ctypes.c_float(value).value


def test_a_kernel_is_compiled_for_each_type_and_size_of_block_as_needed(compiler, launches):
    kernel = Kernel(name="scale", input_names=["x", "w"], output_names=["y"], source="BODY")
    scale(kernel=kernel)
    scale(kernel=kernel, scalars={"n": 9, "eps": 0.5, "big": 0.0}, grid=(64, 2, 1))
    assert len(compiler.texts) == 1
    scale(kernel=kernel, output_dtypes=[mx.float32])
    scale(kernel=kernel, template=[("T", mx.float32), ("V", 4)])
    scale(kernel=kernel, threadgroup=(256, 1, 1))
    scale(kernel=kernel, scalars={"n": 9, "eps": 1, "big": 0.0})
    assert len(compiler.texts) == len(set(compiler.texts)) == 5
    assert len({launch["name"] for launch in launches}) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [  # of g++ 12's libstdc++
        (b"", 0x553E93901E462A6E),
        (b"maple", 0x1522B33910CB9F76),
        (b"maple_gr", 0xCD793F0EB2DF0352),
        (b"maple_group_norm_half_t", 0x16F1A273B042008D),
        (b"\x7fELF\0\0\xff\x80 code", 0xB167D8F85ABA16E3),
    ],
)
def test_hashes_are_those_of_the_library_that_mlx_is_built_with(text, value):
    assert nvrtc._hash(text) == value
    stand_in = nvrtc._alias(value)
    assert len(stand_in) == 8 and nvrtc._hash(stand_in) == value
    assert nvrtc._hash(stand_in[::-1]) != value  # the control


def test_machine_code_is_handed_over_once(compiler, launches):
    kernel = Kernel(name="scale", input_names=["x", "w"], output_names=["y"], source="BODY")
    scale(kernel=kernel)
    scale(kernel=kernel)
    code, stand_in, *calls = launches
    assert code["compiled_source"].startswith(ELF)
    assert nvrtc._hash(code["compiled_source"]) == nvrtc._hash(stand_in["compiled_source"])
    for launch in (code, stand_in):  # which a kernel does nothing in
        assert launch["grid"] == nvrtc.IDLE_GRID and launch["threadgroup"] == (1, 1, 1)
        assert launch["scalars"] == [0, 0, 0] and launch["output_shapes"] == [(1,)]
    assert [call["compiled_source"] for call in calls] == [stand_in["compiled_source"]] * 2
    assert all(call["grid"][2] == 1 for call in calls)


def test_without_a_lookup_by_hash_the_code_is_given_every_time(compiler, launches, monkeypatch):
    kept = mx.fast.precompiled_cuda_kernel

    def by_content(**given):
        if not given["compiled_source"].startswith(ELF):
            raise RuntimeError("Failed to load compiled kernel")
        return kept(**given)

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", by_content)
    scale()
    assert launches[-1]["compiled_source"].startswith(ELF)
    assert launches[-1]["grid"] == (256, 2, 1)


def test_code_that_does_not_load_is_no_kernel(compiler, monkeypatch):
    def refuse(**given):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", refuse)
    with pytest.raises(RuntimeError, match="no kernel image"):
        scale()


# The real compiler -------------------------------------------------------------------------------


def every_call(made):
    """Each kernel in each form that networks use, in a small size."""
    size, channels = (1, 4, 4), 32
    value, row = mx.zeros((16, channels), mx.float16), mx.zeros((1, 2 * channels))
    norm, wide = (Norm(mx.ones(n), mx.zeros(n), 8, 1e-5) for n in (channels, 2 * channels))
    for residual in (None, value):
        for skip in (None, value):
            for silu, wanted in ((True, "map"), (True, "neighbours"), (False, "tokens")):
                made.group_norm(
                    value, norm if skip is None else wide, size, residual=residual, skip=skip,
                    shift=row, silu=silu, wanted=wanted,
                )  # fmt: skip
        made.total(value, residual, row[0, :channels], size)
    made.layer_norm(value, norm.weight, norm.bias, norm.bias, 1e-5)
    made.gate(value, norm.bias)
    made.gate(value, norm.bias, value)
    for width in (40, 160):
        joined = mx.zeros((8, 3 * width), mx.float16)
        made.attention(joined, joined, 1, 1, scale=1.0)


@pytest.fixture
def real(folder, monkeypatch):
    try:
        library = nvrtc._library()
        nvrtc._version(library)
    except CompileError as error:
        pytest.skip(f"no CUDA compiler on this machine: {error}")
    monkeypatch.setattr(nvrtc, "_architecture", lambda: "sm_90a")
    return library


def test_every_kernel_compiles(real, launches, folder, monkeypatch):
    made = kernels_of("cuda")
    every_call(made)
    monkeypatch.setattr(kernels, "ONE_BLOCK", 0)  # as large maps are done
    every_call(made)
    names = {re.sub(r"_\d+|_half_t", "", launch["name"]) for launch in launches}
    assert len(names) >= 12 + 4 + 6 + 2 + 3
    codes = [launch["compiled_source"] for launch in launches]
    assert all(code.startswith(ELF) or len(code) == 8 for code in codes)
    with pytest.raises(CompileError, match="error"):  # the control
        compiled(nvrtc.PRELUDE + 'extern "C" __global__ void wrong() { unheard_of(); }')
