"""Chromium, driven by Playwright, and a server that draws with the embedded model.

Run by `make browser`. A Chromium, Chrome or Edge of the system is used, else Playwright's own.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, PngImagePlugin
from playwright.sync_api import Browser, Error, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from known import put_networks
from live import Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge")


def find_browser() -> str | None:
    """A browser's program; None is Playwright's own."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        # Without a sandbox, since tests may run as root in a container; only our page is opened.
        launched = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("browser") / "data", model=None) as running:
        yield running


@pytest.fixture(scope="session")
def stocked(tmp_path_factory):
    """A server whose model folders hold a second model, LoRAs, a ControlNet and a VAE."""
    folder = tmp_path_factory.mktemp("stocked")
    put_networks(folder / "models")
    shutil.copy(folder / "models/Lora/blueprint.safetensors", folder / "models/Lora/sketch.pt")
    (folder / "models/Lora/sketch.pt").rename(folder / "models/Lora/sketch.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPLE_CACHE", str(folder / "cache"))
        running = Server(folder / "data", "--models", str(folder / "models"), model=None)
    running.models = folder / "models"
    with running:
        yield running


class Sheet:
    """A tab with the page in it.

    Attributes:
        page: Playwright's.
        faults: what the browser complained of: errors, refused content, other places asked for.
        refusals: statuses that are answers here; the browser writes each down as an error.
        jobs: what was asked to be drawn, with pictures as bytes.
    """

    READY = "document.querySelector('#steps')?.placeholder"

    def __init__(
        self, browser: Browser, base: str, path: str = "/", *, until: str = READY, **options
    ) -> None:
        """Open it, and wait for what ``until`` says; ``options`` are a browser context's."""
        options.setdefault("viewport", {"width": 1200, "height": 900})
        self.context = browser.new_context(base_url=base, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.faults: list[str] = []
        self.refusals = {422}
        self.jobs: list[dict] = []
        self._until = until
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._see)
        self._base = base
        self.open(path)

    def _hear(self, message) -> None:
        status = re.search(r"status of (\d+)", message.text)
        if status and int(status[1]) in self.refusals:
            return
        if message.type in ("error", "warning"):
            self.faults.append(message.text)

    def _see(self, request) -> None:
        if not request.url.startswith((self._base, "data:", "blob:")):
            self.faults.append(f"asks elsewhere: {request.url}")
        if request.method == "POST" and request.url.endswith("/api/v1/jobs"):
            self.jobs.append(asked(request))

    def open(self, path: str = "/") -> None:
        """Go there, and wait until the form knows the model."""
        self.page.goto(path)
        self.until(self._until)

    def until(self, script: str, argument: object = None) -> None:
        """Wait until JavaScript is true.

        Playwright's own wait_for_function has the page evaluate text, which its policy forbids.
        """
        for _ in range(1200):
            try:
                if self.page.evaluate(script, argument):
                    return
            except Error as error:  # on its way to another page
                if "context was destroyed" not in error.message:
                    raise
            self.page.wait_for_timeout(50)
        raise AssertionError(f"it does not come: {script}")

    def unfold(self) -> None:
        """Open every folded part."""
        self.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

    def fold(self) -> None:
        """Close every folded part."""
        self.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")

    def press_draw(self) -> dict:
        """Press Draw, wait, and return the finished job."""
        with self.page.expect_response("**/api/v1/jobs") as told:
            self.page.click("#draw")
        return self.ended(told.value.json()["id"])

    def asked_for(self, count: int, press: str) -> list[dict]:
        """Press something that asks for so many drawings; returns them."""
        self.jobs.clear()
        self.page.click(press)
        for _ in range(300):
            if len(self.jobs) >= count:
                return list(self.jobs)
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{len(self.jobs)} drawings, not {count}")

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def check_access(self, where: str) -> None:
        """Nothing that axe-core calls serious."""
        results = Axe().run(self.page).response
        bad = [
            (fault["id"], fault["impact"], [node["target"] for node in fault["nodes"]][:4])
            for fault in results["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert not bad, (where, bad)
        assert len(results["passes"]) > 8, where

    def set(self, **fields: object) -> None:
        """Fill fields of the form by their names."""
        self.unfold()
        for name, value in fields.items():
            field = self.page.locator(f"#{name}")
            if field.evaluate("e => e.tagName") == "SELECT":
                field.select_option(str(value))
            else:
                field.fill(str(value))

    def draw(self, prompt: str = "a red maple leaf", **fields: object) -> list[dict]:
        """Press Draw; returns the jobs that were asked for."""
        self.set(**fields)
        self.page.fill("#prompt", prompt)
        with self.page.expect_response("**/api/v1/jobs") as told:
            self.page.click("#draw")
        return [told.value.json()]

    def drawn(self, prompt: str = "a red maple leaf", **fields: object) -> dict:
        """Draw, wait, and return the finished job."""
        [job] = self.draw(prompt, **{"steps": 2, **fields})
        return self.ended(job["id"])

    def ended(self, job: str) -> dict:
        """Wait for a job's end, and for the page to have heard of it."""
        for _ in range(600):
            found = self.get(f"/api/v1/jobs/{job}")
            if found["state"] in ("done", "failed", "cancelled"):
                for picture in found["pictures"]:
                    self.page.wait_for_selector(f"[data-picture='{picture['id']}']")
                return found
            self.page.wait_for_timeout(100)
        raise AssertionError("the job does not end")

    def settled(self) -> None:
        """Wait until nothing is drawn and nothing waits."""
        for _ in range(600):
            states = [job["state"] for job in self.get("/api/v1/jobs")["jobs"]]
            if not {"queued", "running"} & set(states):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError("the queue does not end")

    def get(self, path: str):
        """What the server answers."""
        return self.context.request.get(path).json()

    def picture(self, picture: dict) -> bytes:
        """A picture's file."""
        return self.context.request.get(picture["url"]).body()

    def drop(self, data: bytes, name: str = "picture.png", onto: str = "body") -> None:
        """Let a file fall onto the page, as a file manager does."""
        self.page.evaluate(
            """([bytes, name, type, onto]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
                for (const kind of ["dragenter", "dragover", "drop"])
                    document.querySelector(onto).dispatchEvent(new DragEvent(kind,
                        {dataTransfer: transfer, bubbles: true, cancelable: true}));
            }""",
            [list(data), name, "image/png", onto],
        )

    def told(self) -> str:
        """What is said below the picture."""
        return self.page.inner_text("#telling")


def asked(request) -> dict:
    """What a request asked to draw, with its pictures decoded."""
    draw = json.loads(request.post_data)
    for one in [draw, *draw.get("controls", ()), *draw.get("image_prompts", ())]:
        for name in ("image", "mask"):
            if str(one.get(name, "")).startswith("data:"):
                one[name] = base64.b64decode(one[name].partition(",")[2])
    return draw


def pixels(data: bytes) -> np.ndarray:
    """A file's pixels (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def png(width: int, height: int, **texts: str) -> bytes:
    """A picture's file with texts in it."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    shades = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shades).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


@pytest.fixture
def open_sheet(browser):
    """Opens tabs; the browser must have had nothing to complain of."""
    sheets = []

    def open_one(base: str, path: str = "/", **options) -> Sheet:
        sheets.append(Sheet(browser, base, path, **options))
        return sheets[-1]

    yield open_one
    for sheet in sheets:
        sheet.context.close()
    assert not [fault for sheet in sheets for fault in sheet.faults]


@pytest.fixture
def sheet(open_sheet, server):
    """One tab of the shared server."""
    return open_sheet(server.base)


@pytest.fixture(autouse=True)
def nothing_left(request):
    """What one test leaves in the queue is not in the next one's way."""
    yield
    used = {"server", "stocked"} & set(request.fixturenames)
    for name in used:
        clear(request.getfixturevalue(name))


def clear(server: Server) -> None:
    """Cancel all that waits or is drawn."""
    with server.client() as client:
        for job in client.get("/api/v1/jobs").json()["jobs"]:
            if job["state"] in ("queued", "running", "offered"):
                client.post(f"/api/v1/jobs/{job['id']}/cancel")
