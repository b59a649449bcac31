"""Write golden_noise.npz: what torch.randn draws on a CPU, for the seeds and shapes of test_noise.

    python tests/sampling/make_golden_noise.py

Needs the parity extra. Made on x86 with AVX2, whose rounding noise.py follows.
"""

from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).with_name("golden_noise.npz")
SEEDS = (0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, -1)
# One stream a seed, in this order: 72x72-pixel latents (324 numbers, no multiple of 16), a single
# pixel and 12 numbers (below 16), 15 and 16, 17, then whole blocks.
SHAPES = ((9, 9, 4), (1, 1, 4), (2, 2, 3), (1, 3, 1), (3, 5, 1), (2, 2, 4), (17, 1, 1), (16, 16, 4))


def main() -> None:
    arrays = {}
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        draws = []
        for height, width, channels in SHAPES:
            draw = torch.randn((channels, height, width), generator=generator)
            draws.append(draw.permute(1, 2, 0).numpy().ravel())
        arrays[str(seed)] = np.concatenate(draws)
    np.savez_compressed(TARGET, shapes=np.array(SHAPES), **arrays)
    print(torch.__version__, torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
