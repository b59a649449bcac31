"""Models, LoRAs, words, ControlNets and autoencoders by their names in the models' folders."""

import base64
import io
import json

import numpy as np
import pytest
from known import BASE, TINY, put_networks
from PIL import Image
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from maple_convert.upscaler import expected_shapes
from mlx_maple import model_folders
from mlx_maple.serve.app import make_app
from mlx_maple.serve.catalog import Catalog, UnknownName
from mlx_maple.serve.config import Config
from mlx_maple.serve.worker import Worker

SMALL = {"seed": 7, "steps": 1, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A server whose models lie as A1111 keeps them; the default one is the embedded model."""
    folder = put_networks(tmp_path_factory.mktemp("networks"))
    upscaler = folder / "ESRGAN" / "twice.safetensors"
    upscaler.parent.mkdir()
    draw = np.random.default_rng(1)
    shape = {"width": 8, "growth": 4, "num_blocks": 1, "doublings": 1, "shuffle": 1}
    weights = {
        n: draw.normal(0, 0.15, s).astype(np.float32) for n, s in expected_shapes(shape).items()
    }
    save_file(weights, upscaler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPLE_MODELS", str(folder))
        patch.setenv("MAPLE_CACHE", str(folder / "cache"))
        patch.delenv("MAPLE_MODEL", raising=False)
        app = make_app(Config(data=folder / "data"))
        with TestClient(app, base_url=BASE) as started:
            yield started


def picture(client, **values):
    """The pixels of a drawing through A1111's API, and what it says of itself."""
    answer = client.post("/sdapi/v1/txt2img", json={**SMALL, **values})
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
    return np.asarray(image), json.loads(answer.json()["info"])


def png():
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((64, 64)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_they_are_listed(client):
    listed = client.get("/api/v1/networks").json()
    assert listed["loras"] == [{"name": "blueprint"}] and listed["embeddings"] == [
        {"name": "noctia"}
    ]
    assert listed["controlnets"] == [{"name": "steer"}] and listed["vaes"] == [{"name": "other"}]
    assert client.get("/sdapi/v1/loras").json()[0]["name"] == "blueprint"
    assert list(client.get("/sdapi/v1/embeddings").json()["loaded"]) == ["noctia"]
    titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
    assert titles[:2] == ["demo", "below/noisy"]


def test_a_lora_changes_the_picture(client):
    plain, _ = picture(client, prompt="a maple leaf")
    tagged, info = picture(client, prompt="a maple leaf <lora:blueprint:0.8>")
    assert info["prompt"] == "a maple leaf <lora:blueprint:0.8>"
    values = {**SMALL, "prompt": "a maple leaf", "noise": "nvidia"}
    job = client.post(
        "/api/v1/jobs", json={**values, "loras": [{"name": "blueprint", "weight": 0.8}]}
    )
    with client.stream("GET", f"/api/v1/jobs/{job.json()['id']}/events") as stream:
        stream.read()
    drawn = client.get(f"/api/v1/jobs/{job.json()['id']}").json()["pictures"][0]
    listed = np.asarray(Image.open(io.BytesIO(client.get(drawn["url"]).content)))
    assert np.array_equal(tagged, listed) and not np.array_equal(tagged, plain)
    assert drawn["draw"]["loras"] == [{"name": "blueprint", "weight": 0.8}]


def test_models_swap_and_a_controlnet_steers(client):
    model = {"override_settings": {"sd_model_checkpoint": "noisy.safetensors [0123456789]"}}
    plain, info = picture(client, prompt="a leaf", **model)
    assert info["sd_model_name"] == "noisy"
    unit = {"image": png(), "model": "steer", "module": "canny", "weight": 1.0}
    scripts = {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}
    steered, _ = picture(client, prompt="a leaf", **model, **scripts)
    assert not np.array_equal(plain, steered)
    vae = {"override_settings": {**model["override_settings"], "sd_vae": "other"}}
    _, info = picture(client, prompt="a leaf", **vae)
    assert info["sd_vae_name"] == "other"
    (last,) = client.get("/api/v1/pictures?limit=1").json()["pictures"]
    assert last["draw"]["vae"] == "other"  # else it would be drawn again with another
    again, info = picture(client, prompt="a leaf", **model)
    assert info["sd_vae_name"] is None and np.array_equal(plain, again)
    # None of it was another model in memory.
    assert client.get("/api/v1/system").json()["worker"]["models"] == ["demo", "noisy"]


def test_a_network_enlarges(client):
    names = [row["name"] for row in client.get("/sdapi/v1/upscalers").json()]
    assert names == ["None", "Lanczos", "Nearest", "twice"]
    found = {}
    for name in ("Lanczos", "twice"):
        values = {"image": png(), "upscaler_1": name, "upscaling_resize": 3}
        answer = client.post("/sdapi/v1/extra-single-image", json=values)
        assert answer.status_code == 200, answer.text
        found[name] = Image.open(io.BytesIO(base64.b64decode(answer.json()["image"])))
        assert found[name].size == (192, 192)  # two passes of two times, and back
    assert found["Lanczos"].tobytes() != found["twice"].tobytes()


def test_names_that_nothing_goes_by_do_not_walk_the_disk(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    (tmp_path / "Lora" / "below").mkdir(parents=True)
    catalog, looks = Catalog(Config(data=tmp_path / "data")), []
    named = model_folders.named
    monkeypatch.setattr(model_folders, "named", lambda kind: (looks.append(kind), named(kind))[1])
    for number in range(20):
        with pytest.raises(UnknownName):
            catalog.find(f"nobody-{number}")
        with pytest.raises(UnknownName):
            catalog.network("lora", f"nobody-{number}")
    assert len(looks) == len(model_folders.KINDS)  # one look
    # What comes later is found all the same, in a folder's folder and in a new one.
    (tmp_path / "Lora" / "below" / "late.safetensors").write_bytes(b"")
    assert catalog.network("lora", "late").endswith("below/late.safetensors")
    (tmp_path / "VAE").mkdir()
    (tmp_path / "VAE" / "late.safetensors").write_bytes(b"")
    assert catalog.network("vae", "late").endswith("VAE/late.safetensors")
    assert catalog.networks("vae") == ["late"]
    assert len(looks) == 3 * len(model_folders.KINDS)


def test_models_go_when_there_is_no_room(monkeypatch):
    from mlx_maple.serve import worker as module

    tiny = {"source": str(TINY), "dtype": None, "quantize": None, "low_memory": False}
    worker = Worker(None)  # pyright: ignore[reportArgumentType]
    for room, left in ((float("inf"), ["a", "b"]), (0.0, [])):
        worker._models.update(dict.fromkeys("ab"))
        monkeypatch.setattr(module, "_available", lambda room=room: room)
        worker._make_room(tiny)
        assert list(worker._models) == left
