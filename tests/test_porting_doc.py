"""docs/porting.md points at the files that show each statement: the pointers must not rot."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#]+)[^)]*\)(?: `(\w+)`)?")
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_the_named_symbol_is_there(page):
    for text, target, symbol in LINK.findall(page.read_text()):
        path = page.parent / target
        assert path.exists(), f"{page.name} points at {target}, which is not there"
        if symbol:
            assert re.search(rf"\b{symbol}\b", path.read_text()), f"{target} has no {symbol}"
        if re.fullmatch(r"`[A-Z]\w+`", text):
            assert text.strip("`") in path.read_text(), f"{target} has no {text}"
