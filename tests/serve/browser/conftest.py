"""Chromium, driven by Playwright, and a server that draws with the embedded model.

Run by `make browser`. A Chromium, Chrome or Edge of the system is used, else Playwright's own.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


class Sheet:
    """A tab with the page in it.

    Attributes:
        page: Playwright's.
        faults: what the browser complained of: errors, refused content, other places asked for.
    """

    def __init__(self, browser: Browser, base: str, path: str = "/", **options) -> None:
        """Open it; ``options`` are those of a browser context."""
        options.setdefault("viewport", {"width": 1200, "height": 900})
        self.context = browser.new_context(base_url=base, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.faults: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._see)
        self._base = base
        self.open(path)

    def _hear(self, message) -> None:
        # A refusal is an answer; the browser writes it down as an error.
        if message.type in ("error", "warning") and "status of 422" not in message.text:
            self.faults.append(message.text)

    def _see(self, request) -> None:
        if not request.url.startswith((self._base, "data:", "blob:")):
            self.faults.append(f"asks elsewhere: {request.url}")

    def open(self, path: str = "/") -> None:
        """Go there, and wait until the form knows the model."""
        self.page.goto(path)
        self.until("document.querySelector('#steps')?.placeholder")

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

    def get(self, path: str):
        """What the server answers."""
        return self.context.request.get(path).json()

    def picture(self, picture: dict) -> bytes:
        """A picture's file."""
        return self.context.request.get(picture["url"]).body()

    def drop(self, data: bytes, name: str = "picture.png", kind: str = "image/png") -> None:
        """Let a file fall onto the page, as a file manager does."""
        self.page.evaluate(
            """([bytes, name, type]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
                for (const kind of ["dragenter", "dragover", "drop"])
                    document.body.dispatchEvent(new DragEvent(kind,
                        {dataTransfer: transfer, bubbles: true, cancelable: true}));
            }""",
            [list(data), name, kind],
        )

    def told(self) -> str:
        """What is said below the picture."""
        return self.page.inner_text("#telling")


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
def nothing_left(server):
    """What one test leaves in the queue is not in the next one's way."""
    yield
    with server.client() as client:
        for job in client.get("/api/v1/jobs").json()["jobs"]:
            if job["state"] in ("queued", "running", "offered"):
                client.post(f"/api/v1/jobs/{job['id']}/cancel")
