"""Draw the gallery: 24 prompts, each with its seed and settings, as one picture and one table.

    python examples/gallery.py [--output docs/images] [--model PATH]

Every line of ``PROMPTS`` can be drawn alone: ``maple generate PROMPT --seed SEED``.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

import mlx_maple as maple

PROMPTS = [  # what to draw, and the seed
    ("a red maple leaf", 7),
    ("a blue maple leaf on a yellow background", 7),
    ("a grinning face", 1),
    ("a green cat face", 2),
    ("a purple octopus", 3),
    ("a pink elephant", 4),
    ("a rocket on a dark blue background", 5),
    ("a pizza on a black background", 6),
    ("a sunflower", 8),
    ("a red frog", 9),
    ("a blue crown on a red background", 10),
    ("an orange whale on a light blue background", 11),
    ("a house with garden", 12),
    ("a white rabbit on a purple background", 13),
    ("a dog face, noto style", 14),
    ("a dog face, flat style", 15),
    ("a teal dragon", 16),
    ("a small red apple in the top left corner", 17),
    ("a yellow mushroom on a green background", 18),
    ("a snail", 19),
    ("a purple bicycle", 20),
    ("a green heart on a black background", 21),
    ("an upside down crown", 22),
    ("a cat and a dog", 23),
]
COLUMNS, MARGIN, CAPTION = 6, 6, 30


def sheet(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    """The pictures in rows of ``COLUMNS``, each over its caption."""
    size = pictures[0].width
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new(
        "RGB",
        (COLUMNS * (size + MARGIN) + MARGIN, rows * (size + CAPTION + MARGIN) + MARGIN),
        "white",
    )
    draw = ImageDraw.Draw(page)
    for n, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x = MARGIN + n % COLUMNS * (size + MARGIN)
        y = MARGIN + n // COLUMNS * (size + CAPTION + MARGIN)
        page.paste(picture, (x, y))
        lines, line = [], ""
        for word in caption.split():
            if len(line) + len(word) > 20:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        draw.multiline_text((x, y + size + 2), "\n".join([*lines, line]), fill="black", spacing=1)
    return page


def main() -> None:
    """Draw, and write gallery.png and README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--model", default=None)
    args = parser.parse_args()
    sd = maple.load(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    results = [sd(prompt, seed=seed) for prompt, seed in PROMPTS]
    page = sheet([result.images[0] for result in results], [prompt for prompt, _ in PROMPTS])
    page.save(args.output / "gallery.png", optimize=True)
    settings = results[0].settings[0]
    table = [
        "# The gallery",
        "",
        "![24 pictures](gallery.png)",
        "",
        "Drawn by `make gallery` with the model that comes with the package: "
        f"{settings.sampler}, {settings.schedule}, {settings.steps} steps, guidance "
        f"{settings.guidance_scale}, {settings.width}x{settings.height}, {settings.noise} noise.",
        "Each is `maple generate PROMPT --seed SEED`.",
        "",
        "| prompt | seed |",
        "|---|---|",
        *(f"| {prompt} | {seed} |" for prompt, seed in PROMPTS),
    ]
    (args.output / "README.md").write_text("\n".join(table) + "\n")
    print(json.dumps({"pictures": len(results), "model": sd.info.name}))


if __name__ == "__main__":
    main()
