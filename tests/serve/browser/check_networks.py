"""LoRAs, ControlNets and models of the folders: their rows, what is sent, and what comes of it."""

import shutil

import numpy as np
import pytest
from conftest import pixels, png

pytestmark = pytest.mark.filterwarnings("ignore")  # of Playwright's own
NOISY = "below/noisy"


@pytest.fixture
def sheet(open_sheet, stocked):
    return open_sheet(stocked.base)


def test_loras_with_their_weights(sheet, open_sheet, stocked):
    page = sheet.page
    plain = sheet.drawn("a red maple leaf", seed=7)
    for name in ("blueprint", "sketch"):
        page.select_option("#lora-add", name)
    assert page.locator("#loras li").count() == 2
    page.select_option("#lora-add", "sketch")  # once is enough
    assert page.locator("#loras li").count() == 2
    page.get_by_label("Weight of blueprint").fill("0.8")
    page.get_by_label("Weight of sketch").fill("-0.25")
    wanted = [{"name": "blueprint", "weight": 0.8}, {"name": "sketch", "weight": -0.25}]
    job = sheet.drawn("a red maple leaf", seed=7)
    assert sheet.jobs[-1]["loras"] == wanted == job["draw"]["loras"]
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (plain, job))
    assert np.abs(before - after).mean() > 1

    # The picture says so, in the page and in its file, and gives them back.
    page.locator("#gallery button").first.click()
    assert "blueprint:0.8" in page.inner_text("#viewer-settings")
    page.click("#viewer-close")
    page.get_by_label("Remove blueprint").click()
    page.get_by_label("Remove sketch").click()
    assert page.locator("#loras li").count() == 0
    sheet.drop(sheet.picture(job["pictures"][0]))
    page.wait_for_selector("#loras li:nth-child(2)")
    assert page.get_by_label("Weight of sketch").input_value() == "-0.25"
    again = sheet.press_draw()
    assert np.array_equal(pixels(sheet.picture(again["pictures"][0])), after)

    # So does a preset, in another tab.
    page.click("#preset-save")
    page.fill("#asker-text", "blue lines")
    page.keyboard.press("Enter")
    sheet.until("document.querySelector('#preset').value === 'blue lines'")
    other = open_sheet(stocked.base)
    other.unfold()
    other.page.select_option("#preset", "blue lines")
    assert other.page.get_by_label("Weight of blueprint").input_value() == "0.8"

    # A grid over the weight of the first.
    page.select_option("#x-axis", "lora")
    page.fill("#x-values", "0, 1")
    draws = sheet.asked_for(2, "#grid-draw")
    weights = [[lora["weight"] for lora in draw["loras"]] for draw in draws]
    assert weights == [[0, -0.25], [1, -0.25]]


def test_several_controlnets_each_with_its_picture(sheet, tmp_path):
    page = sheet.page
    path = tmp_path / "edges.png"
    path.write_bytes(png(64, 64))
    sheet.set(model=NOISY, width=64, height=64, steps=2, seed=3)
    plain = sheet.drawn("a leaf")
    page.select_option("#control-add", "steer")
    page.click("#draw")
    assert "steer needs a picture" in page.inner_text("#problem")
    assert page.evaluate("document.activeElement.id") == "control-file-0"
    page.set_input_files("#control-file-0", path)
    page.wait_for_selector("#controls li:first-child img")
    first = page.locator("#controls li").first
    first.get_by_label("Weight of steer").fill("0.75")
    first.get_by_label("From of steer").fill("0.1")
    first.get_by_label("Until of steer").fill("0.9")
    first.get_by_label("Made of the picture first of steer").select_option("canny")
    page.select_option("#control-add", "steer")
    other = png(64, 48)
    sheet.drop(other, onto="#controls li:nth-child(2)")
    page.wait_for_selector("#controls li:nth-child(2) img")
    assert not page.is_visible("#start-strip")  # it fell on the row, not on the page
    page.locator("#controls li").nth(1).get_by_label(
        "Made of the picture first of steer"
    ).select_option("invert")
    sheet.check_access("rows of ControlNets")

    job = sheet.press_draw()
    assert job["state"] == "done", job["error"]
    sent = sheet.jobs[-1]["controls"]
    assert [one.pop("image") for one in sent] == [path.read_bytes(), other]
    wanted = [
        {"name": "steer", "weight": 0.75, "start": 0.1, "end": 0.9, "preprocess": "canny"},
        {"name": "steer", "weight": 1, "start": 0, "end": 1, "preprocess": "invert"},
    ]
    assert sent == wanted
    before, after = (pixels(sheet.picture(j["pictures"][0])) for j in (plain, job))
    assert not np.array_equal(before, after)
    page.locator("#gallery button").first.click()
    assert page.inner_text("#viewer-settings").count("steer") == 2

    # Varied, it is steered by the same pictures; its settings bring the rows back.
    for draw in sheet.asked_for(4, "#vary"):
        assert [one["image"] for one in draw["controls"]] == [
            f"input:{job['id']}-control-{i}" for i in range(2)
        ]
    for _ in range(2):
        page.locator("#controls li").first.get_by_label("Remove steer").click()
    assert "controls" not in sheet.drawn("a leaf")["draw"]
    page.locator(f"[data-picture='{job['pictures'][0]['id']}']").click()
    page.click("#use")
    page.wait_for_selector("#controls li:nth-child(2) img")
    again = sheet.press_draw()
    assert np.array_equal(pixels(sheet.picture(again["pictures"][0])), after)

    for _ in range(4):  # as many as the server takes
        if page.is_enabled("#control-add"):
            page.select_option("#control-add", "steer")
    assert page.locator("#controls li").count() == 3
    assert page.is_disabled("#control-add")


def test_a_drawing_that_fails_says_why_and_the_next_one_is_drawn(sheet):
    page = sheet.page
    sheet.set(steps=2)
    page.select_option("#control-add", "steer")  # made for another model
    page.set_input_files("#control-file-0", {"name": "a.png", "mimeType": "image/png",
                                             "buffer": png(64, 64)})  # fmt: skip
    page.wait_for_selector("#controls li img")
    page.fill("#prompt", "a leaf")
    job = sheet.press_draw()
    assert job["state"] == "failed"
    sheet.until("/It failed/.test(document.querySelector('#telling').textContent)")
    assert job["error"]["message"] in sheet.told()
    assert page.locator("#telling.problem").count() == 1
    assert "failed" in page.inner_text("#live").lower()
    assert not page.is_visible("#progress") and not page.is_visible("#cancel")
    sheet.check_access("after a failure")
    page.get_by_label("Remove steer").click()
    assert sheet.drawn()["state"] == "done"
    assert page.locator("#telling.problem").count() == 0


def test_models_and_networks_that_came_since(sheet, stocked):
    page = sheet.page
    sheet.set(model=NOISY)
    sheet.until("document.querySelector('#guidance_scale').placeholder === '7.5'")
    made = stocked.models / "Stable-diffusion" / "late.safetensors"
    shutil.copy(stocked.models / "Stable-diffusion/below/noisy.safetensors", made)
    assert "/" not in page.inner_text("#model-note")  # none of the server's folders
    options = page.locator("#model option").all_inner_texts()
    assert options[:2] == ["demo", NOISY] and "late" not in options
    page.click("#models-again")
    page.wait_for_selector("#model option[value='late']", state="attached")
    made.unlink()
    assert page.input_value("#model") == NOISY  # what was chosen stays
    job = sheet.drawn("a leaf", width=64, height=64, steps=1, vae="other", sampler="euler")
    settings = job["pictures"][0]["settings"]
    assert (settings["model"], settings["vae"], settings["sampler"]) == ("noisy", "other", "euler")
    page.click("#reset")
    assert page.input_value("#vae") == ""
    page.locator("#gallery button").first.click()
    page.click("#use")
    sheet.until(f"document.querySelector('#model').value === '{NOISY}'")
    assert page.input_value("#vae") == "other"


def test_a_picture_as_a_prompt(sheet):
    """No IP-Adapter is small enough to lie here: what is sent is looked at."""
    page = sheet.page
    known = sheet.get("/api/v1/networks")
    page.route(
        "**/api/v1/networks",
        lambda route: route.fulfill(json={**known, "ip_adapters": [{"name": "plus"}]}),
    )
    sheet.refusals.add(404)
    sheet.open()
    sheet.unfold()
    assert page.is_visible("#ip-add") and not page.is_visible("#ip-none")
    page.select_option("#ip-add", "plus")
    seen = png(64, 64)
    sheet.drop(seen, onto="#image_prompts li")
    page.wait_for_selector("#image_prompts li img")
    page.get_by_label("Strength of plus").fill("0.6")
    page.get_by_label("Until of plus").fill("0.5")
    assert page.locator("#image_prompts select").count() == 0  # nothing is made of its picture
    [draw] = sheet.asked_for(1, "#draw")
    assert draw["image_prompts"] == [
        {"name": "plus", "image": seen, "scale": 0.6, "start": 0, "end": 0.5}
    ]
    sheet.until("/plus/.test(document.querySelector('#problem').textContent)")
