"""The key tables as pages for people; made from the tables, so that they cannot disagree."""

import sys
from collections.abc import Iterable, Mapping, Sequence

from maple_convert.layouts import LAYOUTS, Layout, files
from maple_convert.layouts.parts import SAME, AsLinear, Bare, Packed, Part, Parts, Place

MADE = "<!-- Written by `python -m maple_convert.layouts docs/layouts`; do not edit. -->\n"
COLUMNS = {
    "compvis": "CompVis",
    "diffusers": "diffusers",
    "diffusers_2022": "diffusers before 2023",
    "transformers": "transformers, CompVis",
    "transformers_flat": "transformers from 5.6",
    "openclip": "OpenCLIP",
    "original": "the original",
    "sdcpp": "stable-diffusion.cpp",
    "upstream": "upstream",
    "upstream_from_0": "upstream, from 0",
}
FILES = {
    "text_encoder": "clip.md",
    "unet": "unet.md",
    "vae": "vae.md",
    "taesd": "taesd.md",
    "controlnet": "controlnet.md",
    "t2i_adapter": "t2i_adapter.md",
    "image_encoder": "image_encoder.md",
    "ip_adapter": "ip_adapter.md",
}


def pages() -> dict[str, str]:
    """Every page by its file name; the second text encoder is on the first one's."""
    made = {file: to_markdown(LAYOUTS[name]) for name, file in FILES.items()}
    return made | {"files.md": _files_page()}


def to_markdown(layout: Layout) -> str:
    """One component: what it is, its parts, its places at the published size."""
    module = sys.modules[layout.infer.__module__]
    lines = [MADE, f"# {layout.title[0].upper()}{layout.title[1:]}", ""]
    lines += ["```", (module.__doc__ or "").strip(), "```", ""]
    lines += ["## Parts", ""]
    lines += [
        "One table a kind of block. Weights carry `.weight` and, unless it says otherwise, "
        "`.bias` behind these names. Shapes are native: convolutions (O, H, W, I), "
        "linear layers (O, I).",
        "",
    ]
    for table in layout.tables:
        lines += [f"### {table.title[0].upper()}{table.title[1:]}", "", *_parts(table), ""]
    lines += ["## Places", "", f"At the published size: {_settings(layout.published_config)}.", ""]
    lines += _places(layout)
    return "\n".join(lines) + "\n"


def _parts(table: Parts) -> list[str]:
    head = ["native", *(COLUMNS[s] for s in table.spellings), "weight", "from the file"]
    return _table(head, (_part(part) for part in table.parts))


def _part(part: Part) -> list[str]:
    names = [part.native if name == SAME else name for name in part.published]
    cells = [f"`{part.native}`" if part.native else "(the place itself)"]
    for name in names:
        plain = name if isinstance(name, str) else name.name
        shown = f"`{plain}`" if plain else "(the place itself)"
        if isinstance(name, AsLinear):
            shown += " (linear)"
        elif isinstance(name, Packed):
            shown = f"`{plain}_weight`, `{plain}_bias`, part {name.index + 1} of {name.count}"
        elif isinstance(name, Bare):
            shown += " (no `.weight`)" + (", transposed" if name.transposed else "")
        cells.append(shown)
    shape = f"{part.leaf.kind} ({', '.join(map(str, part.leaf.shape))})"
    bias = "" if part.leaf.bias else ", no bias"
    only = ""
    if part.only_if_differ is not None:
        only = f", only where {' and '.join(part.only_if_differ)} differ"
    ways = part.leaf.weights.name + (" (or linear)" if part.may_be_linear else "")
    return [*cells, shape + bias + only, ways]


def _places(layout: Layout) -> list[str]:
    spellings = layout.spellings
    head = ["native", *(COLUMNS[s] for s in spellings), "block", "widths"]
    return _table(head, (_place(place) for place in layout.places(layout.published_config)))


def _place(place: Place) -> list[str]:
    names = (place.native, *place.published)
    widths = ", ".join(f"{name} {n}" for name, n in place.widths.items())
    return [*(f"`{name}`" if name else "(top)" for name in names), place.parts.title, widths]


def _files_page() -> str:
    lines = [MADE, "# Files", "", "```", (files.__doc__ or "").strip(), "```", ""]
    lines += ["## Where components lie", ""]
    lines += [
        "A component is there when any tensor lies below one of its marks. A file may hold each "
        "component once, in one spelling, below one prefix.",
        "",
    ]
    lines += _table(
        ["component", "names", "prefix", "marks", "but not with"],
        (
            [
                where.component,
                COLUMNS[where.spelling],
                _listed(where.prefixes, "none"),
                _listed(where.marks),
                _listed(where.never),
            ]
            for where in files.WHERE
        ),
    )
    lines += ["", "## EMA copies", ""]
    lines += [
        "`model_ema.` and the name of the parameter below `model.` with its dots removed: "
        "`model.diffusion_model.out.2.bias` has its copy in `model_ema.diffusion_modelout2bias`.",
        "",
        "## Keys that are left out",
        "",
        "Every other key that no table names is an error.",
        "",
    ]
    rows = [[f"`{key}`", why] for key, why in files.DROPPED.items()]
    rows += [[f"`{key}`…", why] for key, why in files.DROPPED_BELOW.items()]
    lines += _table(["key", "why"], rows)
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str], empty: str = "") -> str:
    return ", ".join(f"`{name}`" if name else empty for name in names)


def _settings(config: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items() if value is not None)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
