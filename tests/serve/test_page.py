"""The page's files as they are served; what it does in a browser: tests/serve/browser/."""

import re
from pathlib import Path

import pytest

import mlx_maple.serve

PAGE = Path(mlx_maple.serve.__file__).with_name("page")
SCRIPTS = sorted(PAGE.glob("*.js"))


def test_the_page_and_its_files_are_served(client):
    index = client.get("/")
    assert index.status_code == 200
    assert "script-src 'self'" in index.headers["content-security-policy"]
    found = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', index.text))
    assert {"/page/main.js", "/page/page.css"} <= found
    for script in SCRIPTS:
        found |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    for path in found:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["cache-control"] == "no-cache"
        kind = answer.headers["content-type"].partition(";")[0]
        expected = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert kind == expected[path.rpartition(".")[2]], path


@pytest.mark.parametrize("path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py"])
def test_nothing_beside_the_page_is_served(client, path):
    assert client.get(path).status_code == 404


def test_nothing_comes_from_elsewhere_and_nothing_is_inline():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", html)
    for path in [*SCRIPTS, PAGE / "index.html", PAGE / "page.css"]:
        text = path.read_text()
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]{2,}", text), path.name
        # Data goes in as text; see dom.js.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_every_element_that_scripts_ask_for_is_there():
    html = (PAGE / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', html) + rows(html)
    assert len(ids) == len(set(ids))
    asked = set()
    for script in SCRIPTS:
        if script.name != "dom.js":
            asked |= set(
                re.findall(
                    r'\b(?:byId|button|input|select|image|dialog)\("([^"]+)"\)', script.read_text()
                )
            )
    assert len(asked) > 60
    assert asked <= set(ids)
    assert set(re.findall(r'\bfor="([^"]+)"', html)) <= set(ids)


def test_the_forms_fields_are_fields_of_a_drawing():
    from mlx_maple.serve.draw import Draw

    html = (PAGE / "index.html").read_text()
    names = set(re.findall(r'\bname="([a-z_]+)"', html)) - {"viewport", "color-scheme"}
    assert {"prompt", "model", "seed"} <= names <= set(Draw.model_fields)
    placed = set(rows(html))
    assert len(placed) > 40 and placed <= set(Draw.model_fields)


def test_the_rows_know_the_servers_bounds():
    from mlx_maple.serve.draw import Draw

    said = re.findall(r"^  (\w+): \{(.*?)\}[,;]$", (PAGE / "fields.js").read_text(), re.M | re.S)
    assert len(said) > 30
    checked = 0
    schema = Draw.model_json_schema()["properties"]
    for name, text in said:
        bounds = dict(re.findall(r"\b(low|high): (-?[\d.]+)", text))
        if name in schema and bounds:
            one = schema[name]["anyOf"][0]
            assert [float(bounds[side]) for side in ("low", "high")] == [
                one["minimum"],
                one["maximum"],
            ], name
            checked += 1
    assert checked > 15


def rows(html: str) -> list[str]:
    """The settings whose rows the page builds, and where."""
    return [name for names in re.findall(r'data-rows="([^"]+)"', html) for name in names.split()]
