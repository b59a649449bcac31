"""Seeded Gaussian noise, number for number as the programs draw it whose pictures users know.

Legend   h, w latent rows and columns; C channels. Arrays leave here as (h, w, C) float32; the
         references fill (C, h, w), so the numbers are drawn in that order and moved afterwards.
Sources  torch   PyTorch's CPU generator: pytorch/pytorch aten/src/ATen/native/cpu/
                 DistributionTemplates.h (normal_fill, normal_fill_AVX2) and
                 ATen/core/DistributionsHelper.h. Over a MT19937 as Matsumoto and Nishimura
                 published it (2002 initialisation).
         nvidia  ``torch.randn`` on a CUDA device, in the form AUTOMATIC1111/stable-diffusion-webui
                 gives it on any machine (modules/rng_philox.py, "RNG: NV"): Philox4x32-10, Salmon
                 et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), and curand's
                 Box-Muller.
         numpy   ``numpy.random.RandomState``, as Apple's Core ML tools draw by default.
         mlx     ``mlx.random``, which fills (h, w, C) directly.
Differs  torch: radius and rounded angle go through double precision functions, so that every
         machine gets the same numbers. They lie within 4.8e-7 of torch 2.13 on x86 with AVX2
         (126 million values). PyTorch itself rounds differently without AVX2 (Apple Silicon among
         others), by up to 2.5e-6 from its own AVX2 numbers: tests/parity/test_noise.py.
         nvidia: A1111's double precision. A real GPU (torch 2.11 on an H100, 4.8 million values)
         rounds to float32 earlier and differs by up to 5.2e-5, where the radius is nearly 0. It
         also starts a second round in each thread once an array has more numbers than the GPU has
         threads (270,336 there: more than 2048x2048 pixels of 4-channel latents); A1111's form
         and this one do not, being the same for every GPU.
"""

import operator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

NOISE_SOURCES = ("torch", "nvidia", "numpy", "mlx")

Shape = tuple[int, ...]
FloatArray = NDArray[np.float32]


class NoiseGenerator(Protocol):
    """One seeded stream; every call goes on where the last one stopped."""

    def normal(self, shape: Shape) -> FloatArray:
        """Unit-variance noise of ``shape`` (h, w, C), drawn in (C, h, w) order."""
        ...


def noise_generator(kind: str, seed: int) -> NoiseGenerator:
    """A generator of the named source, seeded as that source seeds.

    Args:
        kind: one of ``NOISE_SOURCES``.
        seed: -2**63 .. 2**64 - 1, as PyTorch takes them: a negative one means itself + 2**64.
            "torch" and "numpy" are seeded with its low 32 bits (PyTorch does the same; numpy would
            refuse more), "nvidia" and "mlx" with all 64.

    Raises:
        ValueError: for an unknown source or a seed out of range.
    """
    if kind not in _GENERATORS:
        raise ValueError(f"[noise_generator] unknown source {kind!r}; known: {_KNOWN}.")
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"[noise_generator] the seed must be in -2**63 .. 2**64 - 1, got {seed}.")
    return _GENERATORS[kind](seed % 2**64)


def initial_noise(
    kind: str,
    seed: int,
    shape: Shape,
    *,
    variation_seed: int = 0,
    variation_strength: float = 0.0,
) -> FloatArray:
    """The noise one picture starts from, (h, w, C).

    ``variation_strength`` above 0 turns it towards the noise of ``variation_seed``, as A1111's
    "Variation seed" does (modules/rng.py, class ImageRNG). In a batch A1111 then keeps the seed and
    counts the variation seed up; without variation it counts the seed up.
    """
    noise = noise_generator(kind, seed).normal(shape)
    if variation_strength == 0:
        return noise
    return slerp(variation_strength, noise, noise_generator(kind, variation_seed).normal(shape))


def step_noise_generator(kind: str, seed: int, shape: Shape, *, ensd: int = 0) -> NoiseGenerator:
    """The stream that a stochastic sampler's steps draw from, for one picture, as in A1111.

    A1111 (modules/rng.py, class ImageRNG) keeps one generator a picture. It draws the initial noise
    and then, in order, what each step asks for. Where ENSD ("eta noise seed delta", 31337 in many
    files, to repeat NovelAI's pictures) is not 0, the generator is replaced after the initial noise
    by a new one seeded ``seed + ensd``. The noise of a variation seed is drawn elsewhere and moves
    nothing here.

    Args:
        kind: one of ``NOISE_SOURCES``.
        seed: the picture's seed.
        shape: (h, w, C) of the picture's latents: what its initial noise has used up.
        ensd: A1111's "ENSD".

    Returns:
        The generator, standing at the first step's draw.
    """
    if ensd:
        return noise_generator(kind, seed + ensd)
    generator = noise_generator(kind, seed)
    generator.normal(shape)
    return generator


def slerp(t: float, low: FloatArray, high: FloatArray) -> FloatArray:
    """A1111's spherical interpolation of two noises (h, w, C): 0 gives ``low``, 1 gives ``high``.

    modules/rng.py normalises along the first of two spatial axes, so each column of each channel
    turns by an angle of its own. Where the two are nearly the same, A1111 mixes linearly with the
    weights the wrong way round; that is kept. Columns without a plane to turn in (one row only, or
    exactly opposite) give NaN there and a linear mix here.
    """
    t32 = np.float32(t)
    low_unit = low / np.linalg.norm(low, axis=0, keepdims=True)
    high_unit = high / np.linalg.norm(high, axis=0, keepdims=True)
    dot = (low_unit * high_unit).sum(axis=0, keepdims=True)
    if dot.mean() > 0.9995:
        return low * t32 + high * (1 - t32)
    omega = np.arccos(np.clip(dot, -1, 1))
    sine = np.sin(omega)
    flat = np.abs(sine) < 1e-6
    sine[flat] = 1
    low_weight = np.where(flat, 1 - t32, np.sin((1 - t32) * omega) / sine)
    high_weight = np.where(flat, t32, np.sin(t32 * omega) / sine)
    return low_weight * low + high_weight * high


class _Torch:
    """``torch.Generator("cpu")``: two ways of drawing over one Mersenne twister."""

    BLOCK = 16  # normals come in blocks of 8 + 8: radius times cosine, radius times sine
    MASK = np.uint32(2**24 - 1)  # a float32 uniform is 24 of the 32 bits

    def __init__(self, seed: int) -> None:
        self._twister = np.random.RandomState(seed % 2**32)
        self._spare: float | None = None  # the second normal of a pair that was half used

    def normal(self, shape: Shape) -> FloatArray:
        count = _count(shape)
        draw = self._filled(count) if count >= self.BLOCK else self._one_by_one(count)
        return _channels_last(draw, shape)

    def _filled(self, count: int) -> FloatArray:
        """All uniforms first, then Box-Muller over whole blocks.

        Where the blocks do not divide the array, its last 16 numbers are drawn again.
        """
        uniforms = self._uniforms(count)
        whole = count - count % self.BLOCK
        normals = np.empty(count, np.float32)
        normals[:whole] = self._box_muller(uniforms[:whole])
        if whole < count:
            normals[-self.BLOCK :] = self._box_muller(self._uniforms(self.BLOCK))
        return normals

    def _uniforms(self, count: int) -> FloatArray:
        return (self._words(count) & self.MASK).astype(np.float32) * np.float32(2**-24)

    def _box_muller(self, uniforms: FloatArray) -> FloatArray:
        pairs = uniforms.reshape(-1, 2, self.BLOCK // 2)
        # 1 - u lies in (0, 1] and is exact. The angle is rounded to float32 before its cosine is
        # taken: rounding it later moves numbers by up to 1.8e-6.
        radius = np.sqrt(-2 * np.log(1 - pairs[:, 0].astype(np.float64)))
        angle = (np.float32(2 * np.pi) * pairs[:, 1]).astype(np.float64)
        normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return normals.astype(np.float32).reshape(-1)

    def _one_by_one(self, count: int) -> FloatArray:
        """Fewer than 16: double precision pairs, the second of which waits for the next draw."""
        normals: list[float] = []
        while len(normals) < count:
            if self._spare is not None:
                normals.append(self._spare)
                self._spare = None
                continue
            high, low, high2, low2 = (int(word) for word in self._words(4))
            angle = 2 * np.pi * _double_uniform(high, low)
            radius = np.sqrt(-2 * np.log1p(-_double_uniform(high2, low2)))
            normals.append(radius * np.cos(angle))
            self._spare = radius * np.sin(angle)
        return np.array(normals, np.float32)

    def _words(self, count: int) -> NDArray[np.uint32]:
        """The twister's own 32-bit outputs (numpy passes them through for this range)."""
        return self._twister.randint(0, 2**32, count, dtype=np.uint32)


class _Nvidia:
    """A CUDA generator: each number has its own place in Philox's counter space."""

    TO_UNIT = np.float32(2.3283064e-10)  # 2**-32
    TO_ANGLE = np.float32(2.3283064e-10 * 6.2831855)  # 2 pi * 2**-32, in curand's digits

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._offset = 0

    def normal(self, shape: Shape) -> FloatArray:
        threads = np.arange(_count(shape), dtype=np.uint32)
        still = np.zeros_like(threads)
        words = philox4x32((still + np.uint32(self._offset), still, threads, still), self._seed)
        self._offset += 1
        # Half a step up keeps 0 out of the logarithm. A thread's second normal, and its last two
        # words, are thrown away, as torch.randn does for arrays of this size.
        radius = np.sqrt(-2 * np.log(_centred(words[0], self.TO_UNIT)))
        normals = radius * np.sin(_centred(words[1], self.TO_ANGLE))
        return _channels_last(normals.astype(np.float32), shape)


class _Numpy:
    """``numpy.random.RandomState``: doubles, rounded to float32 at the end."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed % 2**32)

    def normal(self, shape: Shape) -> FloatArray:
        normals = self._state.standard_normal(_count(shape))
        return _channels_last(normals.astype(np.float32), shape)


class _Mlx:
    """``mlx.random.seed(seed)`` without its global state: the same key, split at every draw.

    Unlike the other sources this one fills (h, w, C) in its own order, as programs on MLX do.
    """

    def __init__(self, seed: int) -> None:
        import mlx.core as mx

        self._mx: Any = mx
        self._key = mx.random.key(seed)

    def normal(self, shape: Shape) -> FloatArray:
        _count(shape)
        self._key, key = self._mx.random.split(self._key)
        return np.array(self._mx.random.normal(shape, key=key))


def philox4x32(
    counter: tuple[NDArray[np.uint32], ...], key: int, rounds: int = 10
) -> tuple[NDArray[np.uint32], ...]:
    """Philox4x32: four arrays of counter words (N,) and a 64-bit key to four arrays of words.

    Reference: Random123's philox.h; its published known answers are in tests/sampling.
    """
    weyl = 0x9E3779B9, 0xBB67AE85  # the key's two halves move on by these every round
    half = key % 2**32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        product = np.multiply(c0, 0xD2511F53, dtype=np.uint64)
        product2 = np.multiply(c2, 0xCD9E8D57, dtype=np.uint64)
        c0 = _high(product2) ^ c1 ^ np.uint32(half[0])
        c1 = product2.astype(np.uint32)
        c2 = _high(product) ^ c3 ^ np.uint32(half[1])
        c3 = product.astype(np.uint32)
        half = (half[0] + weyl[0]) % 2**32, (half[1] + weyl[1]) % 2**32
    return c0, c1, c2, c3


_GENERATORS = {"torch": _Torch, "nvidia": _Nvidia, "numpy": _Numpy, "mlx": _Mlx}
_KNOWN = ", ".join(NOISE_SOURCES)


def _count(shape: Shape) -> int:
    if len(shape) != 3 or any(size < 1 for size in shape):
        raise ValueError(f"[normal] expected a shape (h, w, C) of sizes above 0, got {shape}.")
    height, width, channels = shape
    return height * width * channels


def _channels_last(normals: FloatArray, shape: Shape) -> FloatArray:
    """Numbers drawn for (C, h, w), moved to (h, w, C)."""
    height, width, channels = shape
    return np.ascontiguousarray(normals.reshape(channels, height, width).transpose(1, 2, 0))


def _double_uniform(high: int, low: int) -> float:
    """53 of the 64 bits that two outputs make, as a number in [0, 1)."""
    return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _centred(words: NDArray[np.uint32], step: np.float32) -> NDArray[np.float64]:
    """The middles of 2**32 cells of width ``step``, in double precision as numpy promotes them."""
    return words.astype(np.float64) * step + np.float64(step) / 2


def _high(product: NDArray[np.uint64]) -> NDArray[np.uint32]:
    return (product >> np.uint64(32)).astype(np.uint32)
