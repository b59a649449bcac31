"""Build the data set (icons.npz, meta.json) and the pruned vocabulary from npm packages.

Fetch first, into one folder (nothing is fetched here):
    npm pack @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji@1.2.7 \
        @iconify-json/fluent-emoji-flat@1.2.6 unicode-emoji-json@0.9.0 emojilib@4.0.3 \
        emojibase-data@17.0.0
    for f in *.tgz; do mkdir -p ${f%.tgz} && tar xzf $f -C ${f%.tgz} --strip-components=1; done
and CLIP's merges, bpe_simple_vocab_16e6.txt.gz (openai/CLIP). Then:
    python prepare_data.py --packages npm --clip bpe_simple_vocab_16e6.txt.gz --out data

Drawings are rasterised at 256 pixels and averaged to 128. For each drawing the colour it has and
the colours it can truthfully be given are measured once, by the rule that the evaluation uses.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from captions import CHROMATIC, COLOURS, STYLES, Catalogue, all_phrases
from PIL import Image
from render import HUE, TARGETS, TINT, main_colour, recolour
from torch.nn import functional as F
from vocabulary import Tokenizer, prune

ART = (
    ("noto", "iconify-json-noto-1.2.9"),
    ("fluent", "iconify-json-fluent-emoji-1.2.7"),
    ("flat", "iconify-json-fluent-emoji-flat-1.2.6"),
)
KEPT_FLAGS = {
    "chequered flag", "triangular flag", "crossed flags", "black flag", "white flag",
    "rainbow flag", "pirate flag",
}  # fmt: skip
UNWANTED = re.compile(
    r"[:“\"”’(]|button\b|keycap|o’clock|-thirty|medium|skin|arrow|input |facing right|oncoming|"
    r"small square|large square|diamond$|triangle pointed|question mark|exclamation|^no |"
    r"japanese (?:post|symbol)|gesturing|quarter moon$|gibbous|wards pushing|meridians|asia-"
)
BAD_WORDS = {"batman", "doge", "facepalm", "zzz", "fu", "middle finger", "ca"}
RENAMED = {
    "person: red hair": "person with red hair", "person: curly hair": "person with curly hair",
    "person: white hair": "person with white hair", "person: bald": "bald person",
    "person: beard": "person with a beard", "person: blond hair": "person with blond hair",
    "woman: blond hair": "woman with blond hair", "piñata": "pinata",
}  # fmt: skip


def codepoints(emoji: str, keep_selector: bool = False) -> str:
    """'1f341' style hex of an emoji, without the variation selector unless asked."""
    return "-".join(f"{ord(c):x}" for c in emoji if keep_selector or c != "\ufe0f")


def clean(text: str) -> str:
    """Lower case, plain spaces."""
    text = text.lower().replace("_", " ").replace("-", " ").replace("’", "'")
    return re.sub(r"\s+", " ", text).strip()


def usable(text: str) -> bool:
    """Plain short English."""
    return bool(re.fullmatch(r"[a-z0-9 ']{3,34}", text))


def chosen_emoji(packages: Path) -> list[tuple[str, str, str]]:
    """(emoji, name, group) of everything to be drawn; gendered twins of a neutral name are left."""
    listed = json.loads((packages / "unicode-emoji-json-0.9.0/data-by-emoji.json").read_text())
    found = []
    for emoji, facts in listed.items():
        name = RENAMED.get(facts["name"], facts["name"])
        if facts["group"] == "Flags" and name not in KEPT_FLAGS:
            continue
        if UNWANTED.search(name):
            continue
        name = clean(name.replace("!", "").replace(".", "").replace("é", "e").replace("ã", "a"))
        if usable(name):
            found.append((emoji, name, facts["group"]))
    names = {name for _, name, _ in found}
    kept = []
    for emoji, name, group in found:
        bare = re.sub(r"\b(man|woman|men|women)\b ?", "", name).strip()
        neutral = re.sub(r"\b(man|woman)\b", "person", name)
        neutral = re.sub(r"\b(men|women)\b", "people", neutral)
        twins = {bare, f"person {bare}", neutral} - {name}
        if bare != name and twins & names:
            continue
        kept.append((emoji, name, group))
    return kept


def words_for(packages: Path, emoji: list[tuple[str, str, str]]) -> list[dict]:
    """Synonyms (phrases for one emoji only), keywords, and keywords that are nearly unique."""
    lib = json.loads((packages / "emojilib-4.0.3/dist/emoji-en-US.json").read_text())
    base_folder = packages / "emojibase-data-17.0.0/en"
    base = {x["hexcode"]: x for x in json.loads((base_folder / "data.json").read_text())}
    codes: dict[str, list[str]] = {}
    for kind in ("emojibase", "github", "iamcal", "cldr"):
        for key, value in json.loads((base_folder / f"shortcodes/{kind}.json").read_text()).items():
            codes.setdefault(key, []).extend([value] if isinstance(value, str) else value)
    names = {name for _, name, _ in emoji}
    phrases, tags = [], []
    for symbol, name, _ in emoji:
        full, bare = codepoints(symbol, True).upper(), codepoints(symbol).upper()
        facts = base.get(full) or base.get(bare) or {}
        candidates = [facts.get("label", name), *(codes.get(bare) or codes.get(full) or [])]
        candidates += lib.get(symbol, [])[:1]
        candidates = [clean(c) for c in candidates if not UNWANTED.search(c)]
        phrases.append([
            c for c in dict.fromkeys(candidates)
            if usable(c) and c != name and len(c.split()) <= 4 and c not in BAD_WORDS
            and not c[-1].isdigit()
        ])  # fmt: skip
        keywords = [clean(t) for t in [*lib.get(symbol, [""])[1:], *facts.get("tags", [])]]
        tags.append([
            t for t in dict.fromkeys(keywords)
            if re.fullmatch(r"[a-z ]{3,16}", t) and len(t.split()) <= 2
            and t != name and t not in BAD_WORDS
        ])  # fmt: skip
    phrase_count = Counter(p for group in phrases for p in group)
    tag_count = Counter(t for group in tags for t in group)
    out = []
    for (symbol, name, group), own, keywords in zip(emoji, phrases, tags, strict=True):
        synonyms = [p for p in own if p not in names and phrase_count[p] == 1]
        solo = [
            t for t in keywords
            if tag_count[t] == 1 and t not in names and t not in phrase_count and len(t) >= 4
        ]  # fmt: skip
        out.append({
            "emoji": symbol, "name": name, "group": group, "synonyms": synonyms[:6],
            "tags": [t for t in keywords if t not in name.split()][:10], "solo": solo[:3],
        })  # fmt: skip
    return out


def prepare_icon(job: tuple[str, float, float]) -> dict | None:
    """One drawing's WebP bytes and colours, or None when it cannot be drawn."""
    torch.set_num_threads(1)
    pixels = rasterise(*job)
    if pixels is None:
        return None
    mode, main = main_hsv(pixels)
    natural, takes = measured_colours(pixels, mode, main)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=60, method=4)
    return {
        "webp": file.getvalue(), "mode": mode, "main": [round(x, 4) for x in main],
        "natural": natural, "recolours": takes,
    }  # fmt: skip


def rasterise(body: str, width: float, height: float) -> np.ndarray | None:
    """SVG body to (128, 128, 4) uint8 with straight alpha, or None when it cannot be drawn."""
    import resvg_py

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )
    try:
        data = resvg_py.svg_to_bytes(svg_string=svg, width=256, skip_system_fonts=True)
    except ValueError:
        return None
    pixels = (
        np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGBA")).astype(np.float32) / 255
    )
    if pixels.shape != (256, 256, 4):
        return None
    pixels[..., :3] *= pixels[..., 3:]
    pixels = pixels.reshape(128, 2, 128, 2, 4).mean((1, 3))
    alpha = pixels[..., 3:]
    pixels[..., :3] = np.where(alpha > 1 / 512, pixels[..., :3] / np.maximum(alpha, 1e-6), 0)
    out = (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return None if out[..., 3].mean() < 4 else out


def main_hsv(pixels: np.ndarray) -> tuple[int, list[float]]:
    """How an icon can take a colour (0, HUE or TINT) and its main hue, saturation and value."""
    opaque = pixels[..., 3] > 140
    rgb = pixels[opaque][:, :3].astype(np.float32) / 255
    if len(rgb) < 50:
        return 0, [0.0, 0.0, 0.0]
    value, low = rgb.max(1), rgb.min(1)
    delta = value - low
    saturation = delta / np.maximum(value, 1e-6)
    red, green, blue = rgb.T
    safe = np.maximum(delta, 1e-6)
    hue = np.where(
        value == red, ((green - blue) / safe) % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    ) / 6  # fmt: skip
    hued = (saturation > 0.22) & (value > 0.15)
    if hued.mean() < 0.22:
        return TINT, [0.0, 0.0, float(value[~hued].mean())]
    weight = (saturation * value)[hued]
    histogram = np.bincount((hue[hued] * 72).astype(int) % 72, weights=weight, minlength=72)
    smooth = np.convolve(np.r_[histogram[-5:], histogram, histogram[:5]], np.ones(11), "valid")
    near = hued & (np.abs((hue - (smooth.argmax() + 0.5) / 72 + 0.5) % 1 - 0.5) < 32 / 360)
    angle, weight = 2 * np.pi * hue[near], (saturation * value)[near]
    mean = np.arctan2((np.sin(angle) * weight).sum(), (np.cos(angle) * weight).sum()) / (2 * np.pi)
    return HUE, [float(mean % 1), float(saturation[near].mean()), float(value[near].mean())]


@torch.no_grad()
def measured_colours(pixels: np.ndarray, mode: int, main: list[float]) -> tuple[int, list[int]]:
    """The colour a drawing has (-1: none stands out) and the colours it takes truthfully."""
    icon = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    colour = F.avg_pool2d(icon[:, :3] * icon[:, 3:], 2)
    alpha = F.avg_pool2d(icon[:, 3:], 2)
    icon = colour / alpha.clamp_min(1e-3)
    mask = alpha[:, 0] > 0.5
    natural = _plainly(*main_colour(icon, mask))[0]
    if mode == 0:
        return natural, []
    many = icon.expand(len(TARGETS), -1, -1, -1)
    targets = torch.arange(len(TARGETS))
    modes = torch.full((len(TARGETS),), mode)
    done = recolour(many, modes, torch.tensor(main).expand(len(TARGETS), -1), targets)
    named = _plainly(*main_colour(done.clamp(0, 1), mask.expand(len(TARGETS), -1, -1)))
    limit = CHROMATIC if mode == TINT else len(COLOURS)
    return natural, [t for t in range(limit) if named[t] == t and t != natural]


def _plainly(names: torch.Tensor, shares: torch.Tensor) -> list[int]:
    """Only colours that hold 40% of the object: a caption should leave no doubt."""
    pairs = zip(names.tolist(), shares, strict=True)
    return [n if n >= 0 and share[n] >= 0.4 else -1 for n, share in pairs]


def main() -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these emoji and no others")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = chosen_emoji(args.packages)
    if args.only:
        if strange := set(args.only) - {name for _, name, _ in chosen}:
            parser.error(f"no emoji is called {sorted(strange)}")
        chosen = [item for item in chosen if item[1] in args.only]
    emoji = words_for(args.packages, chosen)

    jobs, owners = [], []
    flat_names = json.loads((args.packages / ART[2][1] / "chars.json").read_text())
    for style, folder in ART:
        if style not in args.styles:
            continue
        art = json.loads((args.packages / folder / "icons.json").read_text())
        names = json.loads((args.packages / folder / "chars.json").read_text()) or flat_names
        for index, item in enumerate(emoji):
            key = names.get(codepoints(item["emoji"])) or names.get(codepoints(item["emoji"], True))
            key = art.get("aliases", {}).get(key, {}).get("parent", key)
            if key in art["icons"]:
                icon = art["icons"][key]
                width = icon.get("width", art.get("width", 16))
                height = icon.get("height", art.get("height", 16))
                jobs.append((icon["body"], width, height))
                owners.append((index, STYLES.index(style)))
    with Pool(2) as pool:
        drawings = pool.map(prepare_icon, jobs, chunksize=16)
    icons, blobs, used = [], [], {}
    for (index, style), drawing in zip(owners, drawings, strict=True):
        if drawing is None:
            continue
        blobs.append(drawing.pop("webp"))
        if emoji[index]["group"] == "People & Body":  # people keep their colours
            drawing |= {"natural": -1, "recolours": []}
        icons.append({"emoji": used.setdefault(index, len(used)), "style": style, **drawing})
    kept = [emoji[i] for i in used]
    offsets = np.cumsum([0, *map(len, blobs)]).astype(np.int64)
    blob = np.frombuffer(b"".join(blobs), np.uint8)
    np.savez(args.out / "icons.npz", blob=blob, offsets=offsets)
    meta = json.dumps({"emoji": kept, "icons": icons}, ensure_ascii=False, separators=(",", ":"))
    (args.out / "meta.json").write_text(meta, encoding="utf-8")
    small = prune(Tokenizer.from_clip(args.clip), all_phrases(Catalogue(args.out)), args.out)
    print(
        len(kept), "emoji,", len(icons), "icons of", len(jobs), Counter(i["style"] for i in icons)
    )
    print("natural colours", Counter(COLOURS[i["natural"]] for i in icons if i["natural"] >= 0))
    print("recolourings", Counter(COLOURS[c] for i in icons for c in i["recolours"]))
    print(f"{blob.nbytes / 1e6:.1f} MB of artwork, vocabulary {len(small.ids)}")


if __name__ == "__main__":
    main()
