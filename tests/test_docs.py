"""Every command in the documentation runs.

Each fenced ``sh`` block of README.md and docs/**/*.md is run, in the order of the page, in a
scratch folder that holds what a reader would have: a tiny model as ``model.ckpt`` and
``model.safetensors``, ``unet.gguf``, ``vae.safetensors``, ``taesd.safetensors``, ``photo.png``,
``mask.png`` and ``ip``, a folder of IP-Adapters with their image encoder.
The blocks of a page share the folder, so that a later one may use what an earlier one wrote. A
block that cannot run here says what it needs in its first line, and is not run:

    # needs: the hub

Blocks in any other language (``text``, ``python``, ``console``) are not run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ip_adapters
import pytest
import tiny_model

from mlx_maple import loading
from mlx_maple.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS = re.compile(r"#\s*needs:\s*(.+)")
_SHELL = set("|&;<>$`*?()")  # a line with one of these is left to the shell


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """Each block of a page, and what it needs that a test does not have."""
    found = []
    for match in _FENCE.finditer(page.read_text()):
        first = match[1].lstrip().partition("\n")[0]
        needs = _NEEDS.match(first)
        found.append((match[1], needs[1].strip() if needs else None))
    return found


def commands(block: str) -> list[str]:
    """The block's commands, one a line; a backslash joins lines."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def run(command: str, folder: Path) -> int:
    """Run one command: in this process where it is ours and plain, which is far quicker."""
    words = [] if _SHELL & set(re.sub(r"'[^']*'|\"[^\"]*\"", "", command)) else shlex.split(command)
    if words and words[0] == "maple":
        return main(words[1:])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, timeout=120)
    return done.returncode


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder that a reader of the documentation sits in."""
    folder = tmp_path / "reader"
    folder.mkdir()
    for source in tiny_model.folder().iterdir():
        if source.is_file():
            shutil.copy(source, folder)
    shutil.copytree(ip_adapters.folder(), folder / "ip")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MAPLE_MODEL", raising=False)
    # What a command leaves to the model is small here: what is drawn matters to other tests.
    small = {"width": 64, "height": 64, "steps": 2}
    monkeypatch.setattr(loading, "_defaults", lambda defaults: {**defaults, **small})
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, scratch, capsys):
    skipped = []
    for block, needs in blocks(page):
        if needs is not None:
            skipped.append(needs)
            continue
        for command in commands(block):
            code = run(command, scratch)
            said = capsys.readouterr().err
            assert code == 0, f"{page.name}: `{command}` ended with {code}: {said}"


def test_every_option_is_in_the_page_of_the_command():
    from mlx_maple.cli import VERBS
    from mlx_maple.cli.completion import _tree

    text = (ROOT / "docs" / "cli.md").read_text()
    for verb in VERBS:
        assert f"maple {verb}" in text
    for verb, options in _tree().items():
        for option in options:
            for name in option.names:
                if name.startswith("--") and name not in ("--help", "--debug"):
                    assert f"`{name}" in text or f"{name}`" in text, f"maple {verb} {name}"


def test_blocks_are_found_and_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\n# needs: the hub\nmaple x\n```\ntext\n"
        "```sh\n# a word\nmaple a \\\n  b\n\nls | wc\n```\n"
        "```text\nnot run\n```\n"
    )
    assert [needs for _, needs in blocks(page)] == ["the hub", None]
    assert commands(blocks(page)[1][0]) == ["maple a    b", "ls | wc"]
