"""A stand-in for the network: a smooth function of latents and time, the same in numpy and torch.

Element by element, so the layout does not matter; far from linear, and so sensitive to t that a
timestep off by one shows.
"""

import numpy as np


def predict(x, t, xp=np):
    """A raw prediction of about unit size for ``x`` at the network's input scale."""
    phase = t / 120
    return xp.tanh(0.9 * x + 0.4 * np.sin(phase)) + 0.2 * xp.sin(2.5 * x - 2 * phase)


def gaussian_noise(seed, shape):
    # RandomState: its stream never changes between numpy versions
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
