"""Imports point one way: every import of ours is read from the source and held to the table."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"models", "text", "sampling", "images", "metadata", "hub", "twins", "known_models"}
LEAVES |= {"model_folders", "preprocess", "enlarge"}
WITH_PATHS = LEAVES | {
    "adapters",
    "adapter_files",
    "upscalers",
    "image_encoders",
    "image_prompt",
    "forms",
    "engine",
    "conditioning",
    "guidance",
    "control",
    "sizes",
    "predictions",
    "drawing",
    "pipeline",
}

# A part of mlx_maple (a folder or a file) and the other parts that it may import.
ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "images": {"metadata"},
    "adapters": {"models"},
    "adapter_files": {"adapters", "model_folders", "maple_convert"},
    "forms": {"engine", "models", "metadata"},
    "upscalers": {"models", "images", "enlarge", "model_folders", "maple_convert"},
    "image_encoders": {"model_folders", "maple_convert"},
    "engine": {"models", "sampling"},
    "conditioning": {"models", "text"},
    "guidance": {"conditioning", "text", "sampling"},
    "sizes": {"conditioning", "models"},
    "predictions": {"models"},
    "control": {"models", "images", "preprocess", "metadata", "image_prompt"},
    "image_prompt": {"models", "images", "metadata"},
    "drawing": {
        "models",
        "text",
        "sampling",
        "adapters",
        "engine",
        "images",
        "metadata",
        "conditioning",
        "guidance",
        "control",
        "enlarge",
        "forms",
        "image_prompt",
        "sizes",
    },
    "pipeline": {
        "drawing",
        "text",
        "sampling",
        "images",
        "metadata",
        "guidance",
        "control",
        "forms",
        "image_prompt",
    },
    "loading": {*WITH_PATHS, "maple_convert"},
    "cli": {*WITH_PATHS, "loading", "serve", "maple_convert", "_openblas"},
    "serve": {*WITH_PATHS, "loading", "cli", "maple_convert"},
    "__main__": {"cli"},
    "__init__": {"_openblas", "loading", "pipeline", "hub"},  # lazily, but for OpenBLAS
    "_openblas": set(),
}
ANYONE = {"__init__"}  # `from mlx_maple import __version__`

# What may be imported from outside, where that is limited.
FOREIGN = {
    "maple_convert": {"numpy", "safetensors"},
    "models": {"mlx", "numpy"},
    "text": {"mlx", "numpy"},
    "sampling": {"mlx", "numpy"},
    "images": {"numpy", "PIL"},
    "_openblas": set(),
}
NEVER = {"torch", "diffusers", "transformers", "k_diffusion"}
# Scripts that `maple bench` runs in processes of their own, to measure what others take: they may
# import those, nothing of ours, and nothing of ours may import them.
RIVALS = "mlx_maple.cli.rivals"


def part_of(module: str) -> str:
    """`mlx_maple.sampling.noise` belongs to the part `sampling`."""
    first, _, rest = module.partition(".")
    if first == "maple_convert":
        return first
    part = rest.partition(".")[0]
    is_there = (ROOT / "mlx_maple" / part).is_dir() or (ROOT / "mlx_maple" / f"{part}.py").is_file()
    return part if part in ALLOWED or (part and is_there) else "__init__"  # a name, such as load


@cache
def statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """All statements that import."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Full names of every module that the source imports, at its top or inside functions."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in statements(source):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base in ("mlx_maple", "maple_convert"):
                names |= {f"{base}.{alias.name}" for alias in node.names}
            else:
                names.add(base)
    return names


def wrong_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    part, wrong = part_of(module), []
    is_rival = module.startswith(RIVALS)
    for name in sorted(imported(source, module, is_package)):
        top = name.partition(".")[0]
        if (is_rival and top == "mlx_maple") or name.startswith(RIVALS):
            wrong.append(f"{module} imports {name}")
        elif is_rival and top in NEVER:
            continue
        elif top in ("mlx_maple", "maple_convert"):
            target = part_of(name)
            allowed = {part} if part == "maple_convert" else {part, *ALLOWED[part], *ANYONE}
            if target not in allowed:
                wrong.append(f"{module} ({part}) imports {name} ({target})")
        elif top in NEVER:
            wrong.append(f"{module} imports {name}")
        elif part in FOREIGN and top not in FOREIGN[part] | set(sys.stdlib_module_names):
            wrong.append(f"{module} imports {name}, from outside")
    return wrong


def sources() -> list[tuple[Path, str]]:
    found = []
    for folder in (ROOT / "mlx_maple", ROOT / "convert" / "maple_convert"):
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder.parent).with_suffix("")
            found.append((path, ".".join(relative.parts).removesuffix(".__init__")))
    return found


@pytest.mark.parametrize(
    ("path", "module"), sources(), ids=lambda value: str(value)[len(str(ROOT)) :]
)
def test_every_import_follows_the_table(path, module):
    assert not wrong_arrows(path.read_text(), module, path.name == "__init__.py")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other around and around, or none."""
    finished: set[str] = set()
    path: dict[str, None] = {}  # on the way, in order

    def walk(module: str) -> list[str]:
        if module in path:
            names = list(path)
            return names[names.index(module) :]
        if module in finished:
            return []
        path[module] = None
        found = next((c for name in sorted(graph[module]) if (c := walk(name))), [])
        del path[module]
        finished.add(module)
        return found

    return next((found for module in graph if (found := walk(module))), [])


def modules_imported(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of ours; a package stands for nothing but itself, as `from package import name`."""
    found: set[str] = set()
    for node in statements(source):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found |= imported(source, module, is_package)
    return {name for name in found & known if not module.startswith(f"{name}.")} - {module}


def test_no_modules_import_each_other():
    """Not even inside functions; but for packages, whose names their modules may ask for."""
    known = {module for _, module in sources()}
    graph = {
        module: modules_imported(path.read_text(), module, path.name == "__init__.py", known)
        for path, module in sources()
    }
    lazy = {"mlx_maple"}  # hands out names of what it imports when they are asked for
    graph = {module: names - lazy for module, names in graph.items() if module not in lazy}
    assert not circle(graph)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_every_part_is_in_the_table():
    parts = {part_of(module) for _, module in sources()} - {"maple_convert"}
    assert parts <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_maple.models.unet", "from mlx_maple.sampling import schedule"),
        ("mlx_maple.models.unet", "def f():\n    import mlx_maple.loading"),
        ("mlx_maple.models.unet", "from ..text.tokenizer import Tokenizer"),
        ("mlx_maple.pipeline", "from mlx_maple import loading"),
        ("mlx_maple.pipeline", "import maple_convert.errors"),
        ("mlx_maple.sampling.noise", "import torch"),
        ("mlx_maple.engine.prepare", "from mlx_maple import pipeline"),
        ("mlx_maple.drawing.phases", "from mlx_maple import pipeline"),
        ("mlx_maple.drawing.phases", "from mlx_maple import loading"),
        ("maple_convert.model", "import mlx.core"),
        ("maple_convert.model", "import huggingface_hub"),
        ("maple_convert.readers.zip", "from mlx_maple import hub"),
        ("mlx_maple.cli.rivals.torch_diffusers", "from mlx_maple.engine import measure"),
        ("mlx_maple.cli.bench", "from mlx_maple.cli.rivals import torch_diffusers"),
        ("mlx_maple.cli.bench", "import torch"),
    ],
)
def test_a_wrong_arrow_is_seen(module, line):
    assert wrong_arrows(line, module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mlx_maple.models.unet", "from mlx_maple.models.layers import GroupNorm"),
        ("mlx_maple.pipeline", "from mlx_maple import images"),
        ("mlx_maple.loading", "import maple_convert"),
        ("mlx_maple.cli.doctor", "from mlx_maple import _OPENBLAS, __version__"),
        ("maple_convert.model", "from .readers import open_checkpoint"),
        ("mlx_maple.cli.rivals.torch_diffusers", "import torch"),
    ],
)
def test_a_right_arrow_passes(module, line):
    assert not wrong_arrows(line, module)
