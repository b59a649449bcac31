"""The page as a person uses it, in a real browser, against the embedded model.

Run by `make browser`.
"""

import base64
import io
import json
import zipfile

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from live import Server
from PIL import Image, PngImagePlugin

pytestmark = pytest.mark.filterwarnings("ignore")  # of Playwright's own
SERIOUS = ("serious", "critical")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def sent(request) -> dict:
    """What a request asked to draw, with its pictures decoded."""
    draw = json.loads(request.post_data)
    for name in ("image", "mask"):
        if str(draw.get(name, "")).startswith("data:"):
            draw[name] = base64.b64decode(draw[name].partition(",")[2])
    return draw


# Drawing -----------------------------------------------------------------------------------------


def test_the_first_look_is_a_prompt_a_button_and_a_picture(sheet):
    page = sheet.page
    for shown in ("#prompt", "#draw", "#easel"):
        assert page.is_visible(shown), shown
    for folded in ("#negative_prompt", "#model", "#steps", "#seed", "#cancel", "#queue-box"):
        assert not page.is_visible(folded), folded
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_the_picture_forms_as_it_is_drawn(sheet):
    page = sheet.page
    page.evaluate(
        """() => {
            window.seen = []; window.lines = [];
            new MutationObserver(() => { const s = document.querySelector('#shown');
                if (s.dataset.step) window.seen.push([s.dataset.step, s.src]); })
                .observe(document.querySelector('#shown'), {attributes: true});
            const telling = document.querySelector('#telling');
            new MutationObserver(() => window.lines.push(telling.textContent))
                .observe(telling, {childList: true});
        }"""
    )
    job = sheet.drawn(steps=10)
    previews = {src for _, src in page.evaluate("window.seen")}
    assert len(previews) >= 3
    assert all(src.startswith("data:image/jpeg") for src in previews)
    lines = page.evaluate("window.lines")
    assert any("of 10" in line and "s/step" in line and "left" in line for line in lines), lines
    assert page.get_attribute("#shown", "src") == job["pictures"][0]["url"]
    assert page.evaluate("document.querySelector('#shown').naturalWidth") == 128
    assert sheet.told().startswith("Done in")


def test_escape_cancels_and_the_next_one_draws(sheet):
    page = sheet.page
    [job] = sheet.draw(steps=200)
    sheet.until("/Step [2-9]/.test(document.querySelector('#telling').textContent)")
    page.keyboard.press("Escape")
    assert sheet.ended(job["id"])["state"] == "cancelled"
    sheet.until("document.querySelector('#telling').textContent === 'Cancelled.'")
    assert sheet.drawn()["state"] == "done"


def test_a_batch_and_its_gallery(sheet):
    job = sheet.drawn(count=3)
    tiles = sheet.page.locator("#batch button")
    assert tiles.count() == 3
    assert len({picture["seed_text"] for picture in job["pictures"]}) == 3
    tiles.nth(2).click()
    assert sheet.page.get_attribute("#shown", "src") == job["pictures"][2]["url"]


def test_requests_queue_and_are_cancelled_together(sheet):
    page = sheet.page
    jobs = [sheet.draw(f"leaf {i}", steps=200)[0] for i in range(3)]
    sheet.until("document.querySelectorAll('#queue li').length === 2")
    assert "leaf 1" in page.inner_text("#queue li:nth-child(1)")
    page.click("#cancel-all")
    assert {sheet.ended(job["id"])["state"] for job in jobs} == {"cancelled"}
    page.wait_for_selector("#queue-box", state="hidden")


def test_a_kept_seed_draws_the_same_picture_and_a_loose_one_another(sheet):
    first, second = sheet.drawn(seed=7), sheet.drawn(seed=7)
    one, two = (sheet.picture(job["pictures"][0]) for job in (first, second))
    assert np.array_equal(pixels(one), pixels(two))
    sheet.page.click("#seed-lock")
    third = sheet.drawn()
    assert third["pictures"][0]["seed_text"] != "7"
    assert third["pictures"][0]["seed_text"] == sheet.page.input_value("#seed")
    sheet.page.click("#seed-dice")
    assert sheet.page.input_value("#seed") != third["pictures"][0]["seed_text"]


def test_what_cannot_be_drawn_is_said_at_its_field(sheet):
    page = sheet.page
    sheet.set(width=100)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    page.click("#draw")
    assert "Width" in page.inner_text("#problem")
    assert page.evaluate("document.activeElement.id") == "width"


def test_text_stays_text(sheet):
    evil = '<img src=x onerror="document.title=1"> </textarea><script>document.title=2</script>'
    sheet.drawn(evil)
    page = sheet.page
    page.locator("#gallery button").first.click()
    assert evil in page.inner_text("#viewer-settings")
    assert page.title() == "Maple"
    assert page.locator("#viewer-settings img").count() == 0


def test_the_memory_verdict_comes_before_the_drawing(sheet):
    page = sheet.page
    sheet.unfold()
    sheet.until("/Fits: .*MB/.test(document.querySelector('#plan').textContent)")
    small = page.inner_text("#plan")
    sheet.set(width=2048, height=2048)
    page.press("#height", "Tab")
    sheet.until("t => document.querySelector('#plan').textContent !== t", small)
    assert "GB" in page.inner_text("#plan")


# Pictures ----------------------------------------------------------------------------------------


def test_a_pictures_settings_can_be_used_again(sheet):
    job = sheet.drawn("a blue house", steps=3, guidance_scale=2.5, seed=11, sampler="euler")
    page = sheet.page
    page.click("#reset")
    page.fill("#prompt", "")
    page.locator("#gallery button").first.click()
    shown = page.inner_text("#viewer-settings")
    assert "a blue house" in shown and "euler" in shown and "11" in shown
    page.click("#use")
    assert page.input_value("#prompt") == "a blue house"
    values = [
        page.input_value(f"#{name}") for name in ("steps", "guidance_scale", "seed", "sampler")
    ]
    assert values == ["3", "2.5", "11", "euler"]
    with page.expect_response("**/api/v1/jobs") as told:
        page.click("#draw")
    again = sheet.ended(told.value.json()["id"])
    one, two = (sheet.picture(done["pictures"][0]) for done in (job, again))
    assert np.array_equal(pixels(one), pixels(two))


def test_varied_pictures_keep_the_seed(sheet):
    job = sheet.drawn(seed=5)
    page = sheet.page
    page.locator("#gallery button").first.click()
    requests = []
    page.on("request", lambda r: requests.append(r) if r.method == "POST" else None)
    page.click("#vary")
    sheet.until("document.querySelector('#problem').textContent === ''")
    page.wait_for_timeout(1500)
    draws = [sent(r) for r in requests if r.url.endswith("/jobs")]
    assert len(draws) == 4
    assert {str(d["seed"]) for d in draws} == {"5"}
    assert len({d["variation_seed"] for d in draws}) == 4
    newest = sheet.get("/api/v1/jobs")["jobs"][0]
    done = sheet.ended(newest["id"])
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (job, done))
    assert not np.array_equal(before, after)


def test_inpainting_changes_what_was_painted_and_nothing_else(sheet):
    page = sheet.page
    job = sheet.drawn("a red maple leaf on a yellow background", steps=6, seed=7)
    page.locator("#gallery button").first.click()
    page.click("#to-mask")
    canvas = page.locator("#mask-canvas")
    box = canvas.bounding_box()
    page.locator("#mask-size").fill("40")
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.15)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.15, steps=8)
    page.mouse.up()
    page.click("#mask-use")
    assert "again" in page.inner_text("#start-name")
    again = sheet.drawn("a blue house on a dark blue background", steps=8, strength=1, mask_blur=0)
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (job, again))
    change = np.abs(before - after).mean(axis=2)
    assert change[10:28, 32:96].mean() > 20  # painted
    assert change[80:].mean() < 6  # not painted
    page.click("#start-clear")
    assert not page.is_visible("#start-strip")


def test_the_mask_that_is_sent_is_the_one_that_was_painted(sheet):
    page = sheet.page
    sheet.drop(_png(64, 64))
    page.wait_for_selector("#start-strip")
    page.click("#start-mask")
    box = page.locator("#mask-canvas").bounding_box()

    def stroke(y: float) -> None:
        page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * y, steps=5)
        page.mouse.up()

    def mask() -> np.ndarray:
        page.click("#mask-use")
        with page.expect_request("**/api/v1/jobs") as asked:
            page.click("#draw")
        draw = sent(asked.value)
        page.keyboard.press("Escape")
        page.click("#start-mask")
        return np.asarray(Image.open(io.BytesIO(draw["mask"])).convert("L"))

    sheet.set(steps=2)
    stroke(0.25)
    stroke(0.75)
    both = mask()
    assert both.shape == (64, 64)
    assert both[16, 32] == both[48, 32] == 255 and both[32, 32] == 0
    page.click("#mask-undo")
    one = mask()
    assert one[16, 32] == 255 and one[48, 32] == 0
    page.click("#mask-redo")
    page.click("#mask-erase")
    stroke(0.25)
    erased = mask()
    assert erased[16, 32] == 0 and erased[48, 32] == 255
    page.click("#mask-invert")
    inverted = mask()
    assert inverted[16, 32] == 255 and inverted[48, 32] == 0 and inverted[32, 32] == 255
    page.click("#mask-clear")
    page.click("#mask-paint")
    page.locator("#mask-canvas").focus()
    page.keyboard.press("Space")  # with the keys alone: a dot in the middle
    dot = mask()
    assert dot[32, 32] == 255 and dot[5, 5] == 0


def test_a_picture_dragged_in_restores_its_settings(sheet):
    job = sheet.drawn("a green frog", steps=3, seed=21)
    data = sheet.picture(job["pictures"][0])
    page = sheet.page
    page.click("#reset")
    page.fill("#prompt", "")
    sheet.drop(data)
    sheet.until("document.querySelector('#prompt').value === 'a green frog'")
    assert (page.input_value("#steps"), page.input_value("#seed")) == ("3", "21")
    with page.expect_response("**/api/v1/jobs") as told:
        page.click("#draw")
    again = sheet.ended(told.value.json()["id"])
    assert np.array_equal(pixels(data), pixels(sheet.picture(again["pictures"][0])))


def test_a1111s_picture_too(sheet):
    text = (
        "a castle (big:1.2)\nNegative prompt: fog\nSteps: 12, Sampler: DPM++ 2M, Schedule type: "
        "Karras, CFG scale: 6.5, Seed: 4294967295, Size: 128x192, Model: elsewhere"
    )
    sheet.drop(_png(16, 16, parameters=text))
    page = sheet.page
    sheet.until("document.querySelector('#prompt').value.startsWith('a castle')")
    sheet.unfold()
    names = ("negative_prompt", "steps", "sampler", "schedule", "guidance_scale", "seed", "height")
    assert [page.input_value(f"#{name}") for name in names] == [
        "fog", "12", "dpmpp_2m", "karras", "6.5", "4294967295", "192",
    ]  # fmt: skip
    page.wait_for_timeout(500)  # the model's own values have come since, and change nothing
    assert page.input_value("#schedule") == "karras"
    assert "elsewhere" in page.inner_text("#toasts")


def test_a_picture_without_settings_is_where_to_start(sheet):
    sheet.drop(_png(64, 64))
    sheet.page.wait_for_selector("#start-strip")
    job = sheet.drawn("a leaf", strength=0.5)
    assert job["draw"]["image"] is True and job["pictures"][0]["width"] == 64


def test_download_one_or_all(sheet):
    sheet.drawn(count=2)
    page = sheet.page
    with page.expect_download() as got:
        page.click("#zip")
    names = zipfile.ZipFile(got.value.path()).namelist()
    count = len(sheet.get("/api/v1/pictures?limit=200")["pictures"])
    assert len(names) == count
    page.click("#select")
    page.locator("#gallery button").nth(1).click()
    with page.expect_download() as got:
        page.click("#zip")
    assert len(zipfile.ZipFile(got.value.path()).namelist()) == 1
    page.click("#select")
    page.locator("#gallery button").first.click()
    with page.expect_download() as got:
        page.click("#viewer-download")
    assert "parameters" in Image.open(got.value.path()).text


def test_deleted_pictures_are_gone(sheet):
    job = sheet.drawn("to be deleted")
    page = sheet.page
    page.locator("#gallery button").first.click()
    page.click("#viewer-delete")
    assert sheet.context.request.get(job["pictures"][0]["url"]).ok  # it asks first
    page.click("#viewer-delete")
    picture = job["pictures"][0]
    page.wait_for_selector(f"[data-picture='{picture['id']}']", state="detached")
    assert sheet.context.request.get(picture["url"]).status == 404


def test_search_in_the_history(sheet):
    sheet.drawn("a purple octopus")
    page = sheet.page
    page.fill("#search", "octopus")
    sheet.until(
        "[...document.querySelectorAll('#gallery button')].every(b => b.title.includes('octopus'))"
    )
    assert page.locator("#gallery button").count() >= 1
    page.fill("#search", "no such words")
    page.wait_for_selector("#history-empty")


# Many drawings -----------------------------------------------------------------------------------


def test_a_grid_of_two_settings(sheet):
    page = sheet.page
    sheet.set(seed=3)
    page.select_option("#x-axis", "steps")
    page.fill("#x-values", "1-2")
    page.select_option("#y-axis", "guidance_scale")
    page.fill("#y-values", "1, 3")
    page.fill("#prompt", "a red maple leaf")
    page.click("#grid-draw")
    sheet.until("document.querySelectorAll('#sheet td img').length === 4")
    heads = page.locator("#sheet th").all_inner_texts()
    assert heads == ["1", "2", "1", "3"]
    settings = [
        [p["settings"][name] for name in ("steps", "guidance_scale", "seed")]
        for p in sheet.get("/api/v1/pictures?limit=4")["pictures"]
    ]
    assert settings[::-1] == [[1, 1, 3], [2, 1, 3], [1, 3, 3], [2, 3, 3]]
    with page.expect_download() as got:
        page.click("#sheet-save")
    whole = Image.open(got.value.path())
    assert whole.size == (140 + 2 * 128, 36 + 2 * 128)
    assert np.asarray(whole.convert("RGB"))[60:, 160:].std() > 10
    page.fill("#x-values", "many")
    page.click("#grid-draw")
    assert "many" in page.inner_text("#problem")


def test_choices_and_word_lists_in_prompts(sheet):
    page = sheet.page
    sheet.set(steps=1, **{"list-name": "animal", "list-lines": "cat\n# not this\ndog"})
    page.click("#list-keep")
    page.check("#all-combinations")
    requests = []
    page.on("request", lambda r: requests.append(r) if r.url.endswith("/jobs") else None)
    sheet.draw("a {red|blue} __animal__")
    for _ in range(100):
        if len([r for r in requests if r.method == "POST"]) >= 4:
            break
        page.wait_for_timeout(100)
    prompts = [sent(r)["prompt"] for r in requests if r.method == "POST"]
    assert prompts == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    sheet.open()  # the list is still there
    sheet.unfold()
    assert "__animal__ (2)" in page.inner_text("#lists")
    page.uncheck("#all-combinations")
    page.fill("#prompt", "a __plant__")
    page.click("#draw")
    assert 'no list "plant"' in page.inner_text("#problem")


def test_presets_are_kept_by_the_server(sheet, open_sheet, server):
    page = sheet.page
    sheet.set(steps=9, guidance_scale=4.5, negative_prompt="fog")
    page.click("#preset-save")
    page.fill("#asker-text", "quick / soft")
    page.keyboard.press("Enter")
    sheet.until("document.querySelector('#preset').value === 'quick / soft'")
    other = open_sheet(server.base)
    other.unfold()
    other.page.fill("#prompt", "a boat")
    other.page.select_option("#preset", "quick / soft")
    values = [
        other.page.input_value(f"#{n}") for n in ("steps", "guidance_scale", "negative_prompt")
    ]
    assert values == ["9", "4.5", "fog"]
    assert other.page.input_value("#prompt") == "a boat"
    other.page.click("#preset-delete")
    other.until("document.querySelectorAll('#preset option').length === 1")


# The server goes and comes -----------------------------------------------------------------------


def test_history_outlives_the_page_and_the_server(open_sheet, tmp_path):
    with Server(tmp_path / "data", model=None) as first:
        sheet = open_sheet(first.base)
        picture = sheet.drawn("a snowman")["pictures"][0]
        data = sheet.picture(picture)
        sheet.open()
        sheet.page.wait_for_selector(f"[data-picture='{picture['id']}']")
        assert sheet.page.get_attribute("#shown", "src") == picture["url"]
        [waiting] = sheet.draw("a ship", steps=200)
        sheet.until("/Step/.test(document.querySelector('#telling').textContent)")
        first.kill()
        sheet.until("/No connection/.test(document.querySelector('#state').textContent)")
        sheet.context.close()
        sheet.faults.clear()  # the browser says that nothing answered
    with Server(tmp_path / "data", model=None) as second:
        sheet = open_sheet(second.base)
        sheet.page.wait_for_selector(f"[data-picture='{picture['id']}']")
        assert sheet.picture(picture) == data
        assert "a ship" in sheet.page.inner_text("#queue")
        sheet.page.click("#queue button:has-text('Forget it')")
        assert sheet.ended(waiting["id"])["state"] == "cancelled"
        sheet.context.close()


def test_with_a_token(open_sheet, browser, tmp_path):
    with Server(tmp_path / "data", "--token", "a token of tests", model=None) as guarded:
        stranger = browser.new_context()
        assert stranger.request.get(guarded.base).status == 401
        stranger.close()
        sheet = open_sheet(guarded.base, "/?token=a%20token%20of%20tests")
        assert "token" not in sheet.page.url
        assert sheet.page.is_visible("#draw")
        sheet.context.clear_cookies()
        sheet.page.fill("#search", "anything")
        sheet.page.wait_for_selector("#asker")
        sheet.page.fill("#asker-text", "a token of tests")
        sheet.page.keyboard.press("Enter")
        sheet.until("document.querySelector('#steps')?.placeholder")
        sheet.context.close()
        sheet.faults.clear()  # the browser tells of the 401


# Everybody ---------------------------------------------------------------------------------------


def test_with_the_keyboard_alone(sheet):
    page = sheet.page
    page.keyboard.type("a red maple leaf")
    with page.expect_response("**/api/v1/jobs") as told:
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
    with page.expect_response("**/api/v1/jobs") as told:
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


@pytest.mark.parametrize("width", [320, 412])
def test_on_a_narrow_screen(open_sheet, server, width):
    sheet = open_sheet(
        server.base, viewport={"width": width, "height": 740}, has_touch=True, is_mobile=True
    )
    page = sheet.page

    def overflow() -> int:
        return page.evaluate("document.documentElement.scrollWidth - innerWidth")

    assert overflow() <= 0
    sheet.unfold()
    assert overflow() <= 0
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    sheet.page.fill("#prompt", "a leaf")
    page.tap("#draw")
    page.wait_for_selector("#cancel")
    page.tap("#cancel")
    sheet.drawn()
    page.locator("#gallery button").first.tap()
    assert overflow() <= 0
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

    def check(where: str) -> None:
        results = Axe().run(page).response
        bad = [
            (fault["id"], fault["impact"], [node["target"] for node in fault["nodes"]][:4])
            for fault in results["violations"]
            if fault["impact"] in SERIOUS
        ]
        assert not bad, (where, bad)
        assert len(results["passes"]) > 10

    check("settings open")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    check("first look")
    page.locator("#gallery button").first.click()
    check("viewer")
    page.click("#to-mask")
    page.wait_for_selector("#masker[open]")
    check("mask")
    page.click("#mask-cancel")
    page.wait_for_timeout(6500)  # notes are gone
    [job] = sheet.draw(steps=200)
    sheet.until("/Step/.test(document.querySelector('#telling').textContent)")
    check("while it draws")
    page.keyboard.press("Escape")
    sheet.ended(job["id"])


def test_axe_would_find_something(sheet):
    """The control: a button without a name is found."""
    sheet.page.evaluate("document.querySelector('#draw').textContent = ''")
    results = Axe().run(sheet.page).response
    assert [f for f in results["violations"] if f["impact"] in SERIOUS]


def test_light_and_dark_can_be_chosen(open_sheet, server):
    sheet = open_sheet(server.base, color_scheme="dark")
    page = sheet.page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert dark != light
    sheet.open()
    assert page.evaluate(ground) == light


def _png(width: int, height: int, **texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    shades = np.linspace(0, 255, width * height * 3).reshape(height, width, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(shades).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
