"""The references, run step by step with injected noise: diffusers' schedulers and k-diffusion.

Everything comes back in the coordinates that mlx_maple uses for that sampler, as float64 arrays.
Needs torch, diffusers, scipy and k-diffusion; only tests/parity and make_golden.py import this.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from unittest import mock

import numpy as np
import scipy.stats
import torch


def _imported(*names):
    """Import modules whose own imports (torchsde, torchvision, ...) are never used here.

    k_diffusion's __init__ imports training code, so the package is entered past it.
    """
    package = ModuleType("k_diffusion")
    package.__path__ = list(find_spec("k_diffusion").submodule_search_locations)
    stubs = {"k_diffusion": package}
    for name in ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms"):
        stubs[name] = ModuleType(name)
        stubs[name].odeint = stubs[name].functional = None
    absent = [
        name for name in stubs if name == "k_diffusion" or find_spec(name.split(".")[0]) is None
    ]
    before = {name: sys.modules.get(name) for name in absent}
    sys.modules.update({name: stubs[name] for name in absent})
    try:
        return [import_module(name) for name in names]
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


import_module("diffusers")  # before torchsde is stood in for: diffusers asks whether it is there
k_sampling, k_external, _ = _imported(
    "k_diffusion.sampling", "k_diffusion.external", "diffusers.schedulers.scheduling_dpmsolver_sde"
)

SPACINGS = ("leading", "linspace", "trailing")

# our name: (diffusers module, class, settings, calls a step)
DIFFUSERS = {
    "ddim": ("ddim", "DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False}, 1),
    "plms": ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, 1),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}, 1),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}, 1),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}, 2),
    "dpm2": ("k_dpm_2_discrete", "KDPM2DiscreteScheduler", {}, 2),
    "dpm2_a": ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", {}, 2),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}, 1),
    "dpmpp_2m_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        1,
    ),
    "dpmpp_sde": ("dpmsolver_sde", "DPMSolverSDEScheduler", {}, 2),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}, 1),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}, 1),
    "lcm": ("lcm", "LCMScheduler", {}, 1),
    "tcd": ("tcd", "TCDScheduler", {}, 1),
}
K_DIFFUSION = {
    "euler": "sample_euler",
    "euler_a": "sample_euler_ancestral",
    "heun": "sample_heun",
    "dpm2": "sample_dpm_2",
    "dpm2_a": "sample_dpm_2_ancestral",
    "dpmpp_2s_a": "sample_dpmpp_2s_ancestral",
    "dpmpp_2m": "sample_dpmpp_2m",
    "dpmpp_sde": "sample_dpmpp_sde",
    "dpmpp_2m_sde": "sample_dpmpp_2m_sde",
    "dpmpp_3m_sde": "sample_dpmpp_3m_sde",
    "lms": "sample_lms",
}
TIMESTEP_FAMILY = ("ddim", "plms", "lcm", "tcd")
VARIANCE_PRESERVING = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")  # in diffusers; ours run along sigma


@dataclass
class Run:
    """One reference run.

    Attributes:
        start: the latents that it starts from.
        steps: the latents after each step.
        denoised: the clean latents at each step's first call, where the reference shows them.
        timesteps: what the network was told, call by call.
        sigmas: the levels, for samplers along sigma.
    """

    start: np.ndarray
    steps: list = field(default_factory=list)
    denoised: list = field(default_factory=list)
    timesteps: list = field(default_factory=list)
    sigmas: np.ndarray | None = None


def source(sampler, schedule):
    """Which reference design.md's rule names for a combination."""
    if sampler in (*TIMESTEP_FAMILY, "unipc"):
        return "diffusers"
    return "diffusers" if schedule in SPACINGS and sampler in DIFFUSERS else "k-diffusion"


def scheduler_for(sampler, schedule, alphas_cumprod, prediction, dtype=torch.float32):
    """The diffusers scheduler, fed this very noise schedule."""
    module, name, extra, _ = DIFFUSERS[sampler]
    cls = getattr(import_module(f"diffusers.schedulers.scheduling_{module}"), name)
    options = {"prediction_type": prediction, "steps_offset": 1, **extra}
    if schedule in SPACINGS:
        options["timestep_spacing"] = schedule
    elif schedule in ("karras", "exponential"):
        options[f"use_{schedule}_sigmas"] = True
    betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    scheduler = cls(trained_betas=betas, **options)
    # trained_betas go through a float32 product; what is compared is the samplers
    scheduler.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=dtype)
    if hasattr(scheduler, "final_alpha_cumprod") and sampler in ("ddim", "plms"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def run_diffusers(
    sampler,
    schedule,
    n,
    model,
    noise,
    draws,
    alphas_cumprod,
    prediction="epsilon",
    *,
    strength=None,
    clean=None,
    blend=None,
    sigmas=None,
    eta=None,
):
    """Run a diffusers scheduler as its pipelines do.

    ``noise`` in float64 makes the timestep family compute in it (others are float32 inside).
    ``model`` takes (torch latents at the network's scale, timestep) and gives the raw prediction;
    ``draws`` are the arrays of step noise; ``blend(latents, known)`` is the inpainting pipeline's
    mix after each call, where ``known`` is ``clean`` noised to the following level.
    """
    dtype = torch.from_numpy(noise).dtype
    scheduler = scheduler_for(sampler, schedule, alphas_cumprod, prediction, dtype)
    scheduler.set_timesteps(n)
    order = DIFFUSERS[sampler][3]
    if sigmas is not None:  # a grid that the scheduler cannot make itself
        log_sigmas = np.log(np.sqrt((1 - alphas_cumprod) / alphas_cumprod))
        told = np.interp(np.log(sigmas[:-1]), log_sigmas, np.arange(len(log_sigmas)))
        scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
        scheduler.timesteps = torch.tensor(told)
    timesteps, start = scheduler.timesteps, 0
    x = torch.from_numpy(noise)
    if strength is not None:
        start = n - min(int(n * strength), n)
        timesteps = timesteps[start * order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start * order)
        x = scheduler.add_noise(torch.from_numpy(clean), x, timesteps[:1])
    else:
        x = x * scheduler.init_noise_sigma
    if sigmas is not None:
        scheduler.set_begin_index(0)

    every = np.array(getattr(scheduler, "sigmas", np.zeros(1)), dtype=np.float64)
    along_sigma = sampler not in TIMESTEP_FAMILY
    if along_sigma:
        levels = every if order == 1 else np.append(every[:-1][::2], 0.0)
        levels = levels[start:]
    vp = sampler in VARIANCE_PRESERVING

    def ours(latents, position):
        values = latents.numpy().astype(np.float64)
        return values * np.sqrt(1 + levels[position] ** 2) if vp else values

    run = Run(start=ours(x, 0), sigmas=levels if along_sigma else None)
    if sampler == "dpmpp_sde":
        queue = iter(draws)
        scheduler.noise_sampler = lambda *_: torch.from_numpy(next(queue))
    settings = {} if eta is None else {"eta": eta}
    # a step is whole after its second call; PLMS takes its first step twice
    skip = {0} if sampler == "plms" and len(timesteps) > 1 else set()
    with injected(scheduler, draws):
        for call, t in enumerate(timesteps):
            run.timesteps.append(float(t))
            out = model(scheduler.scale_model_input(x, t), float(t))
            result = scheduler.step(out, t, x, **settings)
            x = result.prev_sample
            if blend is not None:
                known = torch.from_numpy(clean)
                if call < len(timesteps) - 1:
                    following = timesteps[call + 1 : call + 2]
                    known = scheduler.add_noise(known, torch.from_numpy(noise), following)
                x = blend(x, known)
            if order == 2 and call % 2 == 0 and call < len(timesteps) - 1:
                continue
            if call in skip:
                continue
            run.steps.append(ours(x, len(run.steps) + 1))
    return run


@contextmanager
def injected(scheduler, draws):
    """The scheduler's module draws from ``draws``; zeros when they are used up (unused draws)."""
    module = sys.modules[type(scheduler).__module__]
    queue = iter(draws)

    def drawn(shape, **_):
        array = next(queue, None)
        return torch.zeros(shape) if array is None else torch.from_numpy(array)

    with mock.patch.object(module, "randn_tensor", drawn, create=True):
        yield


@contextmanager
def float64():
    """torch's default is float64 within, so that k-diffusion computes its grids in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_k_diffusion(
    sampler,
    sigmas,
    model,
    noise,
    draws,
    alphas_cumprod,
    prediction="epsilon",
    *,
    clean=None,
    scale=None,
    eta=None,
    blend=None,
    kept=None,
):
    """Run a k-diffusion sampler in float64 over ``sigmas``, as A1111 does.

    ``blend(latents, known)`` mixes in ``kept``, the clean latents of inpainting, noised to the
    level of each call but the first.
    """
    run = Run(start=np.zeros(0), sigmas=np.array(sigmas, dtype=np.float64))
    wrap = (
        k_external.DiscreteVDDPMDenoiser
        if prediction == "v_prediction"
        else k_external.DiscreteEpsDDPMDenoiser
    )

    def told(x, t):
        run.timesteps.append(float(t[0]))
        return model(x, float(t[0]))

    with float64(), torch.no_grad():
        levels = torch.tensor(sigmas, dtype=torch.float64)
        denoiser = wrap(told, torch.tensor(alphas_cumprod, dtype=torch.float64), quantize=False)
        unit = torch.from_numpy(noise).double()

        def seen(x, sigma):
            """Written into the sampler's own latents: it has no other way in between its steps."""
            if blend is not None and run.timesteps:
                x.copy_(blend(x, torch.from_numpy(kept).double() + sigma[0] * unit))
            return denoiser(x, sigma)

        x = unit * (levels[0] if scale is None else scale)
        if clean is not None:
            x = torch.from_numpy(clean).double() + unit * levels[0]
        run.start = x.numpy().copy()
        queue = iter(draws)
        function = getattr(k_sampling, K_DIFFUSION[sampler])
        options = {}
        if "noise_sampler" in signature(function).parameters:
            options["noise_sampler"] = lambda *_: torch.from_numpy(next(queue)).double()
        if eta is not None:
            options["eta"] = eta
        begun = []

        def note(info):
            begun.append(info["x"].numpy().copy())
            run.denoised.append(info["denoised"].numpy().copy())

        try:
            final = function(seen, x, levels, callback=note, disable=True, **options).numpy()
        except UnboundLocalError:  # one step of an SDE multistep sampler: it has x, and stumbles
            assert len(sigmas) == 2 and sampler in ("dpmpp_2m_sde", "dpmpp_3m_sde")
            final = run.denoised[-1]
        if blend is not None:
            final = blend(torch.from_numpy(final), torch.from_numpy(kept).double()).numpy()
        run.steps = [*begun[1:], final]
    return run


def k_sigmas(schedule, n, alphas_cumprod):
    """The levels of every word that follows k-diffusion, A1111 or ComfyUI, 0 included."""
    sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    low, high = float(sigmas[0]), float(sigmas[-1])
    with float64():
        if schedule in ("karras", "exponential", "polyexponential"):
            make = getattr(k_sampling, f"get_sigmas_{schedule}")
            return make(n, low, high).numpy()
        discrete = k_external.DiscreteSchedule(torch.tensor(sigmas), quantize=False)
        # t_to_sigma casts t to float32; this is its arithmetic without the cast
        if schedule == "uniform":
            return _without_cast(discrete).get_sigmas(n).numpy()
        if schedule == "sgm_uniform":  # ComfyUI normal_scheduler, sgm=True
            top = discrete.sigma_to_t(torch.tensor([high]))
            bottom = discrete.sigma_to_t(torch.tensor([low]))
            t = torch.linspace(float(top), float(bottom), n + 1)[:-1]
            return np.append(_without_cast(discrete).t_to_sigma(t).numpy(), 0.0)
    if schedule == "simple":
        stride = len(sigmas) / n
        return np.array([sigmas[-(1 + int(i * stride))] for i in range(n)] + [0.0])
    if schedule == "beta":
        quantiles = scipy.stats.beta.ppf(1 - np.linspace(0, 1, n, endpoint=False), 0.6, 0.6)
        picked = dict.fromkeys(np.rint(quantiles * (len(sigmas) - 1)).astype(int).tolist())
        return np.append(sigmas[list(picked)], 0.0)
    if schedule == "ays":  # NVIDIA's howto: log-linear over the reversed list
        levels = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
        old, new = np.linspace(0, 1, len(levels)), np.linspace(0, 1, n + 1)
        between = np.exp(np.interp(new, old, np.log(levels[::-1])))[::-1].copy()
        between[-1] = 0.0
        return between
    raise KeyError(schedule)


def _without_cast(discrete):
    class Exact(k_external.DiscreteSchedule):
        def t_to_sigma(self, t):
            low, high, w = t.floor().long(), t.ceil().long(), t.frac()
            return ((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()

    return Exact(discrete.sigmas, quantize=False)


def run(sampler, schedule, n, model, noise, draws, alphas_cumprod, prediction="epsilon", **more):
    """Run whichever reference stands for the combination, from text to image."""
    if source(sampler, schedule) == "diffusers":
        if sampler == "unipc" and schedule not in (*SPACINGS, "karras", "exponential"):
            more["sigmas"] = k_sigmas(schedule, n, alphas_cumprod)
        return run_diffusers(
            sampler, schedule, n, model, noise, draws, alphas_cumprod, prediction, **more
        )
    scale = None
    if schedule in SPACINGS:  # k-diffusion's algorithm on the levels of the nearest scheduler
        kin = "dpmpp_2m" if sampler == "dpmpp_3m_sde" else "euler"
        scheduler = scheduler_for(kin, schedule, alphas_cumprod, prediction)
        scheduler.set_timesteps(n)
        sigmas = scheduler.sigmas.double().numpy()
        unit = kin == "dpmpp_2m" or schedule == "leading"
        scale = np.sqrt(sigmas[0] ** 2 + 1) if unit else None
    else:
        sigmas = k_sigmas(schedule, n, alphas_cumprod)
    return run_k_diffusion(
        sampler, sigmas, model, noise, draws, alphas_cumprod, prediction, scale=scale, **more
    )
