"""/v1, as OpenAI's clients call it."""

import base64
import io
import json

import pytest
from PIL import Image

SIZE = {"prompt": "a red maple leaf", "size": "64x64"}


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_generation_as_base64_and_as_an_address(client):
    answer = client.post("/v1/images/generations", json={**SIZE, "n": 2}).json()
    assert len(answer["data"]) == 2 and answer["size"] == "64x64"
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert picture.format == "PNG" and picture.size == (64, 64)
    answer = client.post("/v1/images/generations", json={**SIZE, "response_format": "url"}).json()
    url = answer["data"][0]["url"]
    assert url.startswith("http://127.0.0.1:7860/api/v1/pictures/")
    assert Image.open(io.BytesIO(client.get(url).content)).size == (64, 64)


def test_other_formats(client):
    values = {**SIZE, "output_format": "webp", "output_compression": 50}
    answer = client.post("/v1/images/generations", json=values).json()
    image = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(image)).format == "WEBP"


def test_edits_redraw_what_is_transparent(client):
    source = Image.new("RGB", (64, 64), (200, 30, 30))
    mask = Image.new("RGBA", (64, 64), "white")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.post(
        "/v1/images/edits",
        data={"prompt": "a frog", "size": "64x64"},
        files={"image": ("a.png", png(source)), "mask": ("m.png", png(mask))},
    )
    assert answer.status_code == 200, answer.text
    after = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert after.getpixel((62, 62)) == (200, 30, 30)
    assert after.getpixel((2, 2)) != (200, 30, 30)


def test_a_stream_ends_with_the_picture(client):
    values = {**SIZE, "stream": True, "partial_images": 2}
    with client.stream("POST", "/v1/images/generations", json=values) as stream:
        events = [
            json.loads(line.removeprefix("data: "))
            for line in stream.iter_lines()
            if line.startswith("data: ")
        ]
    assert events[-1]["type"] == "image_generation.completed"
    assert Image.open(io.BytesIO(base64.b64decode(events[-1]["b64_json"]))).size == (64, 64)
    partial = [e for e in events if e["type"] == "image_generation.partial_image"]
    assert [event["partial_image_index"] for event in partial] == list(range(len(partial)))


def test_models(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert "tiny-model" in [model["id"] for model in listed["data"]]
    assert client.get("/v1/models/tiny-model").json()["object"] == "model"


@pytest.mark.parametrize(
    ("values", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x", "n": 11}, 400, "n"),
        ({"prompt": "x", "size": "64x63"}, 400, "size"),
        ({"prompt": "x", "size": "9999x9999"}, 400, "size"),
        ({"prompt": "x", "model": "dall-e-3"}, 404, None),
    ],
)
def test_errors_in_its_form(client, values, status, param):
    answer = client.post("/v1/images/generations", json=values)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({}, "image"),
        ({"image": ("a.png", b"no picture")}, None),
        (
            {
                "image": ("a.png", png(Image.new("RGB", (64, 64)))),
                "mask": ("m.png", png(Image.new("RGB", (64, 64)))),
            },
            "mask",
        ),
    ],
)
def test_edits_that_cannot_be(client, files, param):
    answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
