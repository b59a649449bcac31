"""`maple generate`, from its arguments to its files."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from PIL import Image

from mlx_maple import images, loading, metadata
from mlx_maple.cli import _machine, _memory, generate, main

SMALL = ["-W", "64", "-H", "64", "-s", "2", "--seed", "7"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and one loaded model for all: loading has tests of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def draw(capsys):
    """Run `maple generate` on the tiny model; the exit code, stdout and stderr."""

    def run(*arguments, model=True, small=True):
        given = ["generate", *map(str, arguments)]
        given += ["-m", str(tiny_model.maple_folder())] if model else []
        code = main(given + (SMALL if small else []))
        return code, *capsys.readouterr()

    return run


def listed():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def opened(path):
    with Image.open(path) as image:
        image.load()
        return image


def pixels(path):
    return np.asarray(opened(path))


def test_a_picture_and_its_name_on_stdout(draw):
    code, out, err = draw("a red leaf, on yellow")
    assert (code, out) == (0, "a-red-leaf-on-yellow-7.png\n")
    assert listed() == ["a-red-leaf-on-yellow-7.png"]
    assert err.startswith("1 picture in ") and "/step" in err
    image = opened(out.strip())
    assert image.size == (64, 64) and image.mode == "RGB"
    assert image.info["parameters"].startswith("a red leaf, on yellow\nSteps: 2, Sampler: DPM++ 2M")


@pytest.mark.parametrize("more", [[], ["--low-memory"]], ids=["whole", "low-memory"])
def test_a_taesd_decodes(draw, more):
    path = tiny_model.folder() / "taesd.safetensors"
    code, out, _ = draw("x", "--vae", path, "--json", *more)
    assert code == 0 and json.loads(out)["settings"][0]["vae"] == "taesd"


def test_json_is_one_object_with_everything(draw):
    code, out, err = draw("x", "--json", "--count", 2, "-o", "{index}.webp", "--quiet")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["files"] == ["1.webp", "2.webp"] == listed()
    assert [settings["seed"] for settings in report["settings"]] == [7, 8]
    assert {"load", "text", "seconds_per_step", "decode", "total"} <= report["timings"].keys()
    assert all(value > 0 for value in report["timings"].values())
    assert report["peak_memory"]["resident"] > 1e7 and report["peak_memory"]["mlx"] > 1e6
    assert report["model"]["family"] == "sd1" and report["model"]["parameters"] > 1e6
    assert report["notes"] == []


def test_every_option_reaches_the_picture(draw):
    code, out, _ = draw(
        *("x", "-n", "y", "-W", 72, "-H", 64, "-s", 3, "-g", 2.5, "--seed", 9),
        *("--sampler", "ddim", "--schedule", "trailing", "--eta", 0.5, "--noise", "nvidia"),
        *("--clip-skip", 2, "--variation-seed", 4, "--variation-strength", 0.25),
        *("--image", tiny_model.folder() / "photo.png", "--strength", 0.9, "--fit", "crop"),
        *("--mask", tiny_model.folder() / "mask.png", "--mask-blur", 2, "--dtype", "bfloat16"),
        *("--vae", tiny_model.folder() / "vae.safetensors", "-o", "x.png"),
        small=False,
    )
    assert code == 0
    said = images.read_settings(out.strip()).settings
    assert said.prompt == "x" and said.negative_prompt == "y"
    assert (said.width, said.height, said.steps, said.guidance_scale) == (72, 64, 3, 2.5)
    assert (said.seed, said.sampler, said.schedule, said.eta) == (9, "ddim", "trailing", 0.5)
    assert (said.noise, said.clip_skip, said.strength, said.fit) == ("nvidia", 2, 0.9, "crop")
    assert (said.variation_seed, said.variation_strength, said.mask_blur) == (4, 0.25, 2)
    assert (said.dtype, said.vae) == ("bfloat16", "vae")


def test_pictures_do_not_overwrite_one_another(draw):
    assert [draw("x", "-o", "a.png")[1] for _ in range(2)] == ["a.png\n", "a-2.png\n"]
    assert draw("x", "-o", "a.png", "--overwrite")[1] == "a.png\n"
    assert draw("x", "-o", "a.png", "--count", 2)[1] == "a-3.png\na-4.png\n"
    assert draw("x", "-o", "sub/folder/")[1] == "sub/folder/x-7.png\n"
    assert len(listed()) == 5


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_drawing_again_what_a_picture_says(draw, ending):
    options = ("--sampler", "euler_a", "--noise", "nvidia", "--clip-skip", 2, "-n", "z", "-g", 3)
    assert draw("a red leaf", *options, "-o", f"a.{ending}")[0] == 0
    code, out, err = draw("--from-image", f"a.{ending}", "-o", f"b.{ending}", small=False)
    assert (code, out) == (0, f"b.{ending}\n") and "note:" not in err
    assert np.array_equal(pixels(f"a.{ending}"), pixels(f"b.{ending}"))
    assert images.read_settings(f"a.{ending}") == images.read_settings(f"b.{ending}")


def test_flags_go_over_what_a_picture_says(draw):
    draw("a red leaf", "-o", "a.png")
    code, out, _ = draw("--from-image", "a.png", "--seed", 8, "a green leaf", small=False)
    said = images.read_settings(out.strip()).settings
    assert code == 0 and (said.prompt, said.seed, said.steps) == ("a green leaf", 8, 2)
    assert not np.array_equal(pixels("a.png"), pixels(out.strip()))


def test_what_cannot_be_brought_back_is_said(draw):
    image, info = Image.new("RGB", (64, 64)), images.PngImagePlugin.PngInfo()
    text = "a <lora:fox:1> leaf\nSteps: 2, Sampler: DPM++ SDE Karras, CFG scale: 7, Seed: 5, "
    info.add_text("parameters", text + "Size: 64x64, Model hash: 0123456789, Model: other")
    image.save("theirs.png", pnginfo=info)
    code, out, err = draw("--from-image", "theirs.png", "--lora", "none", small=False)
    assert code == 0 and out == "a-leaf-5.png\n", err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert any("the LoRA fox, which is not in $MAPLE_MODELS: left out" in note for note in notes)
    assert any("torchsde" in note for note in notes)
    assert any("was drawn with the model other 0123456789" in note for note in notes)


@pytest.mark.parametrize(
    ("prompt", "loras"), [("a <lora:fox:1> leaf", None), ("a leaf", "fox:0.8; fox:0.2")]
)
def test_a_lora_that_is_not_here_is_named(draw, monkeypatch, tmp_path, prompt, loras):
    """Whether the prompt or the settings name it, and before a model is loaded."""
    said = {"width": 64, "height": 64, "steps": 1, "seed": 5, "loras": loras}
    settings = metadata.Settings(prompt=prompt, **said)
    images.save_image(Image.new("RGB", (64, 64)), Path("theirs.png"), settings)
    (folder := tmp_path / "shelf" / "Lora").mkdir(parents=True)
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path / "shelf"))
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load", None)
        code, out, err = draw("--from-image", "theirs.png", small=False)
    assert (code, out) == (1, "") and err.count("\n") == 1
    for words in ("theirs.png", "the LoRA fox,", str(folder), "--lora none"):
        assert words in err, words
    assert draw("--from-image", "theirs.png", "--lora", "none", small=False)[0] == 0
    assert draw("--from-image", "theirs.png", "a fox", small=False)[0] == (
        0 if loras is None else 1
    )
    code, _, err = draw("--from-image", "theirs.png", "--lora", "other", small=False)
    assert code == 1 and "no LoRA by that name" in err and "other" in err


def test_an_upscaler_that_is_not_here_is_replaced(draw):
    image, info = Image.new("RGB", (64, 64)), images.PngImagePlugin.PngInfo()
    text = "a leaf\nSteps: 1, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU, "
    more = "Denoising strength: 0.5, Hires upscale: 1.5, Hires steps: 1, Hires upscaler: 4x-Fine"
    info.add_text("parameters", text + more)
    image.save("theirs.png", pnginfo=info)
    code, out, err = draw("--from-image", "theirs.png", small=False)
    assert code == 0 and images.open_image(out.strip()).size == (96, 96), err
    assert "was enlarged by 4x-Fine, which is not in $MAPLE_MODELS: here by lanczos" in err
    code, _, err = draw("x", "--hires-scale", 1.5, "--hires-upscaler", "4x-Fine")
    assert code == 1 and "no network that enlarges by that name" in err


def test_a_file_of_prompts(draw):
    lines = ["first", "", '{"prompt": "second", "seed": 3, "width": 72, "steps": 1}', "third"]
    Path("prompts.txt").write_text("\n".join(lines))
    code, out, _ = draw("--prompts", "prompts.txt", "-o", "{index}-{prompt}-{seed}.png")
    assert code == 0
    assert out.split() == ["1-first-7.png", "2-second-3.png", "3-third-7.png"]
    assert opened("2-second-3.png").size == (72, 64)


def test_prompts_from_stdin(draw, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("only\n"))
    assert draw("--prompts", "-")[1] == "only-7.png\n"


def test_latents_go_out_and_noise_comes_in(draw):
    noise = np.random.default_rng(0).standard_normal((2, 8, 9, 4)).astype(np.float32)
    np.save("noise.npy", noise)
    arguments = ("x", "--latents", "noise.npy", "-s", 2, "--seed", 1, "-o", "{seed}.png")
    code, out, _ = draw(*arguments, "--save-latents", "out/final.npy", small=False)
    assert code == 0 and out.split() == ["1.png", "2.png"]
    assert opened("1.png").size == (72, 64)
    final = np.load("out/final.npy")
    assert final.shape == noise.shape and final.dtype == np.float32
    result = loading.load(tiny_model.maple_folder())("x", latents=noise, count=2, steps=2, seed=1,
                                                     width=72, height=64)  # fmt: skip
    assert np.array_equal(result.latents, final)


@pytest.mark.parametrize("preview", ["linear", "taesd"])
def test_previews_lie_beside_the_picture_while_it_is_drawn(draw, monkeypatch, preview):
    seen = []
    real = images.save_image

    def save(image, path, *rest, **options):
        seen.append((Path(path).name, image.size))
        return real(image, path, *rest, **options)

    monkeypatch.setattr(generate, "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(images, "save_image", save)
    taesd = tiny_model.folder() / "taesd.safetensors"
    code, _, _ = draw("x", "--preview", preview, "--taesd", taesd, "-o", "a.png")
    assert code == 0
    assert seen[:2] == [("a.preview.png", (64, 64))] * 2
    assert listed() == ["a.png"]


def test_a_preview_that_cannot_be_drawn(draw):
    code, out, err = draw("x", "--preview", "taesd")
    assert (code, out) == (2, "") and "needs a TAESD" in err


def test_progress_that_is_asked_for(draw):
    _, _, err = draw("x", "--progress")
    assert "drawing  100%  2/2" in err and "/step" in err and "left" in err


# Errors -------------------------------------------------------------------------------------------


def write(name, data):
    Path(name).write_bytes(data)
    return name


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "give a PROMPT"),
        (["x", "-s", "0"], 2, "steps must be"),
        (["x", "-W", "100000"], 2, "width must be"),
        (["x", "-W", "65"], 2, "multiple of 8"),
        (["x", "-g", "nan"], 2, "guidance_scale must be"),
        (["x", "--sampler", "dpm_9"], 2, "unknown sampler 'dpm_9': choose from ddim"),
        (["x", "--schedule", "odd"], 2, "unknown schedule 'odd': choose from"),
        (["x", "--sampler", "ddim", "--schedule", "karras"], 2, "ddim has no 'karras'"),
        (["x", "--noise", "white"], 2, "unknown noise"),
        (["x", "--count", "0"], 2, "count must be"),
        (["x", "--clip-skip", "3"], 2, "clip_skip must be from 1 to 2"),
        (["(x:2000)"], 2, "1000 is the most"),
        (["x", "--mask", "nothing.png"], 2, "--mask needs --image"),
        (["x", "--image", "nothing.png"], 1, "nothing.png: No such file"),
        (["x", "--latents", "nothing.npy"], 1, "nothing.npy: No such file"),
        (["x", "--from-image", "nothing.png"], 1, "nothing.png: No such file"),
        (["--prompts", "nothing.txt"], 1, "nothing.txt: No such file"),
        (["x", "--prompts", "nothing.txt"], 2, "does not go with"),
        (["x", "-o", "a.bmp"], 2, "not .bmp"),
        (["x", "-o", "/proc/nothing/a.png"], 1, "/proc"),
        (["x", "--save-latents", "a.txt"], 2, "name it .npy"),
        (["x", "--vae", "nothing.ckpt"], 1, "nothing.ckpt: no such file or folder"),
        (["x", "--variant", "odd"], 3, "variant"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_their_code(draw, arguments, code, words):
    given = [word for word in arguments if word != "x"]
    found, out, err = draw(*(["x"] if "x" in arguments else []), *SMALL, *given, small=False)
    assert (found, out) == (code, "") and words in err and err.count("\n") == 1, err
    assert listed() == []


def npy(shape, data=b"", dtype="<f4"):
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("data", "option", "words"),
    [
        (b"<html>", "--image", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "--image", "picture"),
        (b"<html>", "--from-image", "not a picture"),
        (b"\x93NUMPY\1\0\xff\xff{", "--latents", "not a .npy file"),
        (b"", "--latents", "not a .npy file"),
        (npy("(9, 8, 8, 4)"), "--latents", "not a .npy file"),
        (npy("(2, 99999999, 99999999, 4)"), "--latents", "not a .npy file"),
        (npy("(1, 4)", bytes(16)), "--latents", "not (count, height/8, width/8, 4) floats"),
        (npy("(1, 1, 1, 4)", bytes(32), "|O"), "--latents", "not a .npy file"),
        (b"cos\nsystem\n(S'id'\ntR.", "--latents", "not a .npy file"),
        (b"\xff\xfe\xfa", "--prompts", "not a UTF-8 text"),
        (b"\n \n", "--prompts", "no prompt in it"),
        (b'{"prompt": "x", "stepz": 3}', "--prompts", "line 1: no setting 'stepz'; there are"),
        (b'{"prompt": 3}', "--prompts", "line 1: no prompt"),
        (b'{"prompt": "x"', "--prompts", "line 1: not a JSON object"),
        (b"a\n" + b"{" * 99999, "--prompts", "line 2: not a JSON object"),
        (b'a\n{"prompt": "x", "steps": 1e9}', "--prompts", "line 2: steps must be"),
        (b'{"prompt": "x", "steps": "3"}', "--prompts", "line 1: steps must be"),
        (b'{"prompt": "x", "sampler": []}', "--prompts", "line 1: "),
        (b'{"prompt": "x", "image": 3}', "--prompts", "line 1: image must be"),
    ],
)
def test_files_that_cannot_be_used_end_in_3(draw, data, option, words):
    prompt = [] if option == "--prompts" else ["x"]
    code, out, err = draw(*prompt, option, write("file", data))
    assert (code, out) == (3, "") and words in err and err.count("\n") == 1, err
    assert listed() == ["file"]


def test_settings_in_a_picture_that_cannot_be_true(draw):
    image, info = Image.new("RGB", (8, 8)), images.PngImagePlugin.PngInfo()
    info.add_text("mlx-maple", '{"prompt": "x", "sampler": "dpm_9"}')
    image.save("odd.png", pnginfo=info)
    code, _, err = draw("--from-image", "odd.png")
    assert code == 3 and "odd.png: unknown sampler 'dpm_9'" in err
    image.save("plain.png")
    code, _, err = draw("--from-image", "plain.png")
    assert code == 3 and "plain.png: no settings are written in this picture" in err


def test_without_a_model_the_line_says_how_to_name_one(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "DEMO", tmp_path)
    code, _, err = draw("x", model=False)
    assert code == 2 and "no model is named" in err
    monkeypatch.setenv("MAPLE_MODEL", str(tiny_model.maple_folder()))
    assert draw("x", model=False)[0] == 0


def test_an_error_after_some_pictures_tells_of_them(draw, monkeypatch):
    real, left = images.save_image, [1]

    def fail_at_the_second(image, path, *rest):
        if not left:
            raise OSError(28, "No space left on device", str(path))
        left.pop()
        return real(image, path, *rest)

    monkeypatch.setattr(images, "save_image", fail_at_the_second)
    code, out, err = draw("x", "--count", 2, "--json", "-o", "{seed}.png")
    report = json.loads(out)
    assert code == 1 and "No space left on device" in err and err.count("\n") == 1
    assert report["files"] == ["7.png"] == listed()
    assert report["exit_code"] == 1 and "No space" in report["error"]


# Memory -------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_fit_is_refused_with_a_size_that_fits(draw, monkeypatch):
    monkeypatch.setattr(_machine, "free_memory", lambda: 2e9)
    code, out, err = draw("x", "-W", 4096, "-H", 2048, small=False)
    assert (code, out) == (4, "") and err.count("\n") == 1
    assert "4096x2048 needs about" in err and "2 GB are free: -W 768 -H 384 would fit" in err
    assert draw("x")[0] == 0


def test_the_demand_of_sd15_is_about_what_was_measured():
    demand = _memory.Demand(heads=8, channels=256, itemsize=4, batch=2)
    assert demand.bytes(512, 512) == pytest.approx(3.6e9, rel=0.1)  # the decoder
    assert demand.bytes(1024, 1024) == pytest.approx(21.5e9, rel=0.05)  # the scores
    width, height = demand.largest(1024, 512, 4e9)
    assert width / height == pytest.approx(2, rel=0.05)
    assert demand.bytes(width, height) <= 4e9
    assert demand.largest(64, 64, 1.0) is None


def test_free_memory_is_found_on_linux():
    free = _machine.free_memory()
    if sys.platform == "linux":
        assert free is not None and 1e6 < free < 1e14


def test_an_allocation_that_fails_says_what_would_fit(draw, monkeypatch):
    def fail(sd, latents, notes):
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr("mlx_maple.drawing.phases.decode", fail)
    code, _, err = draw("x", "--count", 2, "-W", 256)
    assert code == 4 and err.count("\n") == 1
    assert "out of memory drawing" in err and " or --dtype float16; weights: " in err
    assert "try --low-memory (" in err  # on the CPU pictures are drawn one by one, whatever --count


# As a process -------------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, "-m", "mlx_maple", "generate", "-W", "64", "-H", "64"]
    command += ["-m", str(tiny_model.maple_folder()), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_is_finished_and_leaves_nothing_else(number, here):
    Path("prompts.txt").write_text('{"prompt": "a", "steps": 1}\n{"prompt": "b", "steps": 1000}\n')
    options = ("--seed", "1", "--json", "--preview", "linear")
    process = start("--prompts", "prompts.txt", *options)
    wait_for(lambda: "a-1.png" in listed() and any("preview" in n for n in listed()), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "maple: cancelled; 1 finished before\n"
    report = json.loads(out)
    assert report["files"] == ["a-1.png"] and report["exit_code"] == 130
    assert listed() == ["a-1.png", "prompts.txt"]


def test_killing_it_leaves_no_half_picture(here):
    process = start("x", "-s", "1000", "--preview", "linear")
    wait_for(listed, process)
    process.kill()
    process.communicate(timeout=60)
    for name in listed():
        if not Path(name).name.startswith("."):
            opened(name)  # a preview, whole


def test_memory_that_the_system_refuses_ends_in_4(here):
    command = (
        f"ulimit -v 6000000; exec {sys.executable} -m mlx_maple generate x -s 1 "
        f"-m {tiny_model.maple_folder()} -W 2048 -H 2048"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1 and "would fit" in done.stderr


def test_a_quantised_picture_is_drawn_again_as_it_was(draw):
    assert draw("x", "--quantize", 4, "-o", "a.png")[0] == 0
    code, _, err = draw("--from-image", "a.png", "-o", "b.png")
    assert code == 0 and "another picture" not in err
    assert np.array_equal(np.array(Image.open("a.png")), np.array(Image.open("b.png")))
    code, _, err = draw("--from-image", "a.png", "--quantize", 8, "-o", "c.png")
    assert code == 0 and "was drawn with 4 bits, and this has 8 bits" in err


def test_a_quantised_picture_is_drawn_by_what_there_is(draw):
    """A folder that is stored in other bits is not asked for the picture's."""
    assert draw("x", "--quantize", 4, "-o", "a.png")[0] == 0
    assert main(["convert", str(tiny_model.maple_folder()), "eight", "--quantize", "8"]) == 0
    code, _, err = draw("--from-image", "a.png", "-m", "eight", "-o", "b.png", model=False)
    assert code == 0 and "was drawn with 4 bits, and this has 8 bits" in err
    assert draw("x", "-m", "eight", "--quantize", 4, model=False)[0] == 3
