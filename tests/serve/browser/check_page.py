"""The page as a person uses it, in a real browser, against the embedded model.

Run by `make browser`.
"""

import io
import zipfile

import numpy as np
import pytest
from conftest import asked, pixels, png
from live import Server
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore")  # of Playwright's own
QUICK = {"steps": 4, "sampler": "lcm", "guidance_scale": 1, "seed": 7}  # what it draws fastest
NO_ROOM = {
    "fits": False,
    "peak": 9 << 30,
    "free": 4 << 30,
    "message": "takes about 9 GB of 4 GB",
    "advice": ["low memory: 3 GB"],
}


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
    rolled = sheet.page.input_value("#seed")
    assert rolled != third["pictures"][0]["seed_text"]
    assert sheet.drawn()["pictures"][0]["seed_text"] == rolled


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
    page.route("**/api/v1/plan", lambda route: route.fulfill(json=NO_ROOM))
    page.click("#shapes button:has-text('16:9')")
    assert [page.input_value(f"#{name}") for name in ("width", "height")] == ["168", "96"]
    assert page.get_attribute("#shapes button:has-text('16:9')", "aria-pressed") == "true"
    sheet.until("/Does not fit.*3 GB$/.test(document.querySelector('#plan').textContent)")
    assert page.get_attribute("#plan", "class").endswith("problem")
    assert not page.is_visible("#no-room")
    sheet.fold()
    assert "Does not fit" in page.inner_text("#no-room")  # beside the button, where it is folded
    sheet.unfold()
    page.click("#swap")
    assert [page.input_value(f"#{name}") for name in ("width", "height")] == ["96", "168"]


def test_every_setting_of_a_drawing_has_its_field(sheet):
    """Also one that this page has never heard of: it stands under Advanced, and is sent."""
    page = sheet.page

    def with_another(route):
        document = route.fetch().json()
        document["components"]["schemas"]["Draw"]["properties"]["from_the_future"] = {
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 0.75}, {"type": "null"}],
            "description": "what nobody knows yet",
        }
        route.fulfill(json=document)

    page.route("**/openapi.json", with_another)
    sheet.open()
    sheet.unfold()
    document = sheet.get("/openapi.json")
    known = document["components"]["schemas"]["Draw"]["properties"]
    beside = {"image", "mask", "loras", "controls", "image_prompts", "previews"}
    beside |= {"original_size", "crop", "target_size"}  # what SDXL is told, in numbers of two
    other_models = page.evaluate(  # SDXL's, and those of models that follow depth
        """async () => Object.entries((await import("/page/fields.js")).FIELDS)
            .filter(([, field]) => field.families).map(([name]) => name)"""
    )
    assert {"refiner", "refiner_start"} <= set(other_models)
    for name in known.keys() - beside:
        assert page.is_visible(f"#{name}") == (name not in other_models), name
        for limit in ("minimum", "maximum"):
            for part in known[name].get("anyOf", ()):
                if limit in part and name != "ensd":
                    assert float(page.get_attribute(f"#{name}", limit[:3])) == part[limit], name
    assert page.locator("#advanced #from_the_future").get_attribute("max") == "0.75"
    page.fill("#from_the_future", "0.5")
    page.select_option("#discard_penultimate", "true")
    page.locator("[data-of='steps']").fill("12")  # the slider
    assert page.input_value("#steps") == "12"
    assert page.get_attribute("#settings details:has(#advanced) summary", "data-count") == "2"
    page.fill("#prompt", "a leaf")
    [draw] = sheet.asked_for(1, "#draw")
    assert (draw["from_the_future"], draw["discard_penultimate"], draw["steps"]) == (0.5, True, 12)
    sheet.until("/from_the_future/.test(document.querySelector('#problem').textContent)")
    assert page.evaluate("document.activeElement.id") == "from_the_future"


def test_a_larger_second_drawing_and_what_else_is_advanced(sheet):
    job = sheet.drawn(
        steps=1, hires_scale=2, hires_steps=1, hires_upscaler="lanczos", tile="x",
        guidance_rescale=0.5, clip_skip=1, noise="nvidia", schedule="linspace",
    )  # fmt: skip
    [picture] = job["pictures"]
    assert (picture["width"], picture["height"]) == (256, 256)
    said = {"hires_upscaler": "lanczos", "tile": "x", "guidance_rescale": 0.5, "noise": "nvidia"}
    assert said.items() <= picture["settings"].items()
    page = sheet.page
    page.locator("#gallery button").first.click()
    shown = page.inner_text("#viewer-settings")
    assert "Seamless edges" in shown and "256 × 256" in shown and "lanczos" in shown

    # Going on from it is no third, still larger drawing.
    page.click("#to-start")
    sheet.until("document.querySelector('#start-strip').hidden === false")
    [draw] = sheet.asked_for(1, "#draw")
    assert (draw["width"], draw["height"], draw["tile"]) == (256, 256, "x")
    assert not any(name.startswith("hires") for name in draw)
    sheet.settled()
    assert page.inner_text("#problem") == ""


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
    sheet.until("document.querySelector('#prompt').value === 'a blue house'")
    values = [
        page.input_value(f"#{name}") for name in ("steps", "guidance_scale", "seed", "sampler")
    ]
    assert values == ["3", "2.5", "11", "euler"]
    with page.expect_response("**/api/v1/jobs") as told:
        page.click("#draw")
    again = sheet.ended(told.value.json()["id"])
    one, two = (sheet.picture(done["pictures"][0]) for done in (job, again))
    assert np.array_equal(pixels(one), pixels(two))


def test_the_words_of_a_picture_are_no_choices(sheet):
    """Whoever drew it over HTTP may have meant the braces."""
    prompt = "a {red|blue} leaf"
    draw = {"prompt": prompt, "steps": 1, "width": 64, "height": 64}
    job = sheet.context.request.post("/api/v1/jobs", data=draw).json()
    sheet.ended(job["id"])
    page = sheet.page
    page.locator("#gallery button").first.click()
    page.click("#use")
    sheet.until("/red/.test(document.querySelector('#prompt').value)")
    [again] = sheet.asked_for(1, "#draw")
    assert again["prompt"] == prompt


def test_varied_pictures_keep_the_seed(sheet):
    job = sheet.drawn(seed=5)
    page = sheet.page
    page.locator("#gallery button").first.click()
    draws = sheet.asked_for(4, "#vary")
    assert {str(d["seed"]) for d in draws} == {"5"}
    assert len({d["variation_seed"] for d in draws}) == 4
    sheet.until("document.querySelector('#problem').textContent === ''")
    newest = sheet.get("/api/v1/jobs")["jobs"][0]
    done = sheet.ended(newest["id"])
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (job, done))
    assert not np.array_equal(before, after)


def test_a_variation_seed_leads_away_from_the_seeds_picture_and_back(sheet):
    fields = {"seed": 7, "variation_seed": 11}
    plain, varied, again, strongest = (
        pixels(sheet.picture(sheet.drawn(**fields, variation_strength=share)["pictures"][0]))
        for share in (0, 0.5, 0.5, 1)
    )
    other = pixels(sheet.picture(sheet.drawn(seed=11, variation_strength=0)["pictures"][0]))
    assert np.array_equal(varied, again)
    assert not np.array_equal(plain, varied)
    assert np.array_equal(strongest, other)  # all the way is the other seed's


def test_inpainting_changes_what_was_painted_and_nothing_else(sheet):
    page = sheet.page
    job = sheet.drawn("a red maple leaf on a yellow background", **QUICK)
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
    again = sheet.drawn("a blue house on a dark blue background", **QUICK, strength=1, mask_blur=0)
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (job, again))
    change = np.abs(before - after).mean(axis=2)
    assert change[10:28, 32:96].mean() > 20  # painted
    assert change[80:].mean() < 6  # not painted
    page.click("#start-clear")
    assert not page.is_visible("#start-strip")

    # Varied, also by a page that was not there when it was painted: picture and mask stay.
    sheet.open()
    page.locator("#gallery button").first.click()
    for draw in sheet.asked_for(4, "#vary"):
        assert [draw[name] for name in ("image", "mask")] == [
            f"input:{again['id']}-{name}" for name in ("image", "mask")
        ]
        assert draw["prompt"] == "a blue house on a dark blue background"
    sheet.settled()
    newest = sheet.get("/api/v1/pictures?limit=4")["pictures"]
    shown = [pixels(sheet.picture(picture)) for picture in newest]
    for varied in shown:
        change = np.abs(before - varied).mean(axis=2)
        assert change[80:].mean() < 6
        assert np.abs(after - varied).mean(axis=2)[10:28, 32:96].mean() > 0.5
    assert not np.array_equal(shown[0], shown[1])

    # Its settings bring picture and mask back into the form, and draw the same again.
    page.locator(f"[data-picture='{again['pictures'][0]['id']}']").click()
    page.click("#use")
    sheet.until("/painted/.test(document.querySelector('#start-name').textContent)")
    same = sheet.press_draw()
    assert np.array_equal(pixels(sheet.picture(same["pictures"][0])), after)
    page.click("#start-mask")  # the mask is in the editor, to be changed
    page.click("#mask-invert")
    page.click("#mask-use")
    turned = sheet.press_draw()
    change = np.abs(pixels(sheet.picture(turned["pictures"][0])) - before).mean(axis=2)
    assert change[80:].mean() > 6


def test_a_picture_that_started_from_one_is_varied_from_it(sheet):
    page = sheet.page
    sheet.drop(png(64, 64))
    page.wait_for_selector("#start-strip")
    job = sheet.drawn("a leaf", strength=0.5, seed=3)
    for draw in sheet.asked_for(4, "#shown-actions button:has-text('Vary')"):
        assert draw["image"] == f"input:{job['id']}-image" and draw["strength"] == 0.5
        assert "mask" not in draw and draw["seed"] == "3"
    page.click("#start-clear")


def test_what_a_picture_started_from_goes_with_it(sheet):
    page = sheet.page
    sheet.drop(png(64, 64))
    page.wait_for_selector("#start-strip")
    job = sheet.drawn("a leaf", strength=0.5, count=1)
    kept = f"/api/v1/jobs/{job['id']}/inputs/image"
    assert sheet.context.request.get(kept).ok
    page.locator("#gallery button").first.click()
    page.click("#viewer-delete")
    page.click("#viewer-delete")
    page.wait_for_selector(f"[data-picture='{job['pictures'][0]['id']}']", state="detached")
    assert sheet.context.request.get(kept).status == 404


def test_the_mask_that_is_sent_is_the_one_that_was_painted(sheet):
    page = sheet.page
    sheet.drop(png(64, 64))
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
        with page.expect_request("**/api/v1/jobs") as told:
            page.click("#draw")
        draw = asked(told.value)
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
    sheet.drop(png(16, 16, parameters=text))
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
    sheet.drop(png(64, 64))
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
    sheet.until("document.querySelector('#shown-actions').hidden")  # it leaves the easel too


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


def test_a_grid_of_words_and_a_sampler(sheet):
    page = sheet.page
    sheet.set(seed=3, steps=2)
    page.select_option("#x-axis", "prompt")
    page.fill("#x-values", "red, blue")
    page.select_option("#y-axis", "sampler")
    page.fill("#y-values", "ddim, euler")
    page.fill("#prompt", "a red maple leaf")
    told = [(draw["prompt"], draw["sampler"]) for draw in sheet.asked_for(4, "#grid-draw")]
    assert told == [
        ("a red maple leaf", "ddim"), ("a blue maple leaf", "ddim"),
        ("a red maple leaf", "euler"), ("a blue maple leaf", "euler"),
    ]  # fmt: skip
    sheet.until("document.querySelectorAll('#sheet td img').length === 4")
    page.locator("#sheet td button").nth(3).click()
    assert "a blue maple leaf" in page.inner_text("#viewer-settings")
    assert "euler" in page.inner_text("#viewer-settings")


def test_choices_and_word_lists_in_prompts(sheet):
    page = sheet.page
    sheet.set(steps=1, **{"list-name": "animal", "list-lines": "cat\n# not this\ndog"})
    page.click("#list-keep")
    page.check("#all-combinations")
    page.fill("#prompt", "a {red|blue} __animal__")
    prompts = [draw["prompt"] for draw in sheet.asked_for(4, "#draw")]
    assert prompts == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    sheet.open()  # the list is still there
    sheet.unfold()
    assert "__animal__ (2)" in page.inner_text("#lists")
    page.uncheck("#all-combinations")
    # One of them, which a kept seed chooses again.
    chosen = [sheet.drawn("a {red|green|blue} __animal__", seed=s)["draw"] for s in (5, 5, 6, 7, 8)]
    words = [draw["prompt"] for draw in chosen]
    assert words[0] == words[1] and len(set(words)) > 1
    assert all(len(word.split()) == 3 and "{" not in word and "_" not in word for word in words)
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
    assert other.page.input_value("#seed") == ""  # only one that is kept is part of it
    assert other.page.input_value("#prompt") == "a boat"
    assert other.drawn("a boat")["draw"]["steps"] == 2  # what is typed over it holds
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
