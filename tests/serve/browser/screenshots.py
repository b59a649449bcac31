"""Draw the pictures of the page that docs/server.md shows.

Run as `python tests/serve/browser/screenshots.py docs/images` with what `make browser` installs.
"""

import sys
import tempfile
from pathlib import Path

from conftest import Sheet, find_browser
from live import Server
from PIL import Image
from playwright.sync_api import sync_playwright

PROMPTS = (
    ("a green frog on a light blue background", 3),
    ("a rocket on a dark blue background", 11),
    ("an octopus, flat style", 4),
    ("a pink cat face on a yellow background", 9),
    ("a red maple leaf on a yellow background", 7),
)


def main(folder: Path) -> None:
    """Write page-light, -dark, -narrow, -mask and -grid.png into ``folder``."""
    with (
        tempfile.TemporaryDirectory() as data,
        Server(Path(data) / "data", model=None) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        wide = Sheet(browser, server.base, viewport={"width": 1120, "height": 860})
        for prompt, seed in PROMPTS:
            # Four unguided steps of lcm: what the embedded model draws fastest.
            wide.drawn(prompt, seed=seed, sampler="lcm", steps=4, guidance_scale=1)
        page = wide.page
        wide.fold()
        page.evaluate("scrollTo(0, 0)")
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=folder / "page-light.png")
        dark = Sheet(
            browser, server.base, viewport={"width": 1120, "height": 860}, color_scheme="dark"
        )
        dark.page.click("#settings > summary")
        dark.page.fill("#prompt", "a rocket on a dark blue background")
        dark.page.fill("#steps", "24")
        dark.page.fill("#guidance_scale", "1")
        dark.until("/Fits/.test(document.querySelector('#plan').textContent)")
        dark.page.click("#draw")
        dark.page.mouse.move(0, 0)
        dark.until("/Step [1-9][0-9]/.test(document.querySelector('#telling').textContent)")
        dark.page.screenshot(path=folder / "page-dark.png")
        dark.page.keyboard.press("Escape")
        narrow = Sheet(browser, server.base, viewport={"width": 390, "height": 780})
        narrow.page.wait_for_timeout(500)
        narrow.page.screenshot(path=folder / "page-narrow.png")
        page.locator("#gallery button").first.click()
        page.click("#to-mask")
        box = page.locator("#mask-canvas").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.4, steps=9)
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.6, steps=9)
        page.mouse.up()
        page.screenshot(path=folder / "page-mask.png")
        page.click("#mask-cancel")
        page.click("#start-clear")
        wide.set(seed=7, sampler="lcm")
        page.select_option("#x-axis", "steps")
        page.fill("#x-values", "1, 2, 3, 4")
        page.select_option("#y-axis", "prompt")
        page.fill("#y-values", "red, blue, green")
        page.click("#grid-draw")
        wide.until("document.querySelectorAll('#sheet td img').length === 12")
        wide.fold()
        page.wait_for_timeout(6500)  # notes are gone
        page.locator("#sheet-box").evaluate("e => e.scrollIntoView({block: 'start'})")
        page.screenshot(path=folder / "page-grid.png")
        browser.close()
    for path in folder.glob("page-*.png"):  # 256 colours will do, at a third of the size
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
