"""Which prompts guide which call of the network, and how what it says of each is put together.

Legend   p what the network predicts for a prompt, n for the negative prompt, w a prompt's weight,
         s the guidance scale. A call is one use of the network by the sampler; the first is 0.
Source   out = n + s sum(w (p - n)): Liu et al. 2022 (arXiv:2206.01714), equation 11, with the
         negative prompt as the unconditional one, as AUTOMATIC1111/stable-diffusion-webui @v1.10.1
         has it (modules/sd_samplers_cfg_denoiser.py, combine_denoised). Which form of a changing
         prompt a call sees: its modules/prompt_parser.py. A guidance that is brought back to the
         prediction's own spread: Lin et al. 2023 (arXiv:2305.08891), section 3.4. Guidance in a
         part of the way only: Kynkaanniemi et al. 2024 (arXiv:2404.07724), there by noise level,
         here by the share of the calls.
Differs  All prompts of a drawing are padded with empty chunks to the length of the longest, as
         A1111 does with its setting pad_cond_uncond; one length is one compiled step.

The networks are the pipeline's business: it brings a function that makes a model of one pair.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_maple.conditioning import Conditioning, TextEncoders
from mlx_maple.sampling.denoiser import Model, rescale
from mlx_maple.text.editing import Phase, phase_at
from mlx_maple.text.language import Prompt
from mlx_maple.text.prompt import EncodedPrompt, encode_prompt

EMPHASES = ("original", "no norm")
NO_TEXT = "\0no text"  # stands where a text would; no one can write it
MODELS_KEPT = 8  # of a prompt that changes; each holds what the network has made of its states

# (positive, negative or None, guidance scale) -> (latents, timestep) -> prediction, float32
Pair = Callable[[Conditioning, Conditioning | None, float], Model]


class Wanted(NamedTuple):
    """One of the prompts that are followed: its weight, and its text in each phase."""

    weight: float
    phases: Sequence[Phase]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a drawing follows and avoids.

    Attributes:
        wanted: what is followed, all at once.
        avoided: the negative prompt's phases; None where nothing is avoided.
        states: of every text there, one row each.
        truncated: for "prompt" and "negative prompt", what found no room.
    """

    wanted: Sequence[Wanted]
    avoided: Sequence[Phase] | None
    states: dict[str, Conditioning]
    truncated: dict[str, str]

    def arrays(self) -> list[mx.array]:
        """All that is there, to be evaluated."""
        return [array for each in self.states.values() for array in each.arrays()]

    def avoiding_nothing(self, zeroed: Callable[[Conditioning], Conditioning]) -> "Prompts":
        """The same with no text in place of the negative prompt, which is not the empty text."""
        if self.avoided is None:
            return self
        states = {**self.states, NO_TEXT: zeroed(self.states[self.avoided[0].text])}
        return replace(self, avoided=[self.avoided[0]._replace(text=NO_TEXT)], states=states)

    @property
    def is_single(self) -> bool:
        """Whether one prompt is followed, and not several at once."""
        return len(self.wanted) == 1


def encoded(
    encoders: TextEncoders,
    prompt: Prompt,
    negative: Prompt | None,
    *,
    syntax: str,
    clip_skip: int | None,
    emphasis: str = "original",
    together: bool = False,
) -> Prompts:
    """Encode a prompt and a negative prompt, whatever forms they take; not evaluated.

    Args:
        encoders: of the model.
        prompt: what to follow.
        negative: what to avoid, one part; None where the drawing is not guided.
        syntax: how the texts are written.
        emphasis: "original", which brings a chunk back to its mean, or "no norm".
        clip_skip: the layer that is read, counted from the end; None is the model's own.
        together: one call of an encoder for all texts: faster, and rounded otherwise.

    Raises:
        ValueError: for a text that cannot be encoded.
    """
    avoided = None if negative is None else negative.parts[0].phases
    wanted = [Wanted(part.weight, part.phases) for part in prompt.parts]
    forms = [phase.text for part in wanted for phase in part.phases]
    forms += [phase.text for phase in avoided or ()]
    chunks = {text: _chunks(encoders, text, syntax) for text in dict.fromkeys(forms)}
    longest = max(len(each.ids) for both in chunks.values() for each in both)
    ids, weights = [], []
    for both in chunks.values():
        pairs = zip(both, encoders.tokenizers.values(), strict=True)
        full = [each.padded(tokenizer, longest) for each, tokenizer in pairs]
        ids.append([each.ids for each in full])
        weights.append(None if syntax == "plain" else full[0].weights)
    found = encoders.encode_all(
        ids, weights, clip_skip, keeps_mean=emphasis == "original", together=together
    )
    states = dict(zip(chunks, found, strict=True))
    ends = {"prompt": chunks[wanted[0].phases[0].text][0].truncated}
    if avoided is not None:
        ends["negative prompt"] = chunks[avoided[0].text][0].truncated
    return Prompts(wanted=wanted, avoided=avoided, states=states, truncated=ends)


def guided_model(
    prompts: Prompts,
    pair: Pair,
    guidance_scale: float,
    calls: int,
    *,
    guidance_rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    first: int = 0,
) -> Model:
    """The model that a sampler asks, once in each of its calls and in their order.

    Args:
        prompts: evaluated.
        pair: makes the model of one prompt and what it avoids.
        guidance_scale: 1 is unguided.
        calls: that the sampler will make.
        guidance_rescale: 0 to 1, how far the result's spread is brought back to the prompt's own.
        interval: shares of the calls between which the drawing is guided; outside, the prompt
            alone decides.
        first: how many calls another model has had before.
    """
    models: OrderedDict[object, Model] = OrderedDict()
    count = first - 1

    def kept(key: object, make: Callable[[], Model]) -> Model:
        if key not in models:
            if len(models) >= MODELS_KEPT + len(prompts.wanted):
                models.popitem(last=False)
            models[key] = make()
        models.move_to_end(key)
        return models[key]

    def alone(text: str, is_avoided: bool = False) -> Model:
        states = replace(prompts.states[text], is_avoided=is_avoided)
        return kept((text, is_avoided), lambda: pair(states, None, 1.0))

    def call(latents: mx.array, timestep: float) -> mx.array:
        nonlocal count
        count += 1
        texts = [phase_at(each.phases, count).text for each in prompts.wanted]
        avoided = None if prompts.avoided is None else phase_at(prompts.avoided, count).text
        share, (start, end) = count / calls, interval
        scale = guidance_scale if start <= share and (share < end or end >= 1) else 1.0
        if prompts.is_single:
            if avoided is None or scale == 1:
                return alone(texts[0])(latents, timestep)
            if not guidance_rescale:
                states, other = prompts.states[texts[0]], prompts.states[avoided]
                model = kept((texts[0], "less", avoided), lambda: pair(states, other, scale))
                return model(latents, timestep)
        assert avoided is not None  # what several prompts differ from
        models = [alone(avoided, True), *(alone(text) for text in texts)]
        base, *others = _in_turn(models, latents, timestep)
        towards = mx.zeros_like(base)
        for each, prediction in zip(prompts.wanted, others, strict=True):
            towards = towards + each.weight * (prediction - base)
        out = base + scale * towards
        return rescale(out, base + towards, guidance_rescale) if guidance_rescale else out

    return call


def _in_turn(models: Iterable[Model], latents: mx.array, timestep: float) -> list[mx.array]:
    """Each model's prediction, one after the other, whoever evaluates: one network's memory."""
    found: list[mx.array] = []
    for model in models:
        given = mx.depends([latents], [found[-1]])[0] if found else latents
        found.append(model(given, timestep))
    return found


def _chunks(encoders: TextEncoders, text: str, syntax: str) -> list[EncodedPrompt]:
    return [
        encode_prompt(tokenizer, text, syntax=syntax, words=encoders.words)
        for tokenizer in encoders.tokenizers.values()
    ]
