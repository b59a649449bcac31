"""Our own API, over a worker that draws with the tiny model."""

import base64
import io
import json
import os
import signal
import time
import zipfile

import pytest
from known import QUICK, TINY, wait_until
from PIL import Image, PngImagePlugin


def events_of(client, job):
    """Every event of a job until its end, as (kind, data)."""
    found, kind = [], ""
    with client.stream("GET", f"/api/v1/jobs/{job['id']}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
    return found


def submitted(client, **values):
    answer = client.post("/api/v1/jobs", json={**QUICK, **values})
    assert answer.status_code == 202, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def drawn(served):
    """A job that was watched to its end, and what was told of it."""
    client = served[0]
    job = submitted(client, steps=4)
    told = events_of(client, job)
    return told, client.get(f"/api/v1/jobs/{job['id']}").json()


def test_a_drawing_is_told_step_by_step(drawn):
    told, job = drawn
    assert [kind for kind, _ in told].count("preview") >= 1
    jobs = [data for kind, data in told if kind == "job"]
    steps = [data["progress"]["step"] for data in jobs if data["progress"]]
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert jobs[-1]["state"] == job["state"] == "done"
    assert job["progress"] is None and not job["has_preview"]
    preview = next(data for kind, data in told if kind == "preview")
    image = base64.b64decode(preview["image"].partition("base64,")[2])
    assert Image.open(io.BytesIO(image)).format == "JPEG"


def test_the_picture_is_the_python_apis(client, drawn, tmp_path):
    import numpy as np

    import mlx_maple as maple
    from mlx_maple import images

    picture = drawn[1]["pictures"][0]
    file = client.get(picture["url"])
    assert file.headers["content-type"] == "image/png"
    own = maple.load(TINY)(
        QUICK["prompt"], **{k: v for k, v in QUICK.items() if k != "prompt"} | {"steps": 4}
    )
    served_pixels = np.asarray(Image.open(io.BytesIO(file.content)))
    assert np.array_equal(served_pixels, np.asarray(own.images[0]))
    path = tmp_path / "picture.png"
    path.write_bytes(file.content)
    assert images.read_settings(path).settings == own.settings[0]


def test_settings_come_back_from_the_picture(client, drawn, finished):
    picture = drawn[1]["pictures"][0]
    file = base64.b64encode(client.get(picture["url"]).content).decode()
    info = client.post("/api/v1/png-info", json={"image": file}).json()
    assert info["draw"] == picture["draw"] and "Steps: 4" in info["parameters"]
    again = finished(client.post("/api/v1/jobs", json=info["draw"]).json())
    assert again["state"] == "done"
    one, two = (client.get(p["url"]).content for p in (picture, again["pictures"][0]))
    assert Image.open(io.BytesIO(one)).tobytes() == Image.open(io.BytesIO(two)).tobytes()


def test_a_batch_counts_its_seeds_up(client, finished):
    job = finished(submitted(client, count=2, seed="18446744073709551614"))
    seeds = [picture["seed_text"] for picture in job["pictures"]]
    assert seeds == ["18446744073709551614", "18446744073709551615"]
    archive = client.post(
        "/api/v1/pictures/zip", json={"ids": [picture["id"] for picture in job["pictures"]]}
    )
    with zipfile.ZipFile(io.BytesIO(archive.content)) as packed:
        assert len(packed.namelist()) == 2 and packed.testzip() is None


def test_from_a_picture_of_the_history_and_a_mask(client, drawn, finished):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    source = drawn[1]["pictures"][0]
    job = finished(
        submitted(client, prompt="a frog", image=f"picture:{source['id']}", mask=data, mask_blur=0)
    )
    assert job["state"] == "done", job["error"]
    assert job["draw"]["image"] is True and job["draw"]["mask"] is True
    before = Image.open(io.BytesIO(client.get(source["url"]).content))
    after = Image.open(io.BytesIO(client.get(job["pictures"][0]["url"]).content))
    assert before.getpixel((2, 2)) == after.getpixel((2, 2))
    assert before.crop((16, 16, 48, 48)).tobytes() != after.crop((16, 16, 48, 48)).tobytes()

    # What it started from is kept, and draws the same again.
    assert job["inputs"] == ["image", "mask"]
    kept = client.get(f"/api/v1/jobs/{job['id']}/inputs/mask")
    assert kept.content == buffer.getvalue()
    inputs = {name: f"input:{job['id']}-{name}" for name in job["inputs"]}
    again = finished(submitted(client, prompt="a frog", mask_blur=0, **inputs))
    same = Image.open(io.BytesIO(client.get(again["pictures"][0]["url"]).content))
    assert same.tobytes() == after.tobytes()
    assert client.get(f"/api/v1/jobs/{job['id']}/inputs/control-0").status_code == 404


def test_what_the_pipeline_can_is_passed_on(client, finished):
    job = finished(
        submitted(
            client,
            hires_scale=2,
            hires_steps=1,
            tile="xy",
            guidance_rescale=0.5,
            steps=2,
            deep_cache=2,
        )
    )
    assert job["state"] == "done", job["error"]
    picture = job["pictures"][0]
    assert (picture["width"], picture["height"]) == (128, 128)
    assert {"hires_scale": 2.0, "tile": "xy", "guidance_rescale": 0.5, "deep_cache": 2}.items() <= (
        picture["draw"].items()
    )
    assert client.post("/api/v1/jobs", json={**picture["draw"], "steps": 1}).status_code == 202


def test_a_lora_by_its_name(client, tmp_path, monkeypatch):
    folder = tmp_path / "Lora"
    folder.mkdir()
    (folder / "broken.safetensors").write_bytes(b"not a file of tensors")
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    assert client.get("/api/v1/networks").json()["loras"] == [{"name": "broken"}]
    answer = client.post("/api/v1/jobs", json={**QUICK, "loras": [{"name": "broken"}]})
    assert answer.status_code == 202  # it is there; the worker will say what it is


def test_a_running_job_is_cancelled_between_two_steps(client, finished):
    job = submitted(client, steps=200)
    wait_until(lambda: client.get(f"/api/v1/jobs/{job['id']}").json()["progress"])
    began = time.monotonic()
    assert client.post(f"/api/v1/jobs/{job['id']}/cancel").json()["cancelling"]
    answered = time.monotonic() - began
    ended = finished(job)
    assert ended["state"] == "cancelled" and ended["pictures"] == []
    assert answered < 5  # it does not wait for the step


def test_the_queue_is_bounded_and_a_waiting_job_is_cancelled_at_once(client, finished):
    running = submitted(client, steps=200)
    waiting = [submitted(client, steps=1) for _ in range(3)]
    assert [job["position"] for job in waiting] == [1, 2, 3]
    named = {"X-Maple-Client": "other"}
    other = client.post("/api/v1/jobs", json=QUICK, headers=named)
    assert other.status_code == 202
    assert other.json()["position"] == 2  # its turn comes after one of the first client's
    for headers in ({}, named, {"X-Maple-Client": "made-up"}):  # a name buys no room
        refused = client.post("/api/v1/jobs", json=QUICK, headers=headers)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "busy"
    for job in waiting[1:]:
        assert client.post(f"/api/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"
    client.post(f"/api/v1/jobs/{running['id']}/cancel")
    assert finished(waiting[0])["state"] == "done"
    assert finished(other.json())["state"] == "done"


def test_a_worker_that_is_killed_fails_its_job_and_no_other(client, studio, finished):
    job = submitted(client, steps=200)
    wait_until(lambda: client.get(f"/api/v1/jobs/{job['id']}").json()["progress"])
    after = submitted(client)
    os.kill(studio.worker_pid, signal.SIGKILL)
    ended = finished(job)
    assert ended["state"] == "failed" and ended["error"]["code"] == "worker_died"
    assert "SIGKILL" in ended["error"]["message"]
    assert finished(after)["state"] == "done"


def test_a_job_that_cannot_be_drawn_fails_and_the_next_one_runs(client, finished):
    broken = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(broken, "PNG")
    half = base64.b64encode(broken.getvalue()[:60]).decode()
    job = finished(submitted(client, image=half))
    assert job["state"] == "failed" and job["error"]["code"] == "unusable"
    job = finished(submitted(client, clip_skip=40))
    assert job["error"] == {"code": "invalid", "message": job["error"]["message"]}
    assert finished(submitted(client))["state"] == "done"


def test_memory_is_given_back_and_taken_again(client, studio, finished):
    finished(submitted(client))
    studio.unload()
    assert client.get("/api/v1/system").json()["worker"]["state"] == "stopped"
    assert finished(submitted(client))["state"] == "done"
    assert client.get("/api/v1/system").json()["worker"]["models"] == ["tiny-model"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"width": 63}, "width"),
        ({"width": 100_000_000}, "width"),
        ({"steps": 10**9}, "steps"),
        ({"count": 0}, "count"),
        ({"guidance_scale": 1e308}, "guidance_scale"),
        ({"seed": "7; DROP TABLE jobs"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"prompt": "x" * 20_001}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"unknown": 1}, "unknown"),
        ({"loras": [{"name": "x"}] * 17}, "loras"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(client, values, field):
    answer = client.post("/api/v1/jobs", json={**QUICK, **values})
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["code"] == "invalid" and error["details"][0]["field"] == field


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ({"sampler": "eular"}, 422, "euler"),
        ({"sampler": "ddim", "schedule": "karras"}, 422, "trailing"),
        ({"width": 2048, "height": 2048, "count": 16}, 422, "pixels"),
        ({"mask": "aGVsbG8="}, 422, "image"),
        ({"image": "aGVsbG8="}, 422, "picture"),
        ({"image": "no base64!"}, 422, "base64"),
        ({"image": "http://127.0.0.1/x.png"}, 422, "base64"),
        ({"image": "file:///etc/passwd"}, 422, "base64"),
        ({"image": "picture:../../etc/passwd"}, 422, "history"),
        ({"image": "input:../../../etc/passwd"}, 422, "kept"),
        ({"model": "/etc/passwd"}, 404, "no model"),
        ({"model": "../tiny-model"}, 404, "no model"),
        ({"vae": "../../etc/passwd"}, 404, "no vae"),
        ({"loras": [{"name": "/etc/passwd"}]}, 404, "no lora"),
        ({"prompt": "a leaf <lora:../../etc/passwd:0.5>"}, 404, "no lora"),
        ({"negative_prompt": "<lora:/etc/passwd>"}, 404, "no lora"),
        ({"controls": [{"name": "/etc/passwd", "image": "aGVsbG8="}]}, 404, "no controlnet"),
        ({"hires_scale": 2, "hires_upscaler": "/etc/passwd"}, 404, "no upscaler"),
        ({"hires_scale": 4, "width": 2048, "height": 2048}, 422, "pixels"),
        ({"model": "sd15"}, 404, "maple models pull sd15"),
    ],
)
def test_what_no_model_could_draw_is_refused_in_one_line(client, values, status, words):
    answer = client.post("/api/v1/jobs", json={**QUICK, **values})
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert words in message and "\n" not in message


def test_no_path_leads_out(client):
    for path in (
        "/api/v1/pictures/..%2F..%2Fhistory.sqlite3/file",
        "/api/v1/pictures/%2e%2e%2fhistory.sqlite3",
        "/page/..%2f..%2f..%2fetc/passwd",
        "/page/../../config.py",
        "/..%2f..%2fetc/passwd",
    ):
        assert client.get(path).status_code in (404, 422), path


def test_models_and_plans(client):
    listed = client.get("/api/v1/models").json()
    assert listed["default"] == "tiny-model"
    assert {"tiny-model", "demo", "sd15"} <= {model["id"] for model in listed["models"]}
    detail = client.get("/api/v1/models/tiny-model").json()
    assert detail["family"] == "sd1" and detail["defaults"]["steps"] == 8
    small = client.post("/api/v1/plan", json={"width": 64, "height": 64}).json()
    large = client.post("/api/v1/plan", json={"width": 512, "height": 512}).json()
    assert large["peak"] > small["peak"] > 0
    assert client.get("/api/v1/models/nope").status_code == 404


def test_presets_are_kept(client):
    kept = client.put("/api/v1/presets/my own", json={"steps": 4, "sampler": "euler"})
    assert kept.json()["draw"] == {"prompt": "", "steps": 4, "sampler": "euler"}
    assert [p["name"] for p in client.get("/api/v1/presets").json()["presets"]] == ["my own"]
    guide = {"name": "x", "image": "aGVsbG8="}
    for pictures in ({"image": "aGVsbG8="}, {"depth_image": "aGVsbG8="}, {"controls": [guide]}):
        assert client.put("/api/v1/presets/x", json=pictures).status_code == 422
    assert client.delete("/api/v1/presets/my own").status_code == 204
    assert client.delete("/api/v1/presets/my own").status_code == 404


def test_an_unnamed_size_counts_as_the_models_own(client, studio, monkeypatch):
    asked = {"prompt": "x", "count": 16, "hires_scale": 4}  # of 64x64 each: 4 megapixels
    assert client.post("/api/v1/jobs", json={**asked, "width": 1024}).status_code == 422
    job = client.post("/api/v1/jobs", json={**asked, "height": 64})
    assert job.status_code == 202
    client.post(f"/api/v1/jobs/{job.json()['id']}/cancel")

    async def describe(kind, **question):
        return {"defaults": {"width": 1024, "height": 1024}}

    monkeypatch.setattr(studio, "ask", describe)
    refused = client.post("/api/v1/jobs", json={**asked, "count": 2})
    assert refused.status_code == 422
    assert "33,554,432 pixels" in refused.json()["error"]["message"]


def test_presets_are_bounded(client):
    codes = [client.put(f"/api/v1/presets/{n}", json={}).status_code for n in "abcd"]
    assert codes == [200, 200, 200, 409]
    assert client.put("/api/v1/presets/a", json={"steps": 4}).status_code == 200  # changed
    for name in "abc":
        client.delete(f"/api/v1/presets/{name}")


def test_the_history_pages_and_forgets(client, drawn, finished):
    finished(submitted(client))
    page = client.get("/api/v1/pictures?limit=1").json()
    assert len(page["pictures"]) == 1 and page["next"]
    rest = client.get(f"/api/v1/pictures?limit=200&before={page['next']}").json()
    assert drawn[1]["pictures"][0]["id"] in [picture["id"] for picture in rest["pictures"]]
    gone = page["pictures"][0]
    assert client.get(gone["thumbnail"]).headers["content-type"] == "image/jpeg"
    assert client.delete(f"/api/v1/pictures/{gone['id']}").status_code == 204
    assert client.get(gone["url"]).status_code == 404


def test_a_deleted_picture_is_in_no_job(client, finished):
    job = finished(submitted(client, count=2))
    first, second = job["pictures"]
    client.delete(f"/api/v1/pictures/{first['id']}")
    (left,) = client.get(f"/api/v1/jobs/{job['id']}").json()["pictures"]
    assert left["id"] == second["id"]


def test_a_picture_of_the_history_takes_no_room_again(client, studio, finished):
    (source,) = finished(submitted(client))["pictures"]
    path = studio.store.pictures / f"{source['id']}.png"
    job = finished(submitted(client, image=f"picture:{source['id']}"))
    kept = client.get(f"/api/v1/jobs/{job['id']}/inputs/image")
    assert kept.content == path.read_bytes() and path.stat().st_nlink == 2
    path.unlink()  # by hand: the history does not know
    gone = client.post("/api/v1/jobs", json={**QUICK, "image": f"picture:{source['id']}"})
    assert gone.status_code == 422 and "is gone" in gone.json()["error"]["message"]
    client.delete(f"/api/v1/pictures/{source['id']}")
    again = finished(submitted(client, image=f"input:{job['id']}-image"))
    assert again["state"] == "done", again["error"]


def test_archives_are_bounded(client, studio, drawn):
    asked = {"ids": [drawn[1]["pictures"][0]["id"]]}
    with studio.archive("testclient"), studio.archive("testclient"):
        assert client.post("/api/v1/pictures/zip", json=asked).status_code == 429
    for _ in range(3):  # each has ended when its answer has
        assert client.post("/api/v1/pictures/zip", json=asked).status_code == 200


def test_what_does_not_go_together_names_its_field(client):
    answer = client.post("/api/v1/jobs", json={**QUICK, "hires_scale": 2, "image": "input:x"})
    assert [each["field"] for each in answer.json()["error"]["details"]] == ["hires_scale"]


def test_a_picture_without_settings_says_so(client):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    answer = client.post("/api/v1/png-info", json={"image": data})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "no_settings"


def test_a_comment_that_is_no_settings_is_none(client):
    """Cameras and screenshots have some: the page starts from such a picture."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "Screenshot")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    image = base64.b64encode(buffer.getvalue()).decode()
    answer = client.post("/api/v1/png-info", json={"image": image})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "no_settings"


@pytest.mark.parametrize(
    "said", ['{"prompt": "\\ud800 leaf"}', '{"prompt": "a leaf", "loras": "x:9999999"}']
)
def test_settings_of_a_strangers_picture_are_read_as_far_as_they_go(client, said):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("mlx-maple", said)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=chunks)
    image = base64.b64encode(buffer.getvalue()).decode()
    answer = client.post("/api/v1/png-info", json={"image": image})
    assert answer.status_code == 200 and answer.json()["draw"]["prompt"].endswith(" leaf")
    assert "loras" not in answer.json()["draw"]


def test_a_stream_of_no_job_is_an_error_not_a_stream(client, studio):
    answer = client.get("/api/v1/jobs/" + "0" * 24 + "/events")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert not studio._feeds


def test_a_stream_of_an_ended_job_ends(client, studio, drawn):
    told = events_of(client, drawn[1])
    assert [(kind, data["state"]) for kind, data in told] == [("job", "done")]
    wait_until(lambda: not studio._feeds)
