"""Sampling: noise schedules, the denoiser between network and sampler, and the samplers.

plan = make_plan(NoiseSchedule.from_betas(), "dpmpp_2m", "karras", 20)
for step in plan.sample(model, plan.initial(noise)):
...  # step.latents; step.denoised for a preview
"""

from mlx_maple.sampling.denoiser import Denoiser, guided
from mlx_maple.sampling.plan import Plan, make_plan
from mlx_maple.sampling.samplers import SAMPLERS, Sampler, Step
from mlx_maple.sampling.schedule import SCHEDULES, NoiseSchedule

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Denoiser",
    "NoiseSchedule",
    "Plan",
    "Sampler",
    "Step",
    "guided",
    "make_plan",
]
