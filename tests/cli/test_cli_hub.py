"""Drawing with a model from the hub, end to end, against a hub on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_model

from maple_convert import convert
from mlx_maple import loading
from mlx_maple.cli import main

SD = "some-one/tiny"
DRAW = ["generate", "x", "-m", SD, "-s", "1", "-W", "64", "-H", "64", "--seed", "1", "--json"]


@pytest.fixture
def shelf(hub, tmp_path, monkeypatch):
    """The tiny model as a diffusers repository, beside files that nobody needs."""
    monkeypatch.chdir(tmp_path)
    convert(tiny_model.folder() / "model.ckpt", tmp_path / "diffusers", to="diffusers")
    files = {
        path.relative_to(tmp_path / "diffusers").as_posix(): path.read_bytes()
        for path in (tmp_path / "diffusers").rglob("*")
        if path.is_file()
    }
    hub.repos[SD] = {**files, "README.md": b"#", "safety_checker/model.safetensors": b"no"}
    return hub


def test_a_picture_from_a_repository(shelf, capsys, tmp_path):
    assert main(DRAW) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["model"]["name"] == "tiny" and Path(first["files"][0]).exists()
    assert not any(file.startswith(("README", "safety")) for file in shelf.fetched())
    assert any("converted once" in note for note in first["notes"])
    count = len(shelf.requests)
    assert main(DRAW) == 0  # from the twin; the hub is asked for its state, and for no file
    second = json.loads(capsys.readouterr().out)
    assert len(shelf.requests) == count and second["notes"] == []
    assert second["settings"] == first["settings"]
    shelf.down = True
    assert main(DRAW) == 0
    assert "used the copy in the cache" in json.loads(capsys.readouterr().out)["notes"][0]


def test_a_file_of_a_repository_and_a_revision(shelf):
    data = (tiny_model.folder() / "model.safetensors").read_bytes()
    shelf.repos["some-one/files"] = {"a.safetensors": data, "b.safetensors": b"no"}
    sd = loading.load("some-one/files@main:a.safetensors", cache=False)
    assert sd.info.name == "files" and shelf.fetched() == ["a.safetensors"]
    vae = (tiny_model.folder() / "vae.safetensors").read_bytes()
    shelf.repos["some-one/vae"] = {"vae.safetensors": vae}
    sd = loading.load(tiny_model.maple_folder(), vae="some-one/vae")
    assert sd.vae_name == "vae"


def test_a_maple_folder_on_the_hub(shelf):
    folder = tiny_model.maple_folder()
    shelf.repos["some-one/maple"] = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert loading.load("some-one/maple").info.layout == "maple"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hub: hub.status.update({SD: (401, "GatedRepo")}), "accept the terms at"),
        (lambda hub: hub.repos.clear(), "no such repository"),
        (lambda hub: hub.repos[SD].pop("unet/config.json"), "no config.json in unet/"),
        (lambda hub: setattr(hub, "down", True), "cannot be reached"),
    ],
    ids=["gated", "absent", "incomplete", "down"],
)
def test_faults_of_the_hub_end_in_1(shelf, capsys, change, words, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    change(shelf)
    assert main(DRAW) == 1
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and err.startswith(f"maple: {SD}: ")
    assert json.loads(out)["exit_code"] == 1


def test_the_environment_is_honoured_by_a_process(shelf, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mlx_maple", *DRAW]
    offline = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert offline.returncode == 1 and "HF_HUB_OFFLINE is set" in offline.stderr
    assert offline.stderr.count("\n") == 1
    online = subprocess.run(command, capture_output=True, text=True)
    assert online.returncode == 0, online.stderr
    assert (tmp_path / "hub-cache" / "models--some-one--tiny" / "refs" / "main").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
