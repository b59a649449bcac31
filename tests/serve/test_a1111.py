"""/sdapi/v1, as A1111's clients call it."""

import base64
import io
import json
import threading

import numpy as np
import pytest
from known import QUICK, wait_until
from PIL import Image

from mlx_maple.serve.api.a1111 import Img2Img, _mask_blur, _unit_image

ASKED = {k: v for k, v in QUICK.items()}


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PIXEL = encoded(Image.new("RGB", (64, 64)))


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def drawn(client, **values):
    answer = client.post("/sdapi/v1/txt2img", json={**ASKED, **values})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return [decoded(image) for image in body["images"]], json.loads(body["info"]), body


def test_text_to_image(client):
    pictures, info, body = drawn(client, sampler_name="Euler a", cfg_scale=3, batch_size=2)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2
    assert info["all_seeds"] == [7, 8] and info["sampler_name"] == "Euler a"
    assert info["infotexts"][0].startswith("a red maple leaf\nSteps: 2, Sampler: Euler a")
    assert pictures[0].info["parameters"] == info["infotexts"][0]
    assert body["parameters"]["cfg_scale"] == 3


def test_one_blur_counts_before_those_of_each_axis():
    for asked, blur in (({}, 4), ({"mask_blur": 9}, 9), ({"mask_blur_x": 2, "mask_blur_y": 2}, 2)):
        assert _mask_blur(Img2Img(**asked)) == blur
    # As clients send it that fill in all that A1111 documents.
    assert _mask_blur(Img2Img(mask_blur=0, mask_blur_x=4, mask_blur_y=4)) == 0


@pytest.mark.parametrize(
    ("sampler", "scheduler", "ours"),
    [
        ("DPM++ 2M", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M Karras", "automatic", ("dpmpp_2m", "karras")),
        ("k_euler_a", "Exponential", ("euler_a", "exponential")),
        ("DDIM", "Karras", ("ddim", "leading")),  # A1111's DDIM has its own times
    ],
)
def test_samplers_by_their_names(client, sampler, scheduler, ours):
    drawn(client, steps=3, sampler_name=sampler, scheduler=scheduler)
    settings = client.get("/api/v1/pictures?limit=1").json()["pictures"][0]["settings"]
    assert (settings["sampler"], settings["schedule"]) == ours
    assert settings["noise"] == "nvidia"


def test_a_schedule_counts_without_a_sampler_too(client):
    drawn(client, steps=3, scheduler="Trailing")
    settings = client.get("/api/v1/pictures?limit=1").json()["pictures"][0]["settings"]
    assert settings["schedule"] == "trailing"


def test_what_a_unit_looks_at():
    units = ({"image": "a"}, {"input_image": "a"}, {"image": {"image": "a", "mask": None}}, {})
    for unit in units:
        assert _unit_image(Img2Img(init_images=["a" if unit == {} else "b"]), unit) == "a"


def test_options_decide(client):
    assert client.post("/sdapi/v1/options", json={"randn_source": "CPU", "x": 1}).json() == {}
    assert client.get("/sdapi/v1/options").json()["randn_source"] == "CPU"
    drawn(client, override_settings={"eta_noise_seed_delta": 31337, "token_merging_ratio": 0.5})
    settings = client.get("/api/v1/pictures?limit=1").json()["pictures"][0]["settings"]
    assert settings["noise"] == "torch" and settings["ensd"] == 31337
    assert settings["token_merging"] == 0.5
    client.post("/sdapi/v1/options", json={"randn_source": "NV"})
    for wrong in (
        {"randn_source": "dice"},
        {"CLIP_stop_at_last_layers": "x"},
        {"token_merging_ratio": 1},
    ):
        assert client.post("/sdapi/v1/options", json=wrong).status_code == 422
    assert "secret" not in client.get("/sdapi/v1/options").json()


def test_image_to_image_and_an_inverted_mask(client):
    source = drawn(client)[0][0]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    after = {}
    for invert in (0, 1):
        values = {
            **ASKED,
            "prompt": "a frog",
            "init_images": [encoded(source)],
            "mask": "data:image/png;base64," + encoded(mask),
            "mask_blur": 0,
            "inpainting_mask_invert": invert,
        }
        answer = client.post("/sdapi/v1/img2img", json=values)
        assert answer.status_code == 200, answer.text
        after[invert] = decoded(answer.json()["images"][0])
        assert answer.json()["parameters"].get("init_images") is None
    inside, outside = (32, 32), (2, 2)
    assert after[0].getpixel(outside) == source.getpixel(outside)
    assert after[1].getpixel(inside) == source.getpixel(inside)
    assert after[0].getpixel(inside) != source.getpixel(inside)


def test_progress_and_interruption(client):
    answers = []

    def draw():
        answers.append(client.post("/sdapi/v1/txt2img", json={**ASKED, "steps": 200}))

    thread = threading.Thread(target=draw)
    thread.start()
    far = wait_until(
        lambda: (p := client.get("/sdapi/v1/progress").json())["state"]["sampling_step"] and p
    )
    assert 0 < far["progress"] < 1 and far["state"]["sampling_steps"] == 200
    # Asking is what makes previews come.
    wait_until(lambda: client.get("/sdapi/v1/progress").json()["current_image"])
    assert client.post("/sdapi/v1/interrupt").json() == {}
    thread.join()
    assert answers[0].status_code == 200
    assert decoded(answers[0].json()["images"][0]).size == (64, 64)  # what was seen so far
    wait_until(lambda: client.get("/sdapi/v1/progress").json()["progress"] == 0)


@pytest.mark.parametrize(
    ("path", "values", "status", "words"),
    [
        ("txt2img", {"sampler_name": "Foo"}, 404, "Sampler not found"),
        ("txt2img", {"scheduler": "Foo", "sampler_name": "Euler"}, 404, "Scheduler not found"),
        ("txt2img", {"restore_faces": True}, 422, "face restoration"),
        ("txt2img", {"script_name": "x/y/z plot"}, 422, "scripts"),
        ("txt2img", {"alwayson_scripts": {"reactor": {"args": [1]}}}, 422, "reactor"),
        (
            "txt2img",
            {
                "alwayson_scripts": {
                    "ControlNet": {"args": [{"model": "../x", "image": "aGVsbG8="}]}
                }
            },
            404,
            "no controlnet",
        ),
        (
            "txt2img",
            {"alwayson_scripts": {"controlnet": {"args": [{"module": "dw_openpose"}]}}},
            404,
            "dw_openpose",
        ),
        ("txt2img", {"scheduler": "sundial"}, 404, "Scheduler not found"),
        (
            "txt2img",
            {"alwayson_scripts": {"controlnet": {"args": [{"model": "x"}]}}},
            422,
            "needs an image",
        ),
        (
            "txt2img",
            {"alwayson_scripts": {"controlnet": {"args": [{"image": PIXEL, "mask": PIXEL}]}}},
            422,
            "mask",
        ),
        ("txt2img", {"batch_size": 16, "n_iter": 16}, 422, "count"),
        ("txt2img", {"steps": 10**6}, 422, "steps"),
        ("txt2img", {"enable_hr": True, "hr_resize_x": 1024}, 422, "hr_scale"),
        ("txt2img", {"enable_hr": True, "hr_sampler_name": "DDIM"}, 422, "sampler"),
        ("txt2img", {"enable_hr": True, "hr_checkpoint_name": "x"}, 422, "model"),
        ("txt2img", {"seed_resize_from_w": 512}, 422, "seed"),
        ("txt2img", {"s_churn": 0.5}, 422, "churn"),
        ("txt2img", {"infotext": "a cat\nSteps: 1"}, 422, "infotext"),
        ("txt2img", {"refiner_checkpoint": "../x"}, 404, "no model"),
        ("txt2img", {"alwayson_scripts": {"Refiner": {"args": [True, "x", 0.5]}}}, 404, "no model"),
        ("img2img", {"init_images": [PIXEL], "mask": PIXEL, "mask_blur_x": 1}, 422, "mask_blur_x"),
        ("img2img", {"init_images": [PIXEL], "resize_mode": 3}, 422, "resize_mode"),
        ("img2img", {"init_images": [PIXEL], "latent_mask": PIXEL}, 422, "latent"),
        ("options", {"CLIP_stop_at_last_layers": 1000}, 422, "bounds"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, 404, "no model"),
        ("img2img", {}, 404, "Init image"),
        ("img2img", {"init_images": ["http://127.0.0.1:1/x.png"]}, 422, "base64"),
        ("interrogate", {"image": ""}, 404, "Model not found"),
        ("extra-single-image", {"image": "aGVsbG8=", "upscaler_1": "Lanczos"}, 422, "picture"),
        ("extra-single-image", {"image": PIXEL, "upscaler_1": "/etc/passwd"}, 404, "Upscaler"),
        ("extra-single-image", {"image": PIXEL, "gfpgan_visibility": 1}, 422, "face"),
        (
            "extra-batch-images",
            {
                "imageList": [{"data": PIXEL, "name": "a"}] * 2,
                "upscaler_1": "Lanczos",
                "resize_mode": 1,
                "upscaling_resize_w": 8000,
                "upscaling_resize_h": 4000,
            },
            422,
            "together",
        ),
    ],
)
def test_errors_in_its_form(client, path, values, status, words):
    answer = client.post(f"/sdapi/v1/{path}", json={**ASKED, **values})
    body = answer.json()
    assert answer.status_code == status, body
    assert {"error", "detail", "body", "errors"} <= body.keys() and words in body["errors"]


@pytest.mark.parametrize("values", [{}, {"s_churn": 0, "s_noise": 1, "seed_resize_from_w": -1}])
def test_what_asks_for_nothing_special_is_drawn(client, values):
    """As webuiapi and the web UI's own page send it, with hires fix off."""
    drawn(client, hr_sampler_name="DDIM", hr_checkpoint_name="x", restore_faces=False, **values)


def test_what_has_no_effect_is_told(client):
    asked = {"frobnicate": 1, "comments": {}, "override_settings": {"use_xformers": True}}
    _, info, _ = drawn(client, **asked)
    note = info["extra_generation_params"]["Notes"]
    assert "frobnicate" in note and "use_xformers" in note and "comments" not in note
    assert drawn(client)[1]["extra_generation_params"] == {}


def test_what_is_masked_begins_as_asked(client):
    source = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    values = {**ASKED, "init_images": [encoded(source)], "mask": encoded(mask), "mask_blur": 0}
    values |= {"denoising_strength": 0.5, "steps": 4}
    found = {}
    for number in (None, 0, 1, 2, 3):
        more = {} if number is None else {"inpainting_fill": number}
        answer = client.post("/sdapi/v1/img2img", json={**values, **more}).json()
        found[number] = decoded(answer["images"][0]).tobytes()
    assert found[None] == found[0]  # A1111's default is to fill
    assert len({found[number] for number in (0, 1, 2, 3)}) == 4


def test_only_the_masked_part_is_drawn_unless_the_whole_is_asked_for(client):
    """As in A1111, where the picture then keeps its own size."""
    source = Image.radial_gradient("L").resize((150, 100)).convert("RGB")
    mask = Image.new("L", source.size)
    mask.paste(255, (90, 40, 110, 60))
    values = {**ASKED, "init_images": [encoded(source)], "mask": encoded(mask), "mask_blur": 0}
    values |= {"denoising_strength": 1, "steps": 2}
    for more, padding in (
        ({}, 0),
        ({"inpaint_full_res_padding": 16}, 16),
        ({"inpaint_full_res": 0, "inpaint_full_res_padding": 16}, None),
    ):
        answer = client.post("/sdapi/v1/img2img", json={**values, **more}).json()
        info = json.loads(answer["info"])
        picture, text = decoded(answer["images"][0]), info["infotexts"][0]
        assert info["extra_generation_params"] == {}
        assert ("Inpaint area: Only masked" in text) == (padding is not None)
        if padding is None:
            assert picture.size == (64, 64) and "Masked area padding" not in text
            continue
        assert f"Masked area padding: {padding}" in text
        assert picture.size == source.size
        changed = np.argwhere((np.asarray(picture) != np.asarray(source)).any(-1))
        assert (changed.min(0) >= (40, 90)).all() and (changed.max(0) < (60, 110)).all()
        assert len(changed) > 200


def test_hires_prompts_and_a_refiner_are_drawn_with(client):
    hires = {"enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 1}
    same, other = (drawn(client, **hires, hr_prompt=text)[1] for text in ("", "a ship"))
    assert "Hires prompt" not in same["infotexts"][0]
    assert "Hires prompt: a ship" in other["infotexts"][0]
    drawn(client, refiner_checkpoint=client.get("/sdapi/v1/options").json()["sd_model_checkpoint"])
    settings = client.get("/api/v1/pictures?limit=1").json()["pictures"][0]["settings"]
    assert (settings["refiner"], settings["refiner_start"]) == (settings["model"], 0.8)


def test_memory_is_one_machines(client):
    ram = client.get("/sdapi/v1/memory").json()["ram"]
    assert ram["free"] + ram["used"] == ram["total"] and 0 < ram["free"] < ram["total"]


@pytest.mark.parametrize("path", ["txt2img", "options"])
def test_halves_of_characters_are_refused(client, path):
    half = b'{"prompt": "a leaf", "steps": 1, "width": 64, "height": 64, "sd_vae": "\\ud800"}'
    headers = {"content-type": "application/json"}
    assert client.post(f"/sdapi/v1/{path}", content=half, headers=headers).status_code == 422
    assert client.get("/sdapi/v1/options").status_code == 200


def test_styles_are_presets(client):
    client.put("/api/v1/presets/teal", json={"prompt": "{prompt} on a teal background"})
    client.put("/api/v1/presets/plain", json={"prompt": "", "negative_prompt": "blur"})
    _, info, _ = drawn(client, styles=["teal", "plain", "unknown"], negative_prompt="red")
    assert info["prompt"] == "a red maple leaf on a teal background"
    assert info["negative_prompt"] == "red, blur"
    names = [style["name"] for style in client.get("/sdapi/v1/prompt-styles").json()]
    assert {"teal", "plain"} <= set(names)
    for name in ("teal", "plain"):
        client.delete(f"/api/v1/presets/{name}")


def test_a_controlnet_that_is_off_draws_without_one(client):
    for arguments in ([], [{"enabled": False, "model": "x"}]):
        drawn(client, alwayson_scripts={"ControlNet": {"args": arguments}})
    assert client.get("/controlnet/model_list").json() == {"model_list": []}
    assert "canny" in client.get("/controlnet/module_list").json()["module_list"]


def test_hires_fix_and_tiling(client):
    pictures, info, _ = drawn(
        client, enable_hr=True, hr_scale=2, hr_second_pass_steps=1, tiling=True
    )
    assert pictures[0].size == (128, 128)
    assert "Hires upscale: 2" in info["infotexts"][0]


def test_settings_and_sizes_of_pictures(client):
    source = drawn(client)[0][0]
    buffer = io.BytesIO()
    text = source.info["parameters"]
    from PIL import PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    source.save(buffer, "PNG", pnginfo=chunks)
    image = base64.b64encode(buffer.getvalue()).decode()
    info = client.post("/sdapi/v1/png-info", json={"image": image}).json()
    assert info["info"] == text and info["parameters"]["Seed"] == "7"
    larger = client.post(
        "/sdapi/v1/extra-single-image",
        json={"image": image, "upscaler_1": "Nearest", "upscaling_resize": 3},
    ).json()
    assert decoded(larger["image"]).size == (192, 192)


def test_pictures_are_enlarged_by_the_worker(client, studio, monkeypatch):
    """As jobs of the queue, which no list of drawings shows and which leave nothing behind."""
    files = {"imageList": [{"data": PIXEL, "name": "a"}, {"data": PIXEL, "name": "b"}]}
    values = {"upscaler_1": "Lanczos", "resize_mode": 1, "upscaling_resize_w": 100}
    kinds = []
    send = studio._worker.send
    monkeypatch.setattr(
        studio._worker, "send", lambda kind, **v: (kinds.append(kind), send(kind, **v))
    )
    more = {"upscaling_resize_h": 40, "upscaler_2": "Nearest", "extras_upscaler_2_visibility": 0.5}
    answer = client.post("/sdapi/v1/extra-batch-images", json={**files, **values, **more}).json()
    assert [decoded(image).size for image in answer["images"]] == [(100, 40)] * 2
    assert kinds == ["enlarge"]
    assert all(job["draw"]["prompt"] for job in client.get("/api/v1/jobs").json()["jobs"])
    for folder in (studio.store.enlarged, studio.store.inputs):
        assert not [path for path in folder.iterdir() if "image-0" in path.name]
    large = {"image": PIXEL, "upscaler_1": "Lanczos", "resize_mode": 1}
    large |= {"upscaling_resize_w": 8192, "upscaling_resize_h": 8192}
    refused = client.post("/sdapi/v1/extra-single-image", json=large)
    assert refused.status_code == 422 and "too large" in refused.json()["errors"]
