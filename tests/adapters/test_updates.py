"""The arithmetic of every form, against float64 sums, in the layout that the networks have."""

import numpy as np
import pytest

from maple_convert.layouts.parts import AS_IS, OIHW_TO_OHWI, POINTWISE_TO_LINEAR, Row
from maple_convert.tensors import Tensor
from maple_convert.updates import Update

O, I, R = 6, 8, 3  # noqa: E741
LINEAR = Row("l.weight", "l.weight", AS_IS, (O, I))
POINT = Row("p.weight", "p.weight", POINTWISE_TO_LINEAR, (O, I))
CONV = Row("c.weight", "c.weight", OIHW_TO_OHWI, (O, 3, 3, I))
NORM = Row("n.weight", "n.weight", AS_IS, (O,))


def random(*shape):
    generator = np.random.default_rng(sum(n * 7**i for i, n in enumerate(shape)))
    return generator.standard_normal(shape).astype(np.float32)


def exact(*shape):
    """The same numbers in float64, without a 1x1 kernel's axes."""
    values = random(*shape).astype(np.float64)
    return values[..., 0, 0] if shape[2:] == (1, 1) else values


def update(row, alpha=None, **arrays):
    made = Update(row, {k: Tensor("float32", v) for k, v in arrays.items()}, alpha)
    assert made.fits()
    return made


def native(row, difference):
    """A difference (O, I[, kh, kw]) as the network has the weight."""
    difference = np.reshape(difference, row.published_shape)
    if row is CONV:
        return difference.transpose(0, 2, 3, 1)
    return difference.reshape(row.native_shape)


def tucker(core, a, b):
    """(i, j, kh, kw), (i, p), (j, q) to (p, q, kh, kw), by the sum as it is written."""
    return np.einsum("ijhw,ip,jq->pqhw", *(x.astype(np.float64) for x in (core, a, b)))


FORMS = {
    "linear": lambda: (
        update(LINEAR, 2.0, down=random(R, I), up=random(O, R)),
        2 / R * np.einsum("or,ri->oi", exact(O, R), random(R, I)),
    ),
    "linear for a 1x1 convolution": lambda: (
        update(POINT, down=random(R, I), up=random(O, R)),
        np.einsum("or,ri->oi", exact(O, R), random(R, I)),
    ),
    "1x1 convolution": lambda: (
        update(POINT, down=random(R, I, 1, 1), up=random(O, R, 1, 1)),
        np.einsum("or,ri->oi", exact(O, R, 1, 1), exact(R, I, 1, 1)),
    ),
    "1x1 convolution for a linear layer": lambda: (
        update(LINEAR, down=random(R, I, 1, 1), up=random(O, R, 1, 1)),
        np.einsum("or,ri->oi", exact(O, R, 1, 1), exact(R, I, 1, 1)),
    ),
    "3x3 convolution": lambda: (
        update(CONV, 1.5, down=random(R, I, 3, 3), up=random(O, R, 1, 1)),
        0.5 * np.einsum("or,rihw->oihw", exact(O, R, 1, 1), exact(R, I, 3, 3)),
    ),
    "Tucker": lambda: (
        update(CONV, 6.0, down=random(R, I, 1, 1), up=random(O, 2, 1, 1), mid=random(2, R, 3, 3)),
        2 * tucker(random(2, R, 3, 3), exact(O, 2, 1, 1).T, exact(R, I, 1, 1)),
    ),
    "LoHa": lambda: (
        update(
            LINEAR, 1.0,
            hada_w1_a=random(O, R), hada_w1_b=random(R, I),
            hada_w2_a=random(O, 2), hada_w2_b=random(2, I),
        ),
        (exact(O, R) @ random(R, I)) * (exact(O, 2) @ random(2, I)) / R,
    ),
    "LoHa, flat convolution": lambda: (
        update(
            CONV, 3.0,
            hada_w1_a=random(O, R), hada_w1_b=random(R, 9 * I),
            hada_w2_a=random(O, 2), hada_w2_b=random(2, 9 * I),
        ),
        (exact(O, R) @ random(R, 9 * I)) * (exact(O, 2) @ random(2, 9 * I)),
    ),
    "LoHa, Tucker": lambda: (
        update(
            CONV, 3.0,
            hada_t1=random(R, R, 3, 3), hada_w1_a=random(R, O), hada_w1_b=random(R, I),
            hada_t2=random(2, R, 3, 3), hada_w2_a=random(2, O), hada_w2_b=random(R, I),
        ),
        tucker(random(R, R, 3, 3), random(R, O), random(R, I))
        * tucker(random(2, R, 3, 3), random(2, O), random(R, I)),
    ),
    "LoKr, whole": lambda: (
        update(LINEAR, 99.0, lokr_w1=random(2, 4), lokr_w2=random(3, 2)),  # its alpha is not used
        np.einsum("ab,cd->acbd", exact(2, 4), random(3, 2)).reshape(O, I),
    ),
    "LoKr, both factored": lambda: (
        update(
            LINEAR, 4.0,
            lokr_w1_a=random(2, R), lokr_w1_b=random(R, 4),
            lokr_w2_a=random(3, 5), lokr_w2_b=random(5, 2),
        ),
        4 / 5 * np.kron(exact(2, R) @ random(R, 4), random(3, 5) @ random(5, 2)),
    ),
    "LoKr, convolution": lambda: (
        update(CONV, lokr_w1=random(2, 4), lokr_w2=random(3, 2, 3, 3)),
        np.einsum("ab,cdhw->acbdhw", exact(2, 4), random(3, 2, 3, 3)).reshape(O, I, 3, 3),
    ),
    "LoKr, flat convolution": lambda: (
        update(CONV, 2.0, lokr_w1=random(2, 4), lokr_w2_a=random(3, 2), lokr_w2_b=random(2, 18)),
        np.einsum(
            "ab,cdk->acbdk", exact(2, 4), (exact(3, 2) @ exact(2, 18)).reshape(3, 2, 9)
        ).reshape(O, I, 3, 3),
    ),
    "LoKr, Tucker": lambda: (
        update(
            CONV, 1.0,
            lokr_w1=random(2, 4), lokr_t2=random(2, 5, 3, 3),
            lokr_w2_a=random(2, 3), lokr_w2_b=random(5, 2),
        ),
        0.2
        * np.einsum(
            "ab,cdhw->acbdhw",
            exact(2, 4),
            tucker(random(2, 5, 3, 3), random(2, 3), random(5, 2)),
        ).reshape(O, I, 3, 3),
    ),
    "full": lambda: (update(CONV, diff=random(O, I, 3, 3)), random(O, I, 3, 3)),
    "norm": lambda: (update(NORM, diff=random(O)), random(O)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_a_form_adds_what_its_sum_says(form, strength):
    made, difference = FORMS[form]()
    before = random(*made.row.native_shape)
    expected = before + strength * native(made.row, difference)
    assert np.allclose(made.changed(before, strength), expected, atol=2e-5)
    assert np.array_equal(made.changed(before, 0.0), before)


@pytest.mark.parametrize("form", FORMS)
def test_the_factors_of_a_low_rank_make_the_same_difference(form):
    made, difference = FORMS[form]()
    factors = made.low_rank()
    assert (factors is not None) == (set(made.tensors) == {"down", "up"})
    if factors is not None:
        product = (factors[0] @ factors[1]).reshape(made.row.native_shape)
        assert np.allclose(product, native(made.row, difference), atol=2e-5)


def test_a_convolutions_axes_are_not_mixed_up():
    """The control: the same numbers laid out as torch has them are another weight."""
    made, difference = FORMS["3x3 convolution"]()
    before = random(*made.row.native_shape)
    wrong = before + np.reshape(difference, made.row.native_shape)
    assert not np.allclose(made.changed(before, 1.0), wrong, atol=1e-2)


@pytest.mark.parametrize("row", [LINEAR, CONV], ids=["linear", "convolution"])
@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_dora_gives_each_output_or_input_its_length(row, axis, strength):
    kernel = row.published_shape[2:]
    sizes = [1] * len(row.published_shape)
    sizes[axis] = row.published_shape[axis]
    lengths = np.abs(random(*sizes)) + 0.5
    down, up = random(R, I, *kernel), random(O, R, *(1 for _ in kernel))
    made = update(row, 1.0, down=down, up=up, dora_scale=lengths)
    before = random(*row.native_shape)
    published = before.transpose(0, 3, 1, 2) if kernel else before
    flat = up.reshape(O, R).astype(float) @ down.reshape(R, -1)
    merged = published + flat.reshape(published.shape) / R
    others = tuple(n for n in range(merged.ndim) if n != axis)
    merged *= lengths / np.sqrt((merged**2).sum(others, keepdims=True))
    expected = published + strength * (merged - published)
    expected = expected.transpose(0, 2, 3, 1) if kernel else expected
    assert np.allclose(made.changed(before, strength), expected, atol=2e-5)


@pytest.mark.parametrize(
    "arrays",
    [
        {"down": random(R, I)},
        {"down": random(R, I), "up": random(O, R + 1)},
        {"down": random(R, I + 1), "up": random(O, R)},
        {"down": random(R, I), "up": random(O + 1, R)},
        {"down": random(R), "up": random(O, R)},
        {"down": random(R, I), "up": random(O, R, 3, 3)},
        {"down": random(R, I, 1, 1), "up": random(O, R, 1, 1), "mid": random(R, R + 1, 1, 1)},
        {"hada_w1_a": random(O, R), "hada_w1_b": random(R, I)},
        {"lokr_w1": random(2, 4)},
        {"lokr_w1": random(2, 4), "lokr_w2": random(3, 3)},
        {"lokr_w1": random(8), "lokr_w2": random(6)},
        {"diff": random(I, O)},
        {"diff": random(O)},
        {"down": random(R, I), "up": random(O, R), "dora_scale": random(5, 1)},
    ],
)
def test_factors_that_do_not_fit_are_seen_before_they_are_used(arrays):
    assert not Update(LINEAR, {k: Tensor("float32", v) for k, v in arrays.items()}).fits()


def test_a_rank_that_no_one_has_is_refused():
    """A small file must not ask for gigabytes on the way."""
    many = 5_000
    for arrays in (
        {"down": np.zeros((many, I), "f4"), "up": np.zeros((O, many), "f4")},
        {
            "lokr_w1": random(2, 4),
            "lokr_t2": np.zeros((1, many, 3, 3), "f4"),
            "lokr_w2_a": random(1, 3),
            "lokr_w2_b": np.zeros((many, 2), "f4"),
        },
    ):
        row = CONV if "lokr_t2" in arrays else LINEAR
        assert not Update(row, {k: Tensor("float32", v) for k, v in arrays.items()}).fits()


def test_half_precision_factors_are_multiplied_in_float32():
    down, up = random(R, I).astype(np.float16), random(O, R).astype(np.float16)
    bits = (random(R, I).view(np.uint32) >> 16).astype(np.uint16)
    for dtype, stored in (("float16", down), ("bfloat16", bits)):
        made = Update(LINEAR, {"down": Tensor(dtype, stored), "up": Tensor("float16", up)})
        exact = Tensor(dtype, stored).astype("float32").array.astype(np.float64)
        assert np.allclose(made.difference(), up.astype(np.float64) @ exact, atol=1e-5)
