"""The page for everybody: keys, screen readers, narrow screens, light and dark, no motion."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from live import Server

pytestmark = pytest.mark.filterwarnings("ignore")  # of Playwright's own


def _of_a_new_job(response) -> bool:
    """Not of the list of jobs, which the page asks for by the same address."""
    return response.url.endswith("/api/v1/jobs") and response.request.method == "POST"


def test_with_the_keyboard_alone(sheet):
    page = sheet.page
    page.keyboard.type("a red maple leaf")
    with page.expect_response(_of_a_new_job) as told:
        page.keyboard.press("Control+Enter")
    sheet.until("/Step/.test(document.querySelector('#telling').textContent)")
    page.keyboard.press("Escape")
    assert sheet.ended(told.value.json()["id"])["state"] == "cancelled"

    def tab_to(what: str) -> None:
        for _ in range(60):
            if page.evaluate(f"document.activeElement.matches({what!r})"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not come to {what}")

    tab_to("#settings > summary")
    page.keyboard.press("Enter")
    tab_to("#count")
    page.keyboard.type("2")
    tab_to("#steps")
    page.keyboard.type("2")
    with page.expect_response(_of_a_new_job) as told:
        page.keyboard.press("Control+Enter")
    job = sheet.ended(told.value.json()["id"])
    assert job["state"] == "done"
    tab_to(f"[data-picture='{job['pictures'][1]['id']}']")
    page.keyboard.press("Enter")
    assert page.is_visible("#viewer")
    first = page.get_attribute("#viewer-image", "src")
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#viewer-image", "src") != first
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    assert page.evaluate("document.activeElement.matches('[data-picture]')")


@pytest.mark.parametrize("width", [320, 375])
def test_on_a_narrow_screen(open_sheet, server, width):
    sheet = open_sheet(
        server.base, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True
    )
    page = sheet.page
    assert sheet.overflow() <= 0
    sheet.unfold()
    assert sheet.overflow() <= 0
    small = page.evaluate(
        """[...document.querySelectorAll("button, select, input:not([type=range])")]
            .filter((e) => e.checkVisibility() && e.type !== "checkbox")
            .filter((e) => e.getBoundingClientRect().height < 44)
            .map((e) => e.id || e.textContent)"""
    )
    assert not small  # a finger's width
    sheet.fold()
    sheet.page.fill("#prompt", "a leaf")
    page.tap("#draw")
    page.wait_for_selector("#cancel")
    assert page.evaluate(  # what is drawn comes into sight
        "document.querySelector('#easel').getBoundingClientRect().top < innerHeight * 0.6"
    )
    page.tap("#cancel")
    sheet.drawn()
    page.locator("#gallery button").first.tap()
    assert sheet.overflow() <= 0
    box = page.locator("#viewer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.tap("#to-mask")
    box = page.locator("#mask-canvas").bounding_box()
    assert box["width"] > 100 and box["x"] + box["width"] <= width
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.is_enabled("#mask-undo")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(open_sheet, server, colours):
    sheet = open_sheet(server.base, color_scheme=colours)
    page = sheet.page
    sheet.drawn(count=2)
    sheet.check_access("settings open")
    sheet.fold()
    sheet.check_access("first look")
    page.locator("#gallery button").first.click()
    sheet.check_access("viewer")
    page.click("#to-mask")
    page.wait_for_selector("#masker[open]")
    sheet.check_access("mask")
    page.click("#mask-cancel")
    sheet.unfold()
    page.click("#preset-save")
    sheet.check_access("a question")
    page.keyboard.press("Escape")
    page.click("#select")
    page.locator("#gallery button").first.click()
    sheet.check_access("gallery, some chosen")
    page.click("#select")
    page.click("#start-clear")
    page.select_option("#x-axis", "steps")
    page.fill("#x-values", "1, 2")
    page.click("#grid-draw")
    sheet.until("document.querySelectorAll('#sheet td img').length === 2")
    sheet.check_access("grid")
    page.wait_for_timeout(6500)  # notes are gone
    [job] = sheet.draw(steps=200)
    sheet.draw("another", steps=200)
    sheet.until("/Step/.test(document.querySelector('#telling').textContent)")
    page.wait_for_selector("#queue li")
    sheet.check_access("while it draws, another waits")
    page.click("#cancel-all")
    sheet.ended(job["id"])


def test_screen_readers_hear_how_it_goes(sheet):
    page = sheet.page
    page.evaluate(
        """() => { window.heard = [];
            const live = document.querySelector("#live");
            new MutationObserver(() => window.heard.push(live.textContent))
                .observe(live, {childList: true}); }"""
    )
    sheet.drawn(steps=12, seed=4)
    sheet.until("window.heard.some((words) => words.startsWith('Done'))")
    heard = page.evaluate("window.heard")
    assert heard[0] == "Queued" and heard[-1] == "Done: one picture, seed 4"
    steps = [words for words in heard if words.startswith("Step")]
    assert 2 <= len(steps) <= 5, heard  # by quarters, not at every step
    assert page.get_attribute("#live", "aria-live") == "polite"


def test_tab_goes_down_the_page(sheet):
    """From the prompt on, in the order in which things lie."""
    page = sheet.page
    page.click("#settings > summary")
    page.focus("#prompt")
    shown = []
    for _ in range(14):
        page.keyboard.press("Tab")
        shown.append(page.evaluate("document.activeElement.id || document.activeElement.localName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert shown[:4] == ["draw", "summary", "preset", "preset-save"]
    order = ["negative_prompt", "model", "width", "swap", "height", "count"]
    places = [shown.index(name) for name in order]
    assert places == sorted(places)


def test_nothing_moves_where_that_is_not_wanted(open_sheet, server):
    moving = """() => [...document.querySelectorAll("*")].filter((e) =>
        ["", "::before", "::after"].some((part) => {
            const style = getComputedStyle(e, part || null);
            return style.animationName !== "none"
                || style.transitionDuration.split(",").some((d) => parseFloat(d) > 0);
        })).length"""
    still = open_sheet(server.base, reduced_motion="reduce")
    assert still.page.evaluate(moving) == 0
    assert open_sheet(server.base).page.evaluate(moving) > 0  # the control


def test_who_has_drawn_nothing_yet_is_offered_a_beginning(open_sheet, tmp_path):
    with Server(tmp_path / "data", model=None) as fresh:
        sheet = open_sheet(fresh.base)
        page = sheet.page
        page.wait_for_selector("#ideas button")
        assert page.is_visible("#history-empty") and page.is_disabled("#zip")
        sheet.check_access("nothing drawn yet")
        page.locator("#ideas button").nth(1).click()
        assert page.input_value("#prompt") == "a rocket on a dark blue background"
        assert page.evaluate("document.activeElement.id") == "draw"
        sheet.context.close()


def test_a_picture_can_be_worked_on_where_it_was_drawn(sheet):
    page = sheet.page
    job = sheet.drawn()
    with page.expect_download() as got:
        page.click("#shown-download")
    assert got.value.suggested_filename == f"{job['pictures'][0]['id']}.png"
    page.click("#shown-actions button:has-text('Inpaint')")
    page.wait_for_selector("#masker[open]")
    page.click("#mask-cancel")
    assert page.is_visible("#start-strip")
    page.click("#shown-open")
    assert page.is_visible("#viewer")
    page.click("#viewer-close")


def test_axe_would_find_something(sheet):
    """The control: a button without a name is found."""
    sheet.page.evaluate("document.querySelector('#draw').textContent = ''")
    results = Axe().run(sheet.page).response
    assert [f for f in results["violations"] if f["impact"] in ("serious", "critical")]


def test_light_and_dark_can_be_chosen(open_sheet, server):
    sheet = open_sheet(server.base, color_scheme="dark")
    page = sheet.page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    assert page.get_by_role("button", name="Switch to the light appearance").count() == 1
    page.click("#theme")
    assert page.get_by_role("button", name="Switch to the dark appearance").count() == 1
    light = page.evaluate(ground)
    assert dark != light
    sheet.open()
    assert page.evaluate(ground) == light
