"""Measure a model: is the named thing there, in the named colours, and does the decoder hold up?

    python evaluate.py --data data --judge judge --model final/diffusers --out metrics.json \
        --runs ddim/20/3 ddim/20/5

Everything is also measured on true artwork composed as the prompts say ("truth"), because neither
the judge nor the colour rule is perfect: a share of the truth's figure is what a model can reach.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from captions import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    WHITE,
    Catalogue,
    Sampler,
    Scene,
    Thing,
    article,
    scene_row,
)
from common import log, parameters, setup, write_json
from measure import colours, lone_colours, overshoots, psnr
from render import Renderer, grid
from sample import Model
from torch import Tensor
from train_classifier import FoldedJudge

NAMES = 400  # drawn from all names, once, by the seed


def noun_phrase(words: str) -> str:
    """'a red apple', 'sunglasses'."""
    return f"{article(words)} {words}".strip()


class Prompts:
    """The four sets of prompts, each with the scene that would be exactly right."""

    def __init__(self, catalogue: Catalogue, seed: int = 7) -> None:
        rng = random.Random(seed)
        self.catalogue = catalogue
        everything = list(range(len(catalogue.emoji)))
        self.named = sorted(rng.sample(everything, min(NAMES, len(everything))))
        able = [
            e for e in everything
            if len(catalogue.icons[catalogue.default_icon(e)]["recolours"]) >= 6
            and not catalogue.names_colour[e]
        ]  # fmt: skip
        self.coloured: list[tuple[int, int, int]] = []  # emoji, colour, background; seen pairs
        for colour in range(len(COLOURS)):
            fits = [
                e for e in able
                if colour in catalogue.icons[catalogue.default_icon(e)]["recolours"]
                and (e, colour) not in catalogue.held_pairs
            ]  # fmt: skip
            ground = WHITE if COLOURS[colour] not in ("white", "gray") else COLOURS.index("blue")
            self.coloured += [(e, colour, ground) for e in rng.sample(fits, min(24, len(fits)))]
        self.grounded = [
            (e, b) for b in range(12) for e in rng.sample(everything, min(24, len(everything)))
        ]
        self.held = sorted(catalogue.held_triples)
        self.placed = [(e, p) for p in range(8) for e in rng.sample(able, min(24, len(able)))]

    def _name(self, emoji: int) -> str:
        return self.catalogue.emoji[emoji]["name"]

    def texts(self) -> dict[str, list[str]]:
        """The prompts of every set."""
        ground = [name for name, _, _ in BACKGROUNDS]

        def on(background: int) -> str:
            word = ground[background]
            return "" if background == WHITE else f" on {article(word)} {word} background"

        def tinted(emoji: int, colour: int, background: int) -> str:
            return noun_phrase(f"{COLOURS[colour]} {self._name(emoji)}") + on(background)

        return {
            "named": [noun_phrase(self._name(e)) for e in self.named],
            "coloured": [tinted(*item) for item in self.coloured],
            "grounded": [
                f"{noun_phrase(self._name(e))} on {noun_phrase(ground[b])} background"
                for e, b in self.grounded
            ],
            "held": [tinted(*item) for item in self.held],
            "placed": [
                f"{noun_phrase('small ' + self._name(e))} {PLACES[p][0]}" for e, p in self.placed
            ],
        }  # fmt: skip

    def scenes(self) -> dict[str, list[Scene]]:
        """The right answers, as scenes."""
        icon = self.catalogue.default_icon
        rgb = [colour for _, colour, _ in BACKGROUNDS]
        placed = []
        for e, p in self.placed:
            _, x, y = PLACES[p]
            placed.append(Scene([Thing(icon(e), -1, 0.5, 0.5 * x, 0.5 * y)]))
        return {
            "named": [Scene([Thing(icon(e))]) for e in self.named],
            "coloured": [Scene([Thing(icon(e), c)], rgb[b]) for e, c, b in self.coloured],
            "grounded": [Scene([Thing(icon(e))], rgb[b]) for e, b in self.grounded],
            "held": [Scene([Thing(icon(e), c)], rgb[b]) for e, c, b in self.held],
            "placed": placed,
        }


def _share(hits: Tensor) -> float:
    return round(hits.float().mean().item(), 4)


def score(prompts: Prompts, pictures: dict[str, Tensor], judge: FoldedJudge) -> dict:
    """Every figure of one model (or of the truth) from its pictures."""
    device = next(iter(pictures.values())).device
    catalogue = prompts.catalogue
    line = {name: i for i, name in enumerate(judge.names)}  # the judge may know more names

    def read(kind: str, emoji: list[int]) -> tuple[Tensor, Tensor]:
        scores = torch.cat([judge(x) for x in pictures[kind].split(256)])
        wanted = torch.tensor([line[catalogue.emoji[e]["name"]] for e in emoji], device=device)
        wanted = wanted[:, None]
        hits = scores.topk(5, dim=1).indices == wanted
        return hits[:, 0], hits.any(1)

    first, five = read("named", prompts.named)
    out = {"top1": _share(first), "top5": _share(five)}
    groups = [catalogue.emoji[e]["group"] for e in prompts.named]
    out["top1_by_group"] = {
        g: _share(first[torch.tensor([h == g for h in groups], device=device)])
        for g in sorted(set(groups))
    }

    colour, background, _ = colours(pictures["coloured"])
    wanted = torch.tensor([c for _, c, _ in prompts.coloured], device=device)
    out["object_colour"] = _share(colour == wanted)
    out["object_colour_by_name"] = {
        name: _share((colour == wanted)[wanted == i]) for i, name in enumerate(COLOURS)
    }
    first, five = read("coloured", [e for e, _, _ in prompts.coloured])
    out["coloured_top1"], out["coloured_top5"] = _share(first), _share(five)

    _, background, _ = colours(pictures["grounded"])
    wanted = torch.tensor([b for _, b in prompts.grounded], device=device)
    out["background_colour"] = _share(background == wanted)
    out["background_colour_by_name"] = {
        name: _share((background == wanted)[wanted == i]) for i, name in enumerate(COLOURS)
    }

    colour, background, _ = colours(pictures["held"])
    right = colour == torch.tensor([c for _, c, _ in prompts.held], device=device)
    ground = background == torch.tensor([b for _, _, b in prompts.held], device=device)
    first, five = read("held", [e for e, _, _ in prompts.held])
    pair = [(e, c) in catalogue.held_pairs for e, c, _ in prompts.held]
    unseen = torch.tensor(pair, device=device)
    out["held_out"] = {
        "count": len(prompts.held), "colour": _share(right), "background": _share(ground),
        "object_top1": _share(first), "object_top5": _share(five),
        "colour_and_object_top1": _share(right & first),
        "colour_and_object_top5": _share(right & five),
        "all_three_top1": _share(right & first & ground),
        "all_three_top5": _share(right & five & ground),
        "unseen_pairs_colour_and_object_top1": _share((right & first)[unseen]),
        "unseen_pairs_colour_and_object_top5": _share((right & five)[unseen]),
    }  # fmt: skip

    out["position"] = _share(_in_place(pictures["placed"], prompts))
    everything = torch.cat([pictures[k] for k in ("named", "coloured", "held")])
    out["lone_colours"] = lone_colours(everything)
    return out


def fidelity(pictures: Tensor, prompts: Prompts, render: Renderer) -> dict:
    """How near the "named" pictures come to their drawing, wherever its small freedom put it.

    Captions leave the size (0.84 to 0.92) and the place (0.03 either way) open: each picture is
    compared with 125 of them, and the best counts. "detail" is its share of the drawing's slopes.
    """
    scales, shifts = torch.linspace(0.84, 0.92, 5).tolist(), torch.linspace(-0.03, 0.03, 5).tolist()
    values, details = [], []
    for picture, emoji in zip(pictures, prompts.named, strict=True):
        icon = prompts.catalogue.default_icon(emoji)
        rows = [
            scene_row(Scene([Thing(icon, -1, s, x, y)]))
            for s in scales for x in shifts for y in shifts
        ]  # fmt: skip
        drawn, seen = render(torch.tensor(rows)), picture.clamp(-1, 1)
        errors = (drawn - seen).square().mean((1, 2, 3)) / 4
        best = errors.argmin()
        values.append(-10 * torch.log10(errors[best].clamp_min(1e-12)))
        details.append(_slope(seen) / _slope(drawn[best]))
    return {
        "psnr": round(torch.stack(values).mean().item(), 2),
        "detail": round(torch.stack(details).mean().item(), 3),
    }


def _slope(picture: Tensor) -> Tensor:
    return picture.diff(dim=1).abs().mean() + picture.diff(dim=2).abs().mean()


def _in_place(pictures: Tensor, prompts: Prompts) -> Tensor:
    """Whether the object's centre lies on the named side (and near the middle otherwise)."""
    x = pictures.clamp(-1, 1)
    mask = ((x - x[:, :, :1, :1].mean((2, 3), keepdim=True)).abs().amax(1) > 0.3).float()
    ramp = torch.linspace(-1, 1, 128, device=x.device)
    total = mask.sum((1, 2)).clamp_min(1)
    centre = torch.stack([(mask * ramp).sum((1, 2)), (mask * ramp[:, None]).sum((1, 2))], 1)
    centre = centre / total[:, None]
    wanted = torch.tensor([PLACES[p][1:] for _, p in prompts.placed], device=x.device)
    good = torch.where(wanted == 0, centre.abs() < 0.25, centre * wanted > 0.15)
    return good.all(1)


def main() -> None:
    """Measure the truth and the model at each guidance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; sheets go beside it")
    parser.add_argument("--lora", type=Path, help="differences for the UNet")
    parser.add_argument(
        "--runs", nargs="+", default=["ddim/20/3"], help="scheduler/steps/guidance; sheets of each"
    )
    parser.add_argument("--limit", type=int, default=0, help="only so many prompts of a kind")
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    runs = [_run(words) for words in args.runs]
    device = setup(0)
    catalogue = Catalogue(args.data)
    render, judge = Renderer(args.data, catalogue, device), FoldedJudge(args.judge, device)
    prompts = Prompts(catalogue)
    if args.limit:
        for kind in ("named", "coloured", "grounded", "held", "placed"):
            some = getattr(prompts, kind)
            setattr(prompts, kind, some[:: max(1, len(some) // args.limit)][: args.limit])
    texts, scenes = prompts.texts(), prompts.scenes()
    truth = {
        kind: torch.cat([render(torch.tensor([scene_row(s) for s in some[i : i + 128]]))
                         for i in range(0, len(some), 128)])
        for kind, some in scenes.items()
    }  # fmt: skip
    results = {"truth": score(prompts, truth, judge)}
    log("truth", results["truth"])

    model = Model.from_folder(args.model, device, args.lora)
    nets = (model.text, model.unet, model.vae)
    results["parameters"] = sum(map(parameters, nets))
    sampler = Sampler(catalogue, 99)
    count = 1024 if device == "cuda" else min(64, args.limit or 256)
    x = torch.cat([render(torch.tensor([scene_row(sampler.scene())])) for _ in range(count)])
    with torch.no_grad():
        y = torch.cat(
            [model.vae.decode(model.vae.encode(p).latent_dist.mean).sample for p in x.split(64)]
        )
    mean_psnr = sum(psnr(a, b) for a, b in zip(x, y, strict=True)) / len(x)
    results["vae"] = {
        "pictures": count, "psnr": psnr(x, y), "mean_of_psnrs": round(mean_psnr, 3),
        "specks": overshoots(y, x),
    }  # fmt: skip
    with torch.no_grad():
        again = torch.cat(
            [model.vae.decode(model.vae.encode(p).latent_dist.mean).sample
             for p in truth["named"].split(64)]
        )  # fmt: skip
    results["vae"]["fidelity"] = fidelity(again, prompts, render)
    log("vae", results["vae"])
    results["runs"] = []
    for scheduler, steps, guidance in runs:
        begin = time.monotonic()
        drawn = {
            kind: model.draw(some, guidance, steps, 1000, scheduler, args.batch)
            for kind, some in texts.items()
        }
        settings = {"scheduler": scheduler, "steps": steps, "guidance": guidance}
        run = {**settings, **score(prompts, drawn, judge)}
        run["fidelity"] = fidelity(drawn["named"], prompts, render)
        run["top1_of_truth"] = round(run["top1"] / max(results["truth"]["top1"], 1e-9), 4)
        run["top5_of_truth"] = round(run["top5"] / max(results["truth"]["top5"], 1e-9), 4)
        results["runs"].append(run)
        log(f"{time.monotonic() - begin:.0f} s", run)
        write_json(args.out, results)
        both = torch.cat([drawn["named"][:32], drawn["held"][:32]])
        labels = texts["named"][:32] + texts["held"][:32]
        sheet = args.out.with_suffix(f".{scheduler}-{steps}-{guidance:g}.png")
        grid(both, 8, labels).save(sheet)


def _run(words: str) -> tuple[str, int, float]:
    scheduler, steps, guidance = words.split("/")
    return scheduler, int(steps), float(guidance)


if __name__ == "__main__":
    main()
