"""The smaller verbs: convert, inspect, models, doctor."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file

from mlx_maple import _OPENBLAS, twins
from mlx_maple import hub as hub_module
from mlx_maple.cli import main
from mlx_maple.text.tokenizer import Tokenizer


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


CKPT = "model.ckpt"


def test_convert_there_and_back(maple):
    source = tiny_model.folder() / CKPT
    code, out, _ = maple("convert", source, "a", "--quiet")
    assert code == 0 and out.startswith("a: maple layout")
    code, out, _ = maple("convert", "a", "b.safetensors", "--to", "compvis", "--json")
    assert code == 0 and json.loads(out)["layout"] == "compvis"
    back, original = load_file("b.safetensors"), tiny_model.compvis()
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[name], original[name]) for name in back)


def test_convert_to_diffusers_brings_clips_vocabulary(maple):
    assert maple("convert", tiny_model.folder() / CKPT, "a", "--to", "diffusers")[0] == 0
    own = Tokenizer.from_files("a/tokenizer/vocab.json", "a/tokenizer/merges.txt")
    text = "a red maple leaf, Käse 木 🍁"
    assert own.encode(text) == Tokenizer.bundled().encode(text)


def test_inspect(maple):
    code, out, _ = maple("inspect", tiny_model.folder() / CKPT)
    assert code == 0 and "Stable Diffusion 1.x" in out and "torch zip" in out
    code, out, _ = maple("inspect", tiny_model.folder() / CKPT, "--json", "--keys")
    assert code == 0 and json.loads(out)["layout"] == "compvis"


@pytest.mark.parametrize("verb", ["convert", "inspect"])
@pytest.mark.parametrize(
    ("name", "data", "code"),
    [("nothing", None, 1), ("page.ckpt", b"<!DOCTYPE html><html>", 3), ("empty.ckpt", b"", 3)],
)
def test_files_that_cannot_be_used(maple, verb, name, data, code):
    if data is not None:
        Path(name).write_bytes(data)
    found, out, err = maple(verb, name, *(["out"] if verb == "convert" else []))
    assert (found, out) == (code, "") and err.startswith(f"maple: {name}: ")
    assert err.count("\n") == 1 and not Path("out").exists()


def test_models_lists_twins_and_clears_them(maple):
    assert maple("models")[1].startswith(f"0 kept, 0 B; twins in {twins.twins_folder()}\n")
    assert maple("models", "path")[1] == f"{twins.twins_folder()}\n"
    source = tiny_model.folder() / CKPT
    for dtype in ("float16", "float32"):
        draw = ("generate", "x", "-m", source, "-s", 1, "-W", 64, "-H", 64, "--dtype", dtype)
        assert maple(*draw, "--quiet")[0] == 0
    (twin,) = twins.all_twins()  # float16 serves both
    code, out, _ = maple("models", "list")
    assert code == 0 and twin.path.name in out and str(source) in out and "8.86 MB" in out
    listed = json.loads(maple("models", "list", "--json")[1])["models"]
    assert [(model["kind"], model["name"]) for model in listed] == [("twin", twin.path.name)]
    code, _, err = maple("models", "clear", "nothing")
    assert code == 1 and twin.path.name in err
    assert maple("models", "clear", twin.path.name)[1] == "removed 1, 8.86 MB\n"
    assert not twins.all_twins() and not twin.path.exists()


def test_models_clears_what_a_killed_conversion_left(maple):
    left = twins.twins_folder() / f"{twins.UNFINISHED}0123456789abcdef"
    left.mkdir(parents=True)
    (left / "unet.safetensors").write_bytes(b"half")
    assert "what a killed one left" in maple("models")[1]
    assert maple("models", "clear", "--all")[1] == "removed 1, 4 B\n"
    assert not left.exists()
    assert maple("models", "clear", "--all", "name")[0] == 2


def test_models_lists_downloads_and_clears_one_by_name(maple, hub):
    from huggingface_hub import hf_hub_download

    hub.repos["some/model"] = {"model.ckpt": (tiny_model.folder() / CKPT).read_bytes()}
    hub.repos["some/words"] = {"config.json": b"{}", "model.safetensors": b"language"}
    for hub.commit, repo in (("1" * 40, "some/model"), ("2" * 40, "some/words")):
        for file in hub.repos[repo]:
            hf_hub_download(repo, file)
    _, out, _ = maple("models")
    assert "some/model" in out and "some/words" not in out
    assert maple("models", "clear", "--all")[1] == "removed 0, 0 B\n"
    assert maple("models", "clear", "some/model")[1].startswith("removed 1, 8.92 MB")
    assert not hub_module.folder_of(hub_module.HubName("some/model")).exists()


def test_doctor(maple, monkeypatch):
    code, out, _ = maple("doctor")
    assert code == 0 and "mlx backend      cpu" in out and "default dtype    float32" in out
    found = json.loads(maple("doctor", "--json")[1])
    assert found["mlx_backend"] == "cpu" and isinstance(found["advice"], list)
    assert any("tens of seconds" in line for line in found["advice"])
    monkeypatch.setattr("mlx_maple.cli.doctor._OPENBLAS", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    Path("file").write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(Path("file/cache").absolute()))
    out = maple("doctor")[1]
    assert "the reference BLAS (slow)" in out and "libopenblas0-pthread" in out
    assert "g++ was not found" in out and "cannot be written" in out


def test_doctor_says_which_kernels_are_used_and_why(maple, monkeypatch):
    found = json.loads(maple("doctor", "--json")[1])
    assert found["kernels"] == "the CPU backend takes no kernels: MLX's operations"
    assert found["compile"].startswith("mx.compile")
    engine = "mlx_maple.engine"
    monkeypatch.setattr(f"{engine}.attention.running_backend", lambda: "cuda")
    monkeypatch.setattr(f"{engine}.kernels.kernels_for", lambda *on: (None, f"no kernels: {on}"))
    monkeypatch.setattr(f"{engine}.compiled.compile_works", lambda on: (False, f"differs on {on}"))
    found = json.loads(maple("doctor", "--json")[1])
    assert found["kernels"] == "no kernels: ('cuda', mlx.core.float32)"
    assert found["compile"] == "differs on cuda"


@pytest.mark.skipif(_OPENBLAS is None, reason="no OpenBLAS here")
def test_doctor_names_the_processor_that_openblas_has_kernels_for(maple, monkeypatch):
    monkeypatch.setattr("mlx_maple._openblas.kernels", lambda library: "Sapphire")
    assert f"{_OPENBLAS} (Sapphire kernels)" in maple("doctor")[1]
    monkeypatch.setattr("mlx_maple._openblas.kernels", lambda library: "")
    assert "kernels)" not in maple("doctor")[1]


# Quantised folders and plans ---------------------------------------------------------------------


def test_convert_to_quantised_weights(maple):
    source = tiny_model.folder() / CKPT
    assert maple("convert", source, "plain", "--quiet")[0] == 0
    code, out, _ = maple("convert", source, "a", "--quantize", 4, "--quiet")
    assert code == 0 and out.startswith("a: maple layout") and "4 bits" in out
    sizes = [Path(name, "unet.safetensors").stat().st_size for name in ("a", "plain")]
    assert sizes[0] < 0.4 * sizes[1]
    assert json.loads(Path("a/config.json").read_text())["quantization"] == {
        "bits": 4,
        "components": ["text_encoder", "unet"],
    }
    code, out, _ = maple("inspect", "a", "--json")
    found = json.loads(out)["components"]
    assert [found[part]["bits"] for part in ("text_encoder", "unet", "vae")] == [4, 4, None]
    plain = json.loads(maple("inspect", "plain", "--json")[1])["components"]
    assert found["unet"]["parameters"] == plain["unet"]["parameters"]
    assert "4-bit" in maple("inspect", "a")[1]
    assert maple("generate", "a leaf", "-m", "a", "-s", 1, "-W", 64, "-H", 64, "--quiet")[0] == 0


def test_only_maple_folders_hold_quantised_weights(maple):
    source = tiny_model.folder() / CKPT
    code, _, err = maple("convert", source, "a", "--quantize", 4, "--to", "diffusers")
    assert code == 2 and "maple folders" in err
    assert maple("convert", source, "a", "--quantize", 3)[0] == 2
    assert not Path("a").exists()


def test_a_plan(maple):
    source = tiny_model.folder() / CKPT
    code, out, _ = maple("doctor", "--plan", "-m", source, "-W", 64, "-H", 64)
    assert code == 0 and "at most" in out and "with --low-memory:" in out
    options = ("doctor", "--plan", "-m", source, "-W", 64, "-H", 64, "--json")
    plain = json.loads(maple(*options)[1])
    little = json.loads(maple(*options, "--low-memory", "--quantize", 4)[1])
    assert little["peak"] < plain["peak"] and little["bits"] == 4
    assert [phase["name"] for phase in plain["phases"]] == ["text", "step", "decode"]
    assert plain["peak"] == max(p["weights"] + p["working"] for p in plain["phases"])
    from_picture = json.loads(maple(*options, "--image")[1])
    assert [p["name"] for p in from_picture["phases"]] == ["text", "encode", "step", "decode"]


@pytest.mark.parametrize(
    "wrong", [("-W", 7), ("-H", 0), ("-W", 9000), ("--count", 0), ("--count", -1)]
)
def test_a_plan_of_no_picture_is_wrong_usage(maple, wrong):
    source = tiny_model.folder() / CKPT
    code, out, err = maple("doctor", "--plan", "-m", source, *wrong)
    assert code == 2 and out == "" and err.count("\n") == 1 and str(wrong[1]) in err


def test_an_end_for_want_of_memory_says_what_each_part_takes(maple, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr("mlx_maple.drawing.phases.decode", fail)
    source = tiny_model.folder() / CKPT
    options = ("-m", source, "-s", 1, "-W", 256, "-H", 256, "--quiet")
    code, _, err = maple("generate", "a leaf", *options)
    assert code == 4 and err.count("\n") == 1
    for words in ("out of memory drawing 256x256", "--low-memory (", "UNet", "decoding", "at most"):
        assert words in err, words
