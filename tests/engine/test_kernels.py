"""The kernels' texts and calls, looked at where there is no GPU, and the ways back to ``Plain``."""

import itertools
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.engine import kernel_sources as sources
from mlx_maple.engine import kernels as module
from mlx_maple.engine import nvrtc
from mlx_maple.engine.kernels import (
    Kernels,
    Norm,
    Plain,
    _MetalKernel,
    disagreement,
    kernels_for,
    kernels_of,
)

BACKENDS = ("cuda", "metal")
PLAIN = Plain()


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path))  # where verdicts are kept
    monkeypatch.delenv("MAPLE_KERNELS", raising=False)
    kernels_for.cache_clear()
    yield
    kernels_for.cache_clear()


# A stand-in that computes with Plain what a kernel is asked for, from names and numbers alone -----


class Calculated:
    """Takes the place of MLX's kernels: what the names, numbers and shapes of a call mean.

    Args:
        factor: that results are off by.
        only: the kernels that are off, by the beginning of their names.
    """

    def __init__(self, factor: float = 1.0, only: str = "") -> None:
        self.factor = factor
        self.only = only
        self.calls = []

    def __call__(self, **making):
        def call(**given):
            self.calls.append((making, given))
            names, inputs = making["input_names"], given["inputs"]
            assert len(names) == len(inputs)
            template = dict(given["template"])
            made = run(
                making["name"].removeprefix("maple_"),
                dict(zip(names, inputs, strict=True)),
                {**given["scalars"], **template},
                given["output_shapes"],
            )
            assert len(made) == len(making["output_names"]) == len(given["output_dtypes"])
            outputs = []
            for array, shape, dtype in zip(
                made, given["output_shapes"], given["output_dtypes"], strict=True
            ):
                assert array.shape == tuple(shape)
                if making["name"].removeprefix("maple_").startswith(self.only):
                    array = array * self.factor
                outputs.append(array.astype(dtype))
            threads = np.prod(given["threadgroup"])
            assert threads <= 1024 and given["grid"][0] % given["threadgroup"][0] == 0
            return outputs

        return call


def run(name, arrays, numbers, shapes):
    """What a kernel of this name is there for."""
    if ("norm" in name and name != "layer_norm") or name.startswith("slab"):
        value = arrays["value"]
        batch = value.size // (numbers["N"] * numbers["C1"])
        assert value.shape[-1] == numbers["C1"]
        residual = arrays.get("residual")
        if name.startswith("slab_sums"):
            return [mx.zeros(shapes[0]), *sum_of(value, residual, arrays.get("skip"))]
        shift = arrays.get("shift")
        assert shift is None or numbers["row_stride"] == (shift.shape[1] if len(shift) > 1 else 0)
        y, total = PLAIN.group_norm(
            value,
            Norm(arrays["weight"], arrays["bias"], numbers["G"], numbers["eps"]),
            (batch, numbers["rows"], numbers["columns"]),
            residual=residual,
            skip=arrays.get("skip"),
            shift=shift,
            start=numbers["row_start"],
            silu="_silu" in name,
            wanted="neighbours" if "_unfold" in name else "map",
        )
        return [y.reshape(shapes[0]), *sum_of(value, residual, arrays.get("skip"))]
    if name == "layer_norm":
        terms = (arrays["value"], arrays["weight"], arrays["bias"], arrays["shift"])
        assert arrays["value"].size == numbers["L"] * numbers["C"]
        return [PLAIN.layer_norm(*terms, numbers["eps"])]
    if name in ("gate", "gate_beside"):
        assert arrays["value"].size == numbers["L"] * 2 * numbers["F"]
        beside = arrays.get("beside")
        more = 0 if beside is None else beside.shape[-1]
        assert numbers["W"] == numbers["F"] + more
        return [PLAIN.gate(arrays["value"], arrays["bias"], beside)]
    if name == "attention":
        queries, others = arrays["queries"], arrays["others"]
        assert (queries.shape[-1], others.shape[-1]) == (numbers["q_row"], numbers["kv_row"])
        batch = queries.size // (numbers["TQ"] * numbers["q_row"])
        assert others.size == batch * numbers["S"] * numbers["kv_row"]
        return [PLAIN.attention(queries, others, batch, numbers["H"], scale=numbers["scale"])]
    if name == "interleave":
        batch, rows, columns, channels = (numbers[n] for n in ("B", "rows", "columns", "C"))
        assert arrays["phases"].shape == (batch, rows + 1, columns + 1, 4 * channels)
        return [PLAIN.interleave(arrays["phases"])]
    assert name in ("total", "total_residual")
    size = numbers["B"], numbers["rows"], numbers["columns"]
    wanted = numbers["out_rows"], numbers["out_columns"]
    assert numbers["factor"] == (1 if wanted == size[1:] else 2)
    doubled = None if wanted == size[1:] else wanted
    total = PLAIN.total(arrays["value"], arrays.get("residual"), arrays["shift"], size, doubled)
    return [total]


def sum_of(value, residual, skip):
    """What a norm writes down beside its result."""
    if residual is None and skip is None:
        return []
    terms = [t.reshape(-1, t.shape[-1]) for t in (value, residual, skip) if t is not None]
    total = terms[0] if residual is None else terms[0] + terms[1]
    return [total if skip is None else mx.concatenate([total, terms[-1]], axis=-1)]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_that_compute_what_plain_does_are_taken(backend, dtype):
    made = Calculated()
    assert disagreement(kernels_of(backend, made), dtype) is None
    names = {making["name"].removeprefix("maple_") for making, _ in made.calls}
    expected = {
        "group_norm_shift_silu",
        "group_norm_residual_shift",
        "group_norm_residual_skip_shift_silu_unfold",
        "slab_sums_shift",
        "slab_sums_residual_shift",
        "slab_norm_shift_silu",
        "layer_norm",
        "total_residual",
    }
    if backend == "cuda":
        expected |= {"gate", "gate_beside", "interleave"}
        expected |= {"gate"} if dtype == mx.float32 else {"gate", "attention"}
    assert names >= expected
    assert backend == "cuda" or "interleave" not in names  # which Metal never runs


def test_where_there_are_clusters_they_are_tried(monkeypatch):
    made = Calculated()
    kernels = kernels_of("cuda", made)
    kernels.has_clusters = True
    assert disagreement(kernels, mx.float16) is None
    names = {making["name"].removeprefix("maple_") for making, _ in made.calls}
    expected = {"residual_shift_silu_held", "skip_held", "residual"}
    assert names >= {f"cluster_norm_{form}" for form in expected}
    fault = disagreement(clustered(Calculated(1.01, "cluster_norm")), mx.float16)
    assert fault is not None and fault.startswith("group norm of a map that blocks share differs")


def clustered(made):
    kernels = kernels_of("cuda", made)
    kernels.has_clusters = True
    return kernels


@pytest.mark.parametrize(
    ("batch", "rows", "groups", "channels", "wanted", "blocks", "beside"),
    [
        (2, 64, 32, 320, "map", 2 * 8 * 8, 4),  # 10 channels a group: 40 are read at once
        (2, 32, 32, 640, "tokens", 2 * 16 * 8, 2),
        (1, 32, 32, 1280, "map", 32 * 8, 1),
        (2, 16, 32, 1280, "map", None, None),  # small
        (2, 64, 32, 320, "neighbours", None, None),
        (1, 64, 4, 128, "map", None, None),  # 32 blocks leave a chip idle
    ],
)
def test_which_maps_clusters_share(batch, rows, groups, channels, wanted, blocks, beside):
    made = Calculated()
    norm = Norm(mx.ones(channels), mx.zeros(channels), groups, 1e-5)
    value = mx.zeros((batch, rows, rows, channels), mx.float16)
    for kernels in (clustered(made), kernels_of("cuda", Calculated())):
        kernels.group_norm(value, norm, (batch, rows, rows), wanted=wanted)
    found = [given for making, given in made.calls if "cluster" in making["name"]]
    assert len(found) == (blocks is not None)
    for given in found:
        assert given["grid"][0] == blocks * given["threadgroup"][0]
        assert dict(given["template"])["GROUPS"] == beside
    assert all(("cluster" in making) == ("cluster" in making["name"]) for making, _ in made.calls)


@pytest.mark.parametrize(
    "kernel", ["group_norm", "slab_norm", "layer_norm", "gate", "attention", "total", "interleave"]
)
def test_a_kernel_that_is_a_hundredth_off_is_found(kernel):
    fault = disagreement(kernels_of("cuda", Calculated(1.01, kernel)), mx.float16)
    words = {"slab_norm": "group norm of a large map", "group_norm": "group norm"}
    assert fault is not None and fault.startswith(words.get(kernel, kernel.replace("_", " ")))
    assert "differs by" in fault


def test_a_kernel_that_gives_no_number_is_found():
    fault = disagreement(kernels_of("cuda", Calculated(float("nan"), "gate")), mx.float16)
    assert fault is not None and fault.startswith("gate differs by nan")


# Choosing ----------------------------------------------------------------------------------------


def chosen(monkeypatch, make, backend="cuda"):
    monkeypatch.setattr(nvrtc, "Kernel", make)
    monkeypatch.setattr(module, "_MetalKernel", make)
    return kernels_for(backend, mx.float16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_are_checked_once(backend, monkeypatch):
    made = Calculated()
    found, line = chosen(monkeypatch, made, backend)
    assert isinstance(found, Kernels) and found.name == backend and found.dtype == mx.float16
    assert line == "compiled and checked on this device"
    count = len(made.calls)
    assert kernels_for(backend, mx.float16)[0] is found
    kernels_for.cache_clear()  # as in another process
    again, _ = kernels_for(backend, mx.float16)
    assert isinstance(again, Kernels) and again is not found and again.dtype == mx.float16
    assert len(made.calls) == count
    kernels_for(backend, mx.float32)
    assert len(made.calls) > count  # the control: another type has not been checked


def refuses(**making):
    raise RuntimeError(f"error in {making['name']}: no such instruction\nat line 3")


def refuses_when_called(**making):
    def call(**given):
        raise ValueError

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (refuses, "group norm: error in maple_group_norm_shift_silu: no such instruction"),
        (refuses_when_called, "group norm: <class 'ValueError'>"),
        (Calculated(1.01), "group norm differs by"),
    ],
    ids=["not-compiled", "not-run", "wrong"],
)
def test_plain_takes_the_place_of_kernels_that_fail(backend, make, reason, monkeypatch):
    found, line = chosen(monkeypatch, make, backend)
    assert isinstance(found, Plain)
    assert line.startswith(f"not used on this device ({reason}")
    assert line.endswith("): MLX's operations") and "\n" not in line
    kernels_for.cache_clear()
    assert isinstance(chosen(monkeypatch, Calculated(), backend)[0], Kernels)  # asked again


def test_a_verdict_holds_for_its_compiler_only(monkeypatch):
    monkeypatch.setattr(nvrtc, "compiler", lambda: "13.1")
    assert isinstance(chosen(monkeypatch, Calculated())[0], Kernels)
    kernels_for.cache_clear()
    assert isinstance(chosen(monkeypatch, refuses)[0], Kernels)  # the control: it is not asked
    kernels_for.cache_clear()
    monkeypatch.setattr(nvrtc, "compiler", lambda: "none can be loaded")
    assert isinstance(chosen(monkeypatch, refuses)[0], Plain)


def test_kernels_can_be_switched_off(monkeypatch):
    made = Calculated()
    monkeypatch.setenv("MAPLE_KERNELS", "0")
    found, line = chosen(monkeypatch, made)
    assert isinstance(found, Plain) and "MAPLE_KERNELS=0" in line and not made.calls
    kernels_for.cache_clear()
    monkeypatch.setenv("MAPLE_KERNELS", "1")
    assert isinstance(chosen(monkeypatch, made)[0], Kernels)


def test_the_cpu_takes_none(monkeypatch):
    found, line = chosen(monkeypatch, refuses, "cpu")
    assert isinstance(found, Plain) and "CPU" in line


# Calls -------------------------------------------------------------------------------------------


def array(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(
        dtype
    )


def test_arrays_of_a_type_that_was_not_checked_go_to_plain():
    made = Calculated()
    checked = kernels_of("cuda", made)
    checked.dtype = mx.float16
    norm = Norm(mx.ones(16), mx.zeros(16), 4, 1e-5)
    x, row, size = array(1, 12, 16), array(16), (1, 3, 4)

    def every(dtype):
        y = x.astype(dtype)
        joined = mx.tile(y.reshape(12, 16), (1, 3))
        return [
            checked.group_norm(y, norm, size, shift=row[None])[0],
            checked.layer_norm(y, row, row, row, 1e-5),
            checked.gate(y, row),
            checked.total(y, None, row, size),
            checked.attention(joined, joined, 1, 2, scale=0.3),
        ]

    found = every(mx.float32)
    assert not made.calls and all(y.dtype == mx.float32 for y in found)
    every(mx.float16)
    assert len(made.calls) == 5


@pytest.mark.parametrize("wanted", ["map", "tokens", "neighbours"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("is_large", [False, True])
def test_every_term_reaches_its_kernel(wanted, has_residual, has_skip, is_large, monkeypatch):
    if is_large:
        monkeypatch.setattr(module, "ONE_BLOCK", 0)
    made = Calculated()
    size, own, joined = (2, 5, 7), 24, 8 if has_skip else 0
    channels = own + joined
    norm = Norm(array(channels, seed=1), array(channels, seed=2), 8, 1e-5)
    terms = {
        "residual": array(2, 35, own, seed=3) if has_residual else None,
        "skip": array(70, joined, seed=4) if has_skip else None,
        "shift": array(2, channels + 9, seed=5),
        "start": 5,
        "wanted": wanted,
    }
    value = array(2, 5, 7, own)
    found = kernels_of("metal", made).group_norm(value, norm, size, **terms)
    plain = PLAIN.group_norm(value, norm, size, **terms)
    assert len(made.calls) == 1 + is_large
    assert found[0].shape == plain[0].shape
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(
            a.reshape(-1, a.shape[-1]), b.reshape(-1, a.shape[-1]), atol=1e-5
        )


def test_more_groups_than_threads_go_to_plain():
    made = Calculated()
    groups = module.STREAM_THREADS + 1
    norm = Norm(mx.ones(groups), mx.zeros(groups), groups, 1e-5)
    kernels_of("cuda", made).group_norm(array(1, 4, groups), norm, (1, 2, 2))
    assert not made.calls


def test_a_small_map_takes_one_block_a_group_and_a_large_one_slabs():
    norm = Norm(mx.ones(64), mx.zeros(64), 1, 1e-5)
    for pixels, kernels in ((module.ONE_BLOCK // 64, 1), (module.ONE_BLOCK // 64 + 1, 2)):
        made = Calculated()
        kernels_of("cuda", made).group_norm(mx.zeros((1, pixels, 64)), norm, (1, 1, pixels))
        assert len(made.calls) == kernels


@pytest.mark.parametrize(
    ("width", "keys", "dtype", "is_ours"),
    [
        (40, 77, mx.float16, True),
        (40, module.FEW_KEYS + 1, mx.float16, False),  # cuDNN's
        (160, 77, mx.float16, True),
        (160, module.FEW_KEYS + 1, mx.float16, True),  # which cuDNN has not
        (168, 77, mx.float16, False),
        (44, 77, mx.float16, False),
        (40, 77, mx.float32, False),
    ],
)
def test_which_attention_is_ours(width, keys, dtype, is_ours):
    q, kv = array(3, width, dtype=dtype), array(keys, 2 * width, dtype=dtype)
    for backend in BACKENDS:
        made = Calculated()
        kernels_of(backend, made).attention(q, kv, 1, 1, scale=1.0)
        assert bool(made.calls) is (is_ours and backend == "cuda")


# Texts -------------------------------------------------------------------------------------------

FLAGS = ("residual", "skip", "shift", "silu", "unfold")
FORMS = [sources.Form(*flags) for flags in itertools.product((False, True), repeat=len(FLAGS))]
FOREIGN = {  # words of the other language
    "cuda": r"threadgroup|metal::|simd_sum|\bdevice\b|thread_position",
    "metal": r"__\w+__|threadIdx|blockIdx|__shfl|\brsqrtf\b|__expf|\berff\b|asm",
}


def texts(backend) -> dict[str, str]:
    """Every kernel's whole text, by its name."""
    found = {}

    def make(**making):
        found[making["name"]] = making
        return lambda **given: [
            mx.zeros(s, d)
            for s, d in zip(given["output_shapes"], given["output_dtypes"], strict=True)
        ]

    kernels = kernels_of(backend, make)
    for form in FORMS:
        kernels._kernel("a" + form.suffix, form.inputs, [], sources.one_block_norm(form))
        kernels._kernel("b" + form.suffix, form.inputs, [], sources.slab_sums(form))
        kernels._kernel("c" + form.suffix, form.inputs, [], sources.slab_norm(form))
    x, row = mx.zeros((1, 4, 16), mx.float16), mx.zeros((16,))
    kernels.layer_norm(x, row, row, row, 1e-5)
    kernels.gate(x, row)
    kernels.gate(x, row, x)
    kernels.total(x, x, row, (1, 2, 2))
    kernels.total(x, None, row, (1, 2, 2), (4, 3))
    kernels.interleave(mx.zeros((1, 3, 3, 16), mx.float16))
    joined = mx.zeros((4, 48), mx.float16)
    kernels.attention(joined, joined, 1, 2, scale=1.0)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_whole_in_both_dialects(backend):
    found = texts(backend)
    assert len(found) == 3 * len(FORMS) + {"cuda": 7, "metal": 4}[backend]
    for name, making in found.items():
        text = making["header"] + making["source"]
        assert "$" not in text, name
        assert "dims[" not in text and "{{" not in text
        assert not re.search(FOREIGN[backend], text), (name, re.search(FOREIGN[backend], text))
        assert "//" not in text  # what is not code is left out
        for left, right in ("()", "[]", "{}"):
            assert text.count(left) == text.count(right), name
        for given in making["input_names"]:
            assert re.search(rf"\b{given}\b", making["source"]), (name, given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_form_reads_no_term_that_it_has_not(backend):
    found = texts(backend)
    for form in FORMS:
        for kind in "abc":
            source = found[f"maple_{kind}{form.suffix}"]["source"]
            for term in ("residual", "skip", "shift"):
                reads = re.search(rf"\b{term}\b", source) is not None
                assert reads is getattr(form, term) or (kind == "c" and term == "residual")
            if kind != "b":
                assert ("silu(" in source) is form.silu
                assert ("columns" in source) is form.unfold


def test_distinct_forms_have_distinct_names():
    assert len({form.suffix for form in FORMS}) == len(FORMS) == 32


def test_words_that_are_not_known_are_an_error():
    """The control: nothing is left for a compiler to stumble over."""
    with pytest.raises(KeyError, match="unheard"):
        kernels_of("cuda", Calculated())._kernel("x", [], [], "$unheard_of")


# Metal's numbers ---------------------------------------------------------------------------------


@pytest.fixture
def metal(monkeypatch):
    made, calls = [], []

    def metal_kernel(**making):
        made.append(making)
        return lambda **given: calls.append(given) or [mx.zeros((1,))]

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    module._numbers.cache_clear()
    return made, calls


def test_metal_is_told_numbers_in_an_array_floats_by_their_bits(metal):
    made, calls = metal
    kernel = _MetalKernel(name="k", input_names=["x"], output_names=["y"], source="BODY", header="")
    for eps, n in ((1e-5, 3), (-2.5, -7)):
        kernel(inputs=[mx.ones((2,))], scalars={"N": n, "eps": eps, "C": 9}, grid=(1, 1, 1))
    assert len(made) == 1  # compiled once for the same names
    assert made[0]["input_names"] == ["x", "numbers"]
    assert made[0]["source"] == (
        "const int N = numbers[0];\nconst float eps = as_type<float>(numbers[1]);\n"
        "const int C = numbers[2];\nBODY"
    )
    for (eps, n), call in zip(((1e-5, 3), (-2.5, -7)), calls, strict=True):
        numbers = call["inputs"][1]
        assert numbers.dtype == mx.int32 and numbers.size >= 8
        assert (numbers[0].item(), numbers[2].item()) == (n, 9)
        assert numbers[1:2].view(mx.float32).item() == np.float32(eps)
        assert call["grid"] == (1, 1, 1)
    kernel(inputs=[], scalars={"N": 1}, grid=(1, 1, 1))
    assert len(made) == 2


def test_metal_keeps_more_than_eight_numbers(metal):
    _, calls = metal
    kernel = _MetalKernel(name="k", input_names=[], output_names=["y"], source="", header="")
    kernel(inputs=[], scalars={f"n{i}": i for i in range(11)})
    assert calls[0]["inputs"][0].tolist() == list(range(11))


# Plain against MLX's own -------------------------------------------------------------------------


def test_plain_norms_are_mlxs_own():
    import mlx.nn as nn

    from mlx_maple.models.layers import GroupNorm

    own = GroupNorm(4, 16, 1e-5)
    own.weight, own.bias = array(16, seed=1), array(16, seed=2)
    x, shift = array(2, 3, 5, 16), array(2, 20, seed=3)
    norm = Norm(own.weight, own.bias, 4, 1e-5)
    y, total = PLAIN.group_norm(x, norm, (2, 3, 5), shift=shift, start=4)
    wanted = nn.silu(own(x + shift[:, None, None, 4:]))
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    assert total is x
    neighbours, _ = PLAIN.group_norm(x, norm, (2, 3, 5), shift=shift, start=4, wanted="neighbours")
    weight = array(6, 3, 3, 16, seed=5)
    convolved = (neighbours @ weight.reshape(6, -1).T).reshape(2, 3, 5, 6)
    np.testing.assert_allclose(convolved, mx.conv2d(wanted, weight, padding=1), atol=1e-4)
