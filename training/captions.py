"""What may be drawn and what is said about it: scenes, their captions, and what is held out.

A scene is one or two icons on a plain background. Everything the caption states is true of the
scene; what it leaves out takes the default (upright, large, centred, white background, Fluent
artwork where it exists), so that a short prompt has one plain meaning.

Legend   An icon is one drawing; an emoji is a name that up to three icons (styles) share.
         Positions are in [-1, 1], right and down positive; scale 1 fills the picture.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

STYLES = ("noto", "fluent", "flat")
STYLE_WORDS = (
    (", noto style", "in noto style", ", noto emoji"),
    (", fluent style", "in fluent style", ", glossy style"),
    (", flat style", "in flat style", ", flat design"),
)

COLOURS = tuple("red orange yellow green teal blue purple pink brown gray white black".split())
CHROMATIC = 9  # the first nine have a hue
COLOUR_WORDS = {
    "gray": ("gray", "grey"),
    "teal": ("teal", "turquoise"),
    "purple": ("purple", "violet"),
}

# name, sRGB, weight; the first twelve are COLOURS in order
BACKGROUNDS = (
    ("red", (0.85, 0.14, 0.15), 5),
    ("orange", (1.0, 0.56, 0.12), 4),
    ("yellow", (1.0, 0.86, 0.2), 5),
    ("green", (0.2, 0.67, 0.3), 5),
    ("teal", (0.08, 0.6, 0.6), 4),
    ("blue", (0.16, 0.42, 0.9), 5),
    ("purple", (0.5, 0.22, 0.75), 4),
    ("pink", (1.0, 0.6, 0.78), 4),
    ("brown", (0.45, 0.28, 0.15), 3),
    ("gray", (0.5, 0.5, 0.5), 3),
    ("white", (1.0, 1.0, 1.0), 5),
    ("black", (0.04, 0.04, 0.05), 5),
    ("light gray", (0.82, 0.82, 0.83), 1),
    ("light green", (0.7, 0.93, 0.68), 2),
    ("dark green", (0.05, 0.32, 0.15), 2),
    ("light blue", (0.66, 0.85, 0.98), 3),
    ("dark blue", (0.06, 0.12, 0.4), 3),
    ("beige", (0.95, 0.9, 0.78), 1),
    ("lavender", (0.8, 0.74, 0.96), 1),
)
WHITE, BLACK = 10, 11
BACKGROUND_WORDS = {
    **COLOUR_WORDS,
    "light gray": ("light gray", "light grey"),
    "dark blue": ("dark blue", "navy blue", "navy"),
    "light blue": ("light blue", "sky blue"),
}
# backgrounds on which an object of that colour would vanish
TOO_CLOSE = {
    "green": ("green", "light green", "dark green"),
    "blue": ("blue", "dark blue", "light blue"),
    "purple": ("purple", "lavender"),
    "gray": ("gray", "light gray"),
    "white": ("white", "light gray", "beige"),
    "black": ("black", "dark blue", "dark green"),
    "brown": ("brown",),
}
BACKGROUND_AFTER = (
    "on a {} background", "on a {} background", "on a {} background", "against a {} background",
    "with a {} background", ", {} background", "on {}",
)  # fmt: skip
BACKGROUND_BEFORE = "on a {} background ,"
PREFIXES = (
    "an emoji of",
    "a picture of",
    "an icon of",
    "a drawing of",
    "clip art of",
    "an image of",
)
SIZES = {"small": ("small", "little"), "tiny": ("tiny",), "large": ("large", "big", "huge")}
SCALES = {"": (0.84, 0.92), "small": (0.45, 0.56), "tiny": (0.26, 0.34), "large": (1.0, 1.1)}
TURNS = {
    "mirrored": ("mirrored", "flipped"),
    "down": ("upside down",),
    "tilted": ("tilted", "rotated"),
}
PLACES = (
    ("in the top left corner", -1, -1), ("in the top right corner", 1, -1),
    ("in the bottom left corner", -1, 1), ("in the bottom right corner", 1, 1),
    ("on the left", -1, 0), ("on the right", 1, 0), ("at the top", 0, -1), ("at the bottom", 0, 1),
    ("in the center", 0, 0), ("in the corner", None, None),
)  # fmt: skip
THING_FIELDS = 8
ROW = 2 * THING_FIELDS + 7  # numbers that describe a scene to the renderer
UNKNOWN = "<|unknown|>"  # one id for every word the model has never seen

# Words that the pruned vocabulary must hold besides the captions' own.
EXTRA_WORDS = (
    "and a an the of with in on to by at is it this that photo some one two three very cute emoji "
    "icon picture style background color colour bright dark light blurry ugly low quality"
)


@dataclass
class Thing:
    """One placed icon; colour is an index into COLOURS, or -1 for the drawing as it is."""

    icon: int
    colour: int = -1
    scale: float = 0.88
    x: float = 0.0
    y: float = 0.0
    rotation: float = 0.0
    mirror: bool = False


@dataclass
class Scene:
    """One or two things on a background, and the phrases that describe them."""

    things: list[Thing]
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    phrases: list[str] = field(default_factory=list)
    second_background: tuple[float, float, float] | None = None  # bottom of a vertical gradient

    @property
    def caption(self) -> str:
        """The phrases as one line of English."""
        return " ".join(p for p in self.phrases if p).replace(" ,", ",")


def scene_row(scene: Scene) -> list[float]:
    """A scene as ROW numbers.

    Twice icon, target colour, scale, x, y, rotation, mirror (-1 or 1) and presence; then the RGB
    of the background's top and bottom, and the number of things.
    """
    row: list[float] = []
    for thing in scene.things:
        row += [thing.icon, thing.colour, thing.scale, thing.x, thing.y, thing.rotation]
        row += [-1.0 if thing.mirror else 1.0, 1.0]
    if len(scene.things) == 1:
        row += [0.0, -1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    bottom = scene.second_background or scene.background
    return [*row, *scene.background, *bottom, float(len(scene.things))]


class Catalogue:
    """The data set's metadata: emoji, icons, and what may be combined."""

    def __init__(self, folder: str | Path) -> None:
        meta = json.loads(Path(folder, "meta.json").read_text(encoding="utf-8"))
        self.emoji: list[dict] = meta["emoji"]
        self.icons: list[dict] = meta["icons"]
        self.styles_of: list[dict[int, int]] = [{} for _ in self.emoji]  # style -> icon
        for i, icon in enumerate(self.icons):
            self.styles_of[icon["emoji"]][icon["style"]] = i
        self.weights = [emoji_weight(e) for e in self.emoji]
        self.nouns = [_nouns(e) for e in self.emoji]
        self.plain_nouns = [_nouns(e, without_colours=True) for e in self.emoji]
        self.names_colour = [bool(_COLOUR_WORD.search(e["name"])) for e in self.emoji]
        self.held_pairs, self.held_triples = hold_out(self)

    def default_icon(self, emoji: int) -> int:
        """The icon that a prompt without a style means: Fluent, else flat, else Noto."""
        styles = self.styles_of[emoji]
        return styles.get(1, styles.get(2, styles.get(0)))


def emoji_weight(emoji: dict) -> float:
    """How often an emoji is drawn: objects and animals more, look-alike symbols less."""
    return {
        "Animals & Nature": 1.3, "Food & Drink": 1.3, "Smileys & Emotion": 1.1,
        "People & Body": 0.6, "Symbols": 0.7, "Flags": 0.7,
    }.get(emoji["group"], 1.0)  # fmt: skip


_COLOUR_WORD = re.compile(r"\b(" + "|".join((*COLOURS, "grey")) + r")\b")


def _nouns(emoji: dict, without_colours: bool = False) -> list[str]:
    """Sixteen phrases to draw from: the name 11 times, synonyms 4, a rare keyword once."""
    name, synonyms, solo = emoji["name"], emoji["synonyms"][:2], emoji["solo"][:1]
    if without_colours and _COLOUR_WORD.search(name):
        name = re.sub(r"\s+", " ", _COLOUR_WORD.sub("", name)).strip() or name
        synonyms = solo = []
    if without_colours:
        synonyms = [s for s in synonyms if not _COLOUR_WORD.search(s)]
        solo = []
    out = [name] * 11 + [synonyms[i % len(synonyms)] if synonyms else name for i in range(4)]
    return [*out, solo[0] if solo else name]


def article(phrase: str) -> str:
    """'a', 'an' or nothing, by the phrase's first and last word."""
    last = phrase.split(" ")[-1]
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is", "bus", "ops"))
    if plural or last in {"people", "dna", "fire", "rice", "men", "women"}:
        return ""
    vowel = phrase[0] in "aeiou" and not phrase.startswith(("uni", "one", "eu", "ut"))
    return "an" if vowel or phrase.startswith(("hour", "x ray")) else "a"


def with_article(text: str) -> str:
    """'a orange' to 'an orange' within a fixed phrase."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def hold_out(catalogue: Catalogue, seed: int = 20) -> tuple[set, set]:
    """Combinations that training never composes, fixed by the seed.

    Returns:
        100 pairs (emoji, colour), never drawn on any background; and 200 triples (emoji, colour,
        background) never drawn together, 100 of which repeat a held-out pair. Of a small catalogue
        one triple an emoji, and half as many pairs.
    """
    rng = random.Random(seed)
    able = [
        e for e in range(len(catalogue.emoji))
        if not catalogue.names_colour[e]
        and len(catalogue.icons[catalogue.default_icon(e)]["recolours"]) >= 6
        and catalogue.emoji[e]["group"] not in ("Symbols", "Flags")
    ]  # fmt: skip
    if not able:
        return set(), set()
    rng.shuffle(able)
    pairs: list[tuple[int, int]] = []
    triples: list[tuple[int, int, int]] = []
    count = min(200, len(able))
    for i, emoji in enumerate(able[:count]):
        colour = rng.choice(catalogue.icons[catalogue.default_icon(emoji)]["recolours"])
        near = TOO_CLOSE.get(COLOURS[colour], (COLOURS[colour],))
        background = rng.choice([b for b in range(12) if BACKGROUNDS[b][0] not in near])
        triples.append((emoji, colour, background))
        if i < count // 2:
            pairs.append((emoji, colour))
    return set(pairs), set(triples)


class Sampler:
    """Draws scenes with captions (for the diffusion model) or without (for the autoencoder)."""

    def __init__(self, catalogue: Catalogue, seed: int) -> None:
        self.catalogue = catalogue
        self.rng = random.Random(seed)
        self._cumulative = _running_sum(catalogue.weights)
        self._backgrounds = _running_sum([w for _, _, w in BACKGROUNDS])

    def _emoji(self) -> int:
        return self.rng.choices(range(len(self.catalogue.emoji)), cum_weights=self._cumulative)[0]

    def _jittered(self, background: int) -> tuple[float, float, float]:
        rgb = BACKGROUNDS[background][1]
        return tuple(min(1.0, max(0.0, c + self.rng.uniform(-0.02, 0.02))) for c in rgb)

    def _dress(self, emoji: int, icon: int, background: int, chance: float) -> tuple[int, str, str]:
        """Choose a colour that is allowed and true: (target or -1, colour word, noun)."""
        rng, cat = self.rng, self.catalogue
        drawing = cat.icons[icon]
        ground = BACKGROUNDS[background][0]
        roll = rng.random()
        if roll < chance and drawing["recolours"]:
            colour = rng.choice(drawing["recolours"])
            near = TOO_CLOSE.get(COLOURS[colour], (COLOURS[colour],))
            if ground not in near and not self._held(emoji, colour, background):
                word = rng.choice(COLOUR_WORDS.get(COLOURS[colour], (COLOURS[colour],)))
                return colour, word, rng.choice(cat.plain_nouns[emoji])
        natural = drawing["natural"]
        if natural >= 0 and rng.random() < 0.25 and not self._held(emoji, natural, background):
            word = rng.choice(COLOUR_WORDS.get(COLOURS[natural], (COLOURS[natural],)))
            return -1, word, rng.choice(cat.plain_nouns[emoji])
        return -1, "", rng.choice(cat.nouns[emoji])

    def _held(self, emoji: int, colour: int, background: int) -> bool:
        cat = self.catalogue
        return (emoji, colour) in cat.held_pairs or (emoji, colour, background) in cat.held_triples

    def scene(self) -> Scene:
        """A scene with its caption."""
        rng, cat = self.rng, self.catalogue
        named = rng.random() < 0.55
        background = (
            rng.choices(range(len(BACKGROUNDS)), cum_weights=self._backgrounds)[0]
            if named
            else WHITE
        )
        name = BACKGROUNDS[background][0]
        word = rng.choice(BACKGROUND_WORDS.get(name, (name,)))
        before = after = ""
        if named and rng.random() < 0.08:
            before = with_article(BACKGROUND_BEFORE.format(word))
        elif named:
            after = with_article(rng.choice(BACKGROUND_AFTER).format(word))
        rgb = self._jittered(background) if named else BACKGROUNDS[WHITE][1]
        prefix = rng.choice(PREFIXES) if rng.random() < 0.15 else ""
        if rng.random() < 0.08:
            things, phrases = self._pair(background)
            return Scene(things, rgb, [before, prefix, *phrases, after])

        emoji = self._emoji()
        style_word = ""
        if rng.random() < 0.4:
            style = rng.choice(list(cat.styles_of[emoji]))
            icon = cat.styles_of[emoji][style]
            style_word = rng.choice(STYLE_WORDS[style])
        else:
            icon = cat.default_icon(emoji)
        colour, colour_word, noun = self._dress(emoji, icon, background, 0.4)

        size = rng.choices(("", "small", "tiny", "large"), (80, 10, 3, 7))[0]
        low, high = SCALES[size]
        x, y = rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)
        place = ""
        if size != "large" and rng.random() < 0.12:
            place, px, py = rng.choice(PLACES)
            if px is None:
                px, py = rng.choice((-1, 1)), rng.choice((-1, 1))
            if not size:
                low, high = 0.5, 0.6
        scale = rng.uniform(low, high)
        if place:
            x, y = px * (1 - scale), py * (1 - scale)
        turn = rng.choices(("", "mirrored", "down", "tilted"), (88, 4, 4, 4))[0]
        rotation = {"down": math.pi, "tilted": rng.choice((-1, 1)) * rng.uniform(0.35, 0.7)}.get(
            turn, 0.0
        )
        thing = Thing(icon, colour, scale, x, y, rotation, turn == "mirrored")

        size_word = rng.choice(SIZES[size]) if size else ""
        if place and size == "small" and rng.random() < 0.3:
            size_word = ""
        turn_word = rng.choice(TURNS[turn]) if turn else ""
        late = bool(colour_word) and rng.random() < 0.05
        words = [size_word, turn_word, "" if late else colour_word, noun]
        phrases = [self._article(words), *words]
        if late:
            phrases += [",", colour_word]
        phrases += [place, style_word, after]
        tags = cat.emoji[emoji]["tags"][:2]
        if tags and rng.random() < 0.08:
            phrases += [", " + t for t in rng.sample(tags, min(len(tags), rng.choice((1, 2))))]
        if rng.random() < 0.04:
            phrases.insert(
                rng.choice((1, len(phrases))), " ".join([UNKNOWN] * rng.choice((1, 2, 3)))
            )
        return Scene([thing], rgb, [before, prefix, *phrases])

    def _pair(self, background: int) -> tuple[list[Thing], list[str]]:
        """Two emoji side by side: 'a cat and a red apple', the first on the left."""
        things, phrases = [], []
        for side in (-1, 1):
            emoji = self._emoji()
            icon = self.catalogue.default_icon(emoji)
            colour, colour_word, noun = self._dress(emoji, icon, background, 0.3)
            scale = self.rng.uniform(0.44, 0.48)
            things.append(Thing(icon, colour, scale, 0.5 * side, 0.0))
            phrases += ["and"] if phrases else []
            phrases += [self._article([colour_word, noun]), colour_word, noun]
        return things, phrases

    def _article(self, words: list[str]) -> str:
        roll = self.rng.random()
        if roll < 0.10:
            return ""
        if roll < 0.16:
            return "the"
        noun = words[-1]
        return article(" ".join(w for w in words if w)) if article(noun) else ""

    def wide_scene(self) -> Scene:
        """A scene without a caption, with any scale, turn and background."""
        rng, cat = self.rng, self.catalogue
        things = []
        for side in (-1, 1) if rng.random() < 0.15 else (0,):
            emoji = self._emoji()
            icon = rng.choice(list(cat.styles_of[emoji].values()))
            options = cat.icons[icon]["recolours"]
            colour = rng.choice(options) if options and rng.random() < 0.4 else -1
            scale = rng.uniform(0.4, 0.5) if side else rng.uniform(0.3, 1.5)
            rotation = rng.uniform(-1, 1) if rng.random() < 0.2 else 0.0
            x, y = 0.5 * side + rng.uniform(-0.1, 0.1), rng.uniform(-0.2, 0.2)
            things.append(Thing(icon, colour, scale, x, y, rotation, rng.random() < 0.5))
        ground = rng.choices(range(len(BACKGROUNDS)), cum_weights=self._backgrounds)[0]
        roll = rng.random()
        top = self._jittered(ground if roll < 0.6 else WHITE)
        if roll > 0.8:
            top = (rng.random(), rng.random(), rng.random())
        bottom = (rng.random(), rng.random(), rng.random()) if roll > 0.9 else None
        return Scene(things, top, [], bottom)


def _running_sum(weights: list[float]) -> list[float]:
    total, out = 0.0, []
    for weight in weights:
        total += weight
        out.append(total)
    return out


def all_phrases(catalogue: Catalogue) -> list[str]:
    """Every phrase a caption can hold: the text that the pruned vocabulary must cover."""
    texts = [EXTRA_WORDS, *PREFIXES, *(p for p, _, _ in PLACES)]
    texts += [w for group in (*STYLE_WORDS, *SIZES.values(), *TURNS.values()) for w in group]
    texts += [w for c in COLOURS for w in COLOUR_WORDS.get(c, (c,))]
    for name, _, _ in BACKGROUNDS:
        for word in BACKGROUND_WORDS.get(name, (name,)):
            texts += [with_article(f.format(word)) for f in (*BACKGROUND_AFTER, BACKGROUND_BEFORE)]
    for emoji in catalogue.emoji:
        texts += [emoji["name"], *emoji["synonyms"][:2], *emoji["tags"][:2], *emoji["solo"][:1]]
    return texts
