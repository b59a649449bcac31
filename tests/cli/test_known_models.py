"""Short names: the table, `maple models pull` and `use`, and what `-m sd15` opens."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import save_file

from maple_convert import convert, detect
from mlx_maple import hub as hub_module
from mlx_maple import known_models, loading
from mlx_maple.cli import _default_model, main

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FAMILIES = {family.name for family in detect.FAMILIES if not family.refusal}
SMALL = ("-s", "1", "-W", "64", "-H", "64", "--seed", "1", "--json")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def maple(capsys):
    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def shelf(hub, tmp_path):
    """The tiny model in place of three known ones, in the forms that the real ones have."""
    convert(tiny_model.folder() / "model.ckpt", tmp_path / "diffusers", to="diffusers")
    hub.repos[SD15] = {
        path.relative_to(tmp_path / "diffusers").as_posix(): path.read_bytes()
        for path in (tmp_path / "diffusers").rglob("*")
        if path.is_file()
    }
    config = b'{"_class_name": "AutoencoderTiny", "latent_channels": 4}'
    save_file(tiny_model.weights("taesd", "diffusers"), tmp_path / "taesd.safetensors")
    hub.repos["madebyollin/taesd"] = {
        "config.json": config,
        "diffusion_pytorch_model.safetensors": (tmp_path / "taesd.safetensors").read_bytes(),
        "taesd_decoder.safetensors": b"no",
    }
    one_file = (tiny_model.folder() / "model.safetensors").read_bytes()
    files = {"mdjrny-v4.safetensors": one_file, "mdjrny-v4.ckpt": b"no"}
    hub.repos["prompthero/openjourney"] = files
    return hub


def test_every_entry_of_the_table_can_be_used():
    names = [model.name for model in known_models.known_models()]
    assert len(set(names)) == len(names) and {"demo", "sd14", "sd15", "taesd"} <= set(names)
    for model in known_models.known_models():
        assert hub_module.parse_name(model.name) is None and model.name == model.name.lower()
        assert model.kind in known_models.OPTIONS and model.family and model.license and model.note
        assert 0 < model.bytes <= model.bytes_in_float32
        assert known_models.find(model.name.upper()) == model
        assert model.family in FAMILIES
        assert model.settings.keys() <= set(known_models.SETTINGS)
        defaults = {"width": 512, "height": 512, "steps": 20, "guidance_scale": 7.5}
        usual = {**defaults, "sampler": "ddim", "schedule": "trailing"}
        assert loading._defaults({**usual, **model.settings})["steps"] > 0
        vae = None if model.vae is None else known_models.find(model.vae)
        assert vae is None if model.vae is None else vae and vae.kind == "vae"
        # A name that goes to another option never reads as a whole model.
        assert (known_models.of_repo(model.repo or "") == model) == (
            model.kind == "model" and model.hub is not None
        )
        if model.hub is None:
            assert model.name == "demo"
        else:
            name = hub_module.parse_name(model.hub)
            assert name is not None and name.repo == model.repo
    demo = known_models.find("demo")
    on_disk = sum(path.stat().st_size for path in loading.DEMO.rglob("*.safetensors"))
    assert demo is not None and abs(demo.bytes - on_disk) < 1e6


# Millions of parameters of the published networks, as tests/parity/true_sizes.py and
# test_distilled_parity.py count them; SSD-1B's and Vega's UNets are what their files take.
UNETS = {"sd1": 859.5, "sd2": 865.9, "sdxl": 2567.5, "sdxl-refiner": 2259.5}
SMALLER = {"tiny-sd": 323.4, "small-sd": 579.4, "ssd-1b": 1331.0, "vega": 745.0}
TEXTS = {"sd1": 123.1, "sd2": 340.4, "sdxl": 123.1 + 694.7, "sdxl-refiner": 694.7}
VAE = 83.7
OTHERS = {"control-canny-sdxl": 1251.0, "taesd": 2.45, "taesdxl": 2.45}
CONTROL_SD1 = 361.3


def expected_bytes(model) -> float:
    """Two bytes a parameter of the networks that a whole model has."""
    family = model.family if model.family in UNETS else model.family.partition("-")[0]
    if model.kind == "controlnet":
        return 2e6 * OTHERS.get(model.name, CONTROL_SD1)
    if model.kind != "model":
        return 2e6 * OTHERS.get(model.name, VAE)
    return 2e6 * (SMALLER.get(model.name, UNETS[family]) + TEXTS[family] + VAE)


def test_sizes_are_what_the_networks_take():
    for model in known_models.known_models():
        if model.hub is None or model.kind in ("lora", "ip_adapter"):
            continue
        halves = expected_bytes(model)
        for nbytes in (model.bytes, model.bytes_in_float32):
            assert min(abs(nbytes / halves - n) for n in (1, 2)) < 0.03, (model.name, nbytes)


def test_where_facts_are_from_is_said():
    for model in known_models.known_models():
        if model.hub is not None:
            assert model.sources or {"hub", "license"} <= set(model.unverified), model.name
        assert all(page.startswith("https://") for page in model.sources)
        assert set(model.unverified) <= {"hub", "license", "settings", "bytes"}
        assert "settings" not in model.unverified or model.settings
    pages = [page for m in known_models.known_models() for page in m.sources]
    assert len(set(pages)) > 25


def test_pull_prints_where_the_model_is(maple, shelf):
    code, out, err = maple("models", "pull", "sd15")
    path = Path(out.strip())
    assert code == 0 and err == "" and (path / "unet" / "config.json").is_file()
    assert hub_module.folder_of(hub_module.HubName(SD15)) in path.parents
    count = len(shelf.requests)
    code, out, _ = maple("models", "pull", "sd15", "--json")
    report = json.loads(out)
    assert len(shelf.requests) == count  # all is here
    assert report["path"] == str(path) and "model_index.json" in report["files"]
    assert report["license"] == "creativeml-openrail-m" and report["notes"] == []
    known = {
        m["name"]: m["is_here"] for m in json.loads(maple("models", "list", "--json")[1])["known"]
    }
    assert known["sd15"] and known["demo"] and not known["sd14"]


def test_a_short_name_draws(maple, shelf):
    code, out, _ = maple("generate", "x", "-m", "sd15", "--taesd", "taesd", *SMALL)
    assert code == 0 and json.loads(out)["model"]["name"] == "stable-diffusion-v1-5"
    assert "taesd_decoder.safetensors" not in shelf.fetched()
    assert loading.load("openjourney", cache=False).info.name == "openjourney"
    assert "mdjrny-v4.ckpt" not in shelf.fetched()
    convert(tiny_model.folder() / "model.ckpt", "sd15")  # a path that exists goes before a name
    shelf.down = True
    assert loading.load("sd15", cache=False).info.layout == "maple"


def test_settings_and_autoencoder_that_are_recommended(maple, shelf, tmp_path, monkeypatch):
    """They are what is drawn with where nothing is said, by short name and by hub name alike."""
    table = json.loads(known_models.TABLE.read_text("utf-8"))
    mine = next(entry for entry in table if entry["name"] == "sd15")
    mine |= {"settings": {"steps": 3, "sampler": "lcm", "width": 64}, "vae": "sd-vae-ft-mse"}
    (tmp_path / "table.json").write_text(json.dumps(table))
    monkeypatch.setattr(known_models, "TABLE", tmp_path / "table.json")
    known_models.known_models.cache_clear()
    try:
        model = loading.load("sd15", cache=False)
        assert (model.defaults["steps"], model.defaults["width"]) == (3, 64)
        assert model.defaults["sampler"] == "lcm"
        assert any("--vae sd-vae-ft-mse: `maple models pull" in n for n in model.info.notes)

        save_file(tiny_model.weights("vae", "diffusers"), tmp_path / "vae.safetensors")
        shelf.repos["stabilityai/sd-vae-ft-mse"] = {
            "config.json": (tmp_path / "diffusers" / "vae" / "config.json").read_bytes(),
            "diffusion_pytorch_model.safetensors": (tmp_path / "vae.safetensors").read_bytes(),
        }
        assert maple("models", "pull", "sd15")[0] == 0
        notes = loading.load(SD15, cache=False).info.notes
        assert any("is drawn with sd-vae-ft-mse" in note for note in notes)
        own = loading.load("sd15", cache=False, vae=tmp_path / "diffusers" / "vae")
        assert not any("sd-vae-ft-mse" in note for note in own.info.notes)
    finally:
        known_models.known_models.cache_clear()


def test_pull_goes_on_where_it_was_cut_off(maple, shelf, monkeypatch):
    monkeypatch.setattr(hub_module, "RESUMED_FROM", 1 << 10)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    file = "unet/diffusion_pytorch_model.safetensors"
    shelf.cut[file] = [400_000] + [0] * 200  # the connection does not come back
    code, out, err = maple("models", "pull", "sd15")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"maple: {SD15}: ") and "it goes on where it stopped" in err
    shelf.cut.clear()
    code, out, err = maple("models", "pull", "sd15", "--progress")
    assert code == 0 and "downloading unet" in err
    assert max(first for _, name, first in shelf.requests if name == file) == 400_000


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (lambda hub: None, "sd16", "no model is known by it: demo, sd14, sd15"),
        (lambda hub: hub.repos.clear(), "sd15", "no such repository"),
        (lambda hub: hub.status.update({SD15: (401, "GatedRepo")}), "sd15", "accept the terms at"),
        (lambda hub: setattr(hub, "down", True), "sd15", "cannot be reached"),
    ],
    ids=["unknown", "absent", "gated", "down"],
)
def test_pull_fails_in_one_line(maple, shelf, change, name, words, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    change(shelf)
    code, out, err = maple("models", "pull", name, "--json")
    assert code == 1 and words in err and err.count("\n") == 1
    assert json.loads(out)["exit_code"] == 1


def test_a_name_that_is_not_known_says_which_are(maple):
    code, _, err = maple("generate", "x", "-m", "sd51")
    assert code == 1 and "sd51: no such file or folder, and no model is known" in err
    code, _, err = maple("generate", "x", "-m", "folder/sd51.ckpt")
    assert code == 1 and err == "maple: folder/sd51.ckpt: no such file or folder\n"


def test_without_a_model_the_embedded_one_draws_and_one_line_says_so(maple):
    code, _, err = maple("generate", "a leaf", "-s", "1")
    assert code == 0
    (line,) = [line for line in err.splitlines() if "comes with maple" in line]
    assert line.startswith("note: ") and "maple models pull sd15" in line
    assert "pull" not in maple("generate", "a leaf", "-s", "1", "--quiet")[2]
    assert "pull" not in maple("generate", "a leaf", "-s", "1", "-m", "demo")[2]
    assert "maple models pull sd15" in loading.load().info.notes[0]


def test_use_keeps_the_default_model(maple, tmp_path, monkeypatch):
    assert maple("models", "use")[1] == "demo, which comes with maple\n"
    model = tiny_model.maple_folder()
    monkeypatch.chdir(model.parent)
    code, out, _ = maple("models", "use", model.name)
    assert code == 0 and out == f"{model} (from {tmp_path / 'config' / 'mlx-maple' / 'model'})\n"
    monkeypatch.chdir(tmp_path)  # the path was kept in full
    report = json.loads(maple("generate", "x", *SMALL)[1])
    assert report["model"]["name"] == model.name and report["notes"] == []
    assert json.loads(maple("generate", "x", "-m", "demo", "-s", "1", "--json")[1])["model"][
        "name"
    ] == ("demo")
    assert loading.load().info.name == "demo"  # a program says what it wants

    monkeypatch.setenv("MAPLE_MODEL", "demo")  # goes before what is kept
    assert json.loads(maple("generate", "x", *SMALL)[1])["model"]["name"] == "demo"
    assert "goes before it" in maple("models", "use", model)[2]
    monkeypatch.delenv("MAPLE_MODEL")
    assert json.loads(maple("models", "use", "--json")[1])["model"] == str(model)
    assert maple("models", "use", "demo")[1] == "demo, which comes with maple\n"
    assert not _default_model.config_file().exists()


def test_use_takes_names_and_refuses_what_is_no_model(maple):
    assert maple("models", "use", "SD15")[1].startswith("sd15 (from ")
    assert maple("models", "use", "some-one/model@v2:a.safetensors")[0] == 0
    assert _default_model.chosen()[0] == "some-one/model@v2:a.safetensors"
    code, _, err = maple("models", "use", "taesd")
    assert code == 2 and "give it to --taesd" in err
    code, _, err = maple("models", "use", "nothing.ckpt")
    assert code == 1 and err.count("\n") == 1 and "nor is it a file" in err
    assert _default_model.chosen()[0] == "some-one/model@v2:a.safetensors"


def test_a_default_that_is_gone_says_where_it_was_named(maple):
    Path("gone.ckpt").touch()
    assert maple("models", "use", "gone.ckpt")[0] == 0
    Path("gone.ckpt").unlink()
    code, _, err = maple("generate", "x")
    assert code == 1 and err.count("\n") == 1
    assert f"the default model, from {_default_model.config_file()}" in err


def test_a_configuration_that_cannot_be_written_is_one_line(maple, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    code, out, err = maple("models", "use", "sd15")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert _default_model.chosen()[0] is None  # and drawing goes on without one
    assert "Traceback" in maple("models", "use", "sd15", "--debug")[2]


def test_a_path_of_any_bytes_is_kept():
    name = os.fsdecode(b"/l\xe9af.ckpt")
    _default_model.keep(name)
    assert _default_model.chosen()[0] == name


def test_the_table_needs_no_mlx():
    code = (
        "import sys; from mlx_maple import known_models; known_models.find('sd15'); "
        "sys.exit('mlx.core' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert asdict(known_models.known_models()[0])["name"] == "demo"


def test_the_list_tells_the_family_of_every_file_in_the_folders(maple, tmp_path, monkeypatch):
    """A1111's folder, ComfyUI's file of folders beside it, and what cannot be used, by name."""
    web, comfy = tmp_path / "webui", tmp_path / "comfy"
    checkpoints = web / "models" / "Stable-diffusion"
    (checkpoints / "styles").mkdir(parents=True)
    shutil.copy(tiny_model.folder() / "model.ckpt", checkpoints / "styles" / "leaf.ckpt")
    save_file({"x.lora_up.weight": np.zeros(4, "f4")}, checkpoints / "no.safetensors")
    (web / "models" / "Lora").mkdir()
    save_file({"x": np.zeros(4, "f4")}, web / "models" / "Lora" / "ink.safetensors")
    (comfy / "vae").mkdir(parents=True)
    vae = tiny_model.weights("vae", "diffusers")
    save_file(vae, comfy / "vae" / "soft.safetensors")
    (web / "extra_model_paths.yaml").write_text(f"comfyui:\n  base_path: {comfy}\n  vae: vae\n")
    monkeypatch.setenv("MAPLE_MODELS", str(web))

    files = {one["name"]: one for one in json.loads(maple("models", "list", "--json")[1])["files"]}
    assert set(files) == {"styles/leaf", "no", "ink", "soft"}
    assert (files["styles/leaf"]["kind"], files["styles/leaf"]["family"]) == ("checkpoint", "sd1")
    assert files["no"]["family"] == "" and "LoRA" in files["no"]["fault"]
    assert (files["soft"]["kind"], files["soft"]["family"]) == ("vae", "vae")
    assert files["soft"]["nbytes"] == (comfy / "vae" / "soft.safetensors").stat().st_size
    lines = maple("models")[1].splitlines()
    assert any("-m styles/leaf" in line and line.endswith("sd1") for line in lines)
    assert any("--lora ink" in line for line in lines)

    report = json.loads(maple("generate", "x", "-m", "leaf", *SMALL)[1])
    assert report["model"]["name"] == "leaf"
    assert maple("models", "use", "styles/leaf")[0] == 0
    assert json.loads(maple("generate", "x", *SMALL)[1])["model"]["name"] == "leaf"
    assert maple("models", "clear", "styles/leaf")[0] == 1, "what is another program's stays"
    assert (checkpoints / "styles" / "leaf.ckpt").exists()


def test_loras_and_controlnets_by_short_name(maple, shelf, tmp_path):
    """Each is pulled as a model is: one file of a repository, or a config and weights."""
    shelf.repos["latent-consistency/lcm-lora-sdv1-5"] = {
        "pytorch_lora_weights.safetensors": b"weights",
        "README.md": b"x",
    }
    path = Path(maple("models", "pull", "lcm-lora-sd15")[1].strip())
    assert path.name == "pytorch_lora_weights.safetensors" and path.read_bytes() == b"weights"
    assert loading._adapter_of_hub("lcm-lora-sd15", local_files_only=True) == path
    shelf.repos["lllyasviel/control_v11p_sd15_canny"] = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": b"full",
        "diffusion_pytorch_model.fp16.safetensors": b"half",
        "diffusion_pytorch_model.bin": b"no",
    }
    report = json.loads(maple("models", "pull", "control-canny", "--dtype", "float16", "--json")[1])
    assert report["files"] == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
    code, _, err = maple("models", "use", "lcm-lora-sd15")
    assert code == 2 and "give it to --lora" in err


def test_a_quantised_file_of_a_repository(shelf):
    """It is read where it is named or alone, and never preferred to the weights beside it."""
    both = {"model.safetensors": 1, "model-q8.gguf": 1}
    name = hub_module.HubName("a/b")
    assert hub_module.choose(name, both, "float16").single == "model.safetensors"
    assert hub_module.choose(name, ["m-q8.gguf"], "float16").single == "m-q8.gguf"
    named = hub_module.parse_name("a/b:model-q8.gguf")
    assert named and hub_module.choose(named, both, "float16").single == "model-q8.gguf"
    with pytest.raises(hub_module.HubError, match="several"):
        hub_module.choose(name, ["q4.gguf", "q8.gguf"], "float16")
