"""The embedded model with a LoRA and a word that were trained for it: what is seen in pictures."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from interleaved import in_turn
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import mlx_maple as maple
from maple_convert.errors import UnreadableFile, UnsupportedCheckpoint
from maple_convert.layouts import LAYOUTS
from mlx_maple import images
from mlx_maple.cli import main
from mlx_maple.engine import attention, compiled, prepare
from mlx_maple.engine.prepare import PreparedUNet

DATA = Path(__file__).resolve().parent.parent / "data"
STYLE, WORD = DATA / "adapters" / "blueprint.safetensors", DATA / "adapters" / "noctia.safetensors"
TINY = DATA / "tiny-model"
SEEN = {"sampler": "lcm", "steps": 2, "guidance_scale": 1, "seed": 7}
QUICK = {**SEEN, "steps": 1, "width": 64, "height": 64}
LEAF = "a maple leaf"

# What is seen, with the model that ships -------------------------------------------------------


def corner(result):
    """Mean colour of a corner, 0 to 255."""
    return np.asarray(result.images[0])[:12, :12].mean((0, 1))


def middle(result):
    return np.asarray(result.images[0])[48:80, 48:80].mean((0, 1))


def is_blue(colour):
    red, _, blue = colour
    return blue > 120 and red < 90


def test_the_style_and_the_word_are_seen():
    """A leaf on white; light on blue with the LoRA; teal on black by the word's name."""
    sd = maple.load(embeddings=[WORD])
    assert corner(sd(LEAF, **SEEN)).min() > 220
    assert is_blue(corner(sd(LEAF, loras=[STYLE], **SEEN)))
    night = sd(f"{LEAF}, Noctia", **SEEN)
    assert corner(night).max() < 60
    red, green, blue = middle(night)
    assert min(green, blue) > red + 30
    without = maple.load()(f"{LEAF}, noctia", **SEEN)  # it is a word like others
    assert corner(without).min() > 150


# How it comes and goes, with a tiny model ------------------------------------------------------


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of every kind of layer for the tiny model: UNet, text encoder, convolutions."""
    configs = json.loads((TINY / "config.json").read_text())["components"]
    generator = np.random.default_rng(1)
    tensors = {}
    for part, spelling, prefix in (
        ("unet", "diffusers", "lora_unet_"),
        ("text_encoder", "transformers", "lora_te_"),
    ):
        for row in LAYOUTS[part].rows(configs[part], spelling):
            shape = row.published_shape
            if len(shape) < 2 or row.native.startswith("embeddings."):
                continue
            name = prefix + row.published.removesuffix(".weight").replace(".", "_")
            inputs = int(np.prod(shape[1:]))
            down = generator.standard_normal((2, *shape[1:])) / inputs**0.5
            up = 0.2 * generator.standard_normal((shape[0], 2, *(1 for _ in shape[2:])))
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    path = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    save_file({key: value.astype(np.float32) for key, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def word(tmp_path_factory):
    path = tmp_path_factory.mktemp("word") / "noctia.safetensors"
    vectors = np.random.default_rng(2).standard_normal((2, 32)).astype(np.float32)
    save_file({"emb_params": vectors}, path)
    return path


@pytest.fixture(scope="module")
def sd(word):
    return maple.load(TINY, embeddings=[word])


@pytest.fixture(scope="module")
def plain(sd):
    return sd(LEAF, **QUICK)


def as_on_a_gpu(monkeypatch):
    """What is loaded is made ready as where there is a GPU, without its kernels."""
    for module in (attention, compiled, prepare):
        monkeypatch.setattr(module, "running_backend", lambda: "metal", raising=False)
    monkeypatch.setenv("MAPLE_KERNELS", "0")


def parameters(module):
    return {name: np.array(value) for name, value in tree_flatten(module.parameters())}


def test_removing_it_brings_the_model_back_bit_for_bit(sd, lora):
    plain = sd(LEAF, **QUICK)
    before = {part: parameters(getattr(sd, part)) for part in ("unet", "text_encoder")}
    styled = sd(LEAF, loras=[lora], **QUICK)
    for part, weights in before.items():
        now = parameters(getattr(sd, part))
        matrices = [name for name, value in weights.items() if value.ndim > 1]
        changed = [name for name in matrices if not np.array_equal(now[name], weights[name])]
        assert set(matrices) - set(changed) <= {
            "embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
        }
    assert not np.allclose(styled.latents, plain.latents, atol=0.05)
    assert styled.settings[0].loras == "ink:1" and plain.settings[0].loras is None
    again = sd(LEAF, **QUICK)
    assert np.array_equal(again.latents, plain.latents)
    for part, weights in before.items():
        now = parameters(getattr(sd, part))
        assert all(np.array_equal(now[name], value) for name, value in weights.items())


def test_each_network_has_a_strength_of_its_own(sd, lora):
    latents = {
        weights: sd(LEAF, loras=[f"{lora}:{weights}"], **QUICK).latents
        for weights in ("unet=1,te=0", "unet=0,te=1", "1", "unet=0,te=0")
    }
    assert len({value.tobytes() for value in latents.values()}) == 4
    assert np.array_equal(latents["unet=0,te=0"], sd(LEAF, **QUICK).latents)


def test_an_unchanged_choice_reads_nothing_anew(sd, lora):
    sd(LEAF, loras=[lora], **QUICK)
    networks = sd.unet, sd.text_encoder
    sd(LEAF, loras=[lora], **QUICK)
    assert (sd.unet, sd.text_encoder) == networks
    sd(LEAF, loras=[f"{lora}:unet=1,te=0.5"], **QUICK)  # another text encoder, the same UNet
    assert sd.unet is networks[0] and sd.text_encoder is not networks[1]


@pytest.mark.parametrize("is_ready", [False, True], ids=["as-read", "made-ready"])
def test_drawings_in_turn_have_each_its_own(lora, word, monkeypatch, is_ready):
    """Bit for bit those alone, whichever began last, and with forms of their own beside."""
    if is_ready:
        as_on_a_gpu(monkeypatch)
    model = maple.load(TINY, embeddings=[word], dtype="float32", compile=False)
    # Between the picture's encoding and the first step the others have a turn.
    steps = {**QUICK, "steps": 3, "image": np.full((64, 64, 3), 90, np.uint8)}
    asked = (
        {"prompt": LEAF, **steps},
        {"prompt": LEAF, "loras": [lora], "tile": "x", **steps},
        {"prompt": f"{LEAF}, noctia", "loras": [f"{lora}:0.5"], **steps, "steps": 4},
    )
    alone = [model(**each) for each in asked]
    for found, expected in zip(
        in_turn(*(model.generate(**each) for each in asked)), alone, strict=True
    ):
        assert np.array_equal(found.latents, expected.latents)
        assert found.notes == expected.notes
    assert np.array_equal(model(**asked[0]).latents, alone[0].latents)  # nothing is left behind
    assert not np.allclose(alone[1].latents, alone[2].latents, atol=0.05)  # the control
    assert model.worn_by is None  # nor held


def test_two_loras_add_up(sd, lora, tmp_path):
    """Half of it twice is the whole of it, within rounding."""
    other = tmp_path / "again.safetensors"
    save_file(load_file(lora), other)
    whole = sd(LEAF, loras=[lora], **QUICK)
    halves = sd(LEAF, loras=[f"{lora}:0.5", (other, 0.5)], **QUICK)
    assert np.allclose(halves.latents, whole.latents, atol=1e-3)
    assert halves.settings[0].loras == "ink:0.5; again:0.5"


def test_a_lora_of_the_prompt_is_found_in_the_folders(sd, lora, tmp_path, monkeypatch):
    (tmp_path / "Lora").mkdir()
    os.symlink(lora, tmp_path / "Lora" / "Blue ink.safetensors")
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    said = sd(f"{LEAF} <lora:Blue ink:0.8>", **QUICK)
    given = sd(LEAF, loras=[f"{lora}:0.8"], **QUICK)
    assert np.array_equal(said.latents, given.latents)
    assert said.settings[0].loras is None  # the prompt says it


def test_a_model_loaded_with_a_lora_has_it_in_every_drawing(sd, lora, plain):
    loaded = maple.load(TINY, loras=[f"{lora}:0.8"])
    mine = loaded(LEAF, **QUICK)
    assert np.array_equal(mine.latents, sd(LEAF, loras=[(lora, 0.8)], **QUICK).latents)
    assert mine.settings[0].loras == "ink:0.8"
    assert np.array_equal(loaded(LEAF, loras=[], **QUICK).latents, plain.latents)
    assert np.array_equal(loaded(LEAF, **QUICK).latents, mine.latents)


def test_a_file_that_has_changed_is_read_again(sd, lora, tmp_path):
    path = tmp_path / "changing.safetensors"
    save_file(load_file(lora), path)
    one = sd(LEAF, loras=[path], **QUICK)
    save_file({key: 2 * value for key, value in load_file(lora).items()}, path)
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(sd(LEAF, loras=[path], **QUICK).latents, one.latents)


def test_in_low_memory_mode_it_is_the_same(sd, lora, word):
    low = maple.load(TINY, low_memory=True, embeddings=[word])
    for loras, text in (([lora], LEAF), ([], LEAF), ([lora], f"{LEAF}, noctia")):
        mine = sd(text, loras=loras, **QUICK)
        assert np.allclose(low(text, loras=loras, **QUICK).latents, mine.latents, atol=1e-4)


def test_networks_made_ready_for_a_gpu_carry_it_and_lose_it(sd, lora, monkeypatch):
    """Their weights are joined and rearranged: the difference goes in before, and out with them."""
    as_on_a_gpu(monkeypatch)
    ready = maple.load(TINY, dtype="float32", compile=False)
    plain = ready(LEAF, **QUICK)
    styled = ready(LEAF, loras=[lora], **QUICK)
    assert type(ready.unet) is PreparedUNet
    assert np.array_equal(ready(LEAF, **QUICK).latents, plain.latents)
    monkeypatch.undo()
    assert np.allclose(styled.latents, sd(LEAF, loras=[lora], **QUICK).latents, atol=5e-3)
    assert not np.allclose(styled.latents, plain.latents, atol=5e-2)


def test_quantised_weights_are_changed_before_they_are_quantised(sd, lora, plain):
    small = maple.load(TINY, quantize=8)
    before = small(LEAF, **QUICK)
    styled = small(LEAF, loras=[lora], **QUICK)
    whole = sd(LEAF, loras=[lora], **QUICK)
    assert small.info.components["unet"].bits == 8
    error, change = (np.abs(styled.latents - x.latents).mean() for x in (whole, before))
    assert error < change / 3
    assert np.array_equal(small(LEAF, **QUICK).latents, before.latents)


def test_weights_that_are_stored_quantised_take_it_too(sd, lora, tmp_path):
    assert main(["convert", str(TINY), str(tmp_path / "q"), "--quantize", "8"]) == 0
    stored = maple.load(tmp_path / "q")
    before = stored(LEAF, **QUICK)
    styled = stored(LEAF, loras=[lora], **QUICK)
    whole = sd(LEAF, loras=[lora], **QUICK)
    error, change = (np.abs(styled.latents - x.latents).mean() for x in (whole, before))
    assert error < change / 3
    assert np.array_equal(stored(LEAF, **QUICK).latents, before.latents)


# Words ----------------------------------------------------------------------------------------


def test_the_word_changes_the_prompts_that_have_it_and_no_others(sd, plain):
    assert not np.array_equal(sd(f"{LEAF}, noctia", **QUICK).latents, plain.latents)
    assert np.array_equal(sd(LEAF, **QUICK).latents, plain.latents)
    rows = sd.text_encoder.embeddings.token_embedding.weight.shape[0]
    assert rows == sd.configs["text_encoder"].vocab_size


def test_the_word_works_in_negative_prompts(sd):
    more = {**QUICK, "guidance_scale": 3}
    drawn = [sd(LEAF, negative_prompt=text, **more).latents for text in ("", "noctia", "noctis")]
    assert len({latents.tobytes() for latents in drawn}) == 3


def test_a_word_of_the_folders_needs_no_option(sd, word, tmp_path, monkeypatch):
    (tmp_path / "embeddings").mkdir()
    os.symlink(word, tmp_path / "embeddings" / "night-time.safetensors")
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    found = maple.load(TINY)(f"{LEAF}, night-time", **QUICK)
    assert np.array_equal(found.latents, sd(f"{LEAF}, noctia", **QUICK).latents)


# The hub --------------------------------------------------------------------------------------


def test_a_file_of_the_hub_is_fetched_once(sd, lora, monkeypatch):
    asked = []

    def fetch(name, **options):
        asked.append((str(name), options["local_files_only"]))
        return lora, None, []

    monkeypatch.setattr(maple.loading.hub, "fetch", fetch)
    model = maple.load(TINY, loras=["someone/styles:ink.safetensors:0.8"], local_files_only=True)
    assert asked == [("someone/styles:ink.safetensors", True)]
    mine = model(LEAF, loras=[("someone/styles:ink.safetensors", 0.8)], **QUICK)
    assert len(asked) == 1
    assert np.array_equal(mine.latents, sd(LEAF, loras=[(lora, 0.8)], **QUICK).latents)


# What goes wrong ------------------------------------------------------------------------------


def test_a_lora_that_is_nowhere_is_named(sd):
    with pytest.raises(UnreadableFile) as caught:
        sd(LEAF, loras=["no-such-style:0.5"], **QUICK)
    assert str(caught.value).startswith("no-such-style: no such file, and no LoRA by that name in")
    assert caught.value.exit_code == 1


def test_a_refused_lora_leaves_the_model_as_it_was(sd, plain, word):
    with pytest.raises(UnsupportedCheckpoint, match="is a textual inversion and no LoRA"):
        sd(LEAF, loras=[word], **QUICK)
    for wrong in (["x:101"], [("x", "much")], 5, [None], ["  "]):
        with pytest.raises(ValueError):
            sd(LEAF, loras=wrong, **QUICK)
    assert np.array_equal(sd(LEAF, **QUICK).latents, plain.latents)


def test_a_network_that_was_put_in_by_hand_is_not_replaced(lora):
    model = maple.load(TINY)
    model.unet = model.unet
    with pytest.raises(ValueError, match="was put in by hand"):
        model(LEAF, loras=[lora], **QUICK)


def test_layers_that_do_not_fit_are_told(sd, lora, tmp_path):
    tensors = load_file(lora)
    tensors["lora_unet_nowhere.lora_down.weight"] = np.ones((2, 4), np.float16)
    tensors["lora_unet_nowhere.lora_up.weight"] = np.ones((4, 2), np.float16)
    save_file(tensors, tmp_path / "more.safetensors")
    result = sd(LEAF, loras=[tmp_path / "more.safetensors"], **QUICK)
    (note,) = result.notes
    assert "more.safetensors: 1 of its" in note and "lora_unet_nowhere" in note


# The command ----------------------------------------------------------------------------------

FLAGS = ("--sampler", "lcm", "-s", "1", "-g", "1", "--seed", "7", "-W", "64", "-H", "64", "--json")


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MAPLE_MODEL", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*arguments):
        code = main(["generate", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out.startswith("{") else {}, err

    return run


def test_the_command_draws_with_both_and_draws_it_again(
    draw, sd, lora, word, tmp_path, monkeypatch
):
    options = ("-m", str(TINY), "--lora", f"{lora}:0.5", "--embedding", str(word), "-o", "a.png")
    code, report, err = draw(f"{LEAF}, noctia", *options, *FLAGS)
    assert code == 0, err
    expected = sd(f"{LEAF}, noctia", loras=[f"{lora}:0.5"], **QUICK)
    drawn = images.open_image(report["files"][0])
    assert np.array_equal(np.asarray(drawn.convert("RGB")), np.asarray(expected.images[0]))
    assert report["settings"][0]["loras"] == "ink:0.5"

    again = ("-m", str(TINY), "--from-image", "a.png", "-o", "b.png", "--json")
    code, report, err = draw(*again)
    assert code == 1 and "was drawn with the LoRA ink, which is not in" in err
    for folder, file in (("loras", lora), ("embeddings", word)):
        (tmp_path / "models" / folder).mkdir(parents=True)
        os.symlink(file, tmp_path / "models" / folder / file.name)
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path / "models"))
    code, report, err = draw(*again)
    assert code == 0, err
    picture = images.open_image("b.png")
    assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(expected.images[0]))


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--lora", "nowhere"), 1, "nowhere: no such file, and no LoRA by that name"),
        (("--lora", "ink:1e9"), 2, "a LoRA's weight must be from -100 to 100"),
        (("--lora", str(WORD)), 3, "is a textual inversion and no LoRA: load it with --embedding"),
        (("--lora", str(STYLE)), 3, "is for a model of a text 128 wide; this model is"),
        (("--embedding", "nowhere"), 1, "nowhere: no such file, and no embedding by that name"),
        (("--embedding", str(STYLE)), 3, "is no textual inversion"),
        (("--embedding", str(WORD)), 3, "'noctia' is a word of a model whose text is 128 wide"),
    ],
)
def test_errors_have_their_exit_codes_and_one_line(draw, options, code, reason):
    found, _, err = draw(LEAF, "-m", str(TINY), *options, *FLAGS[:-1])
    assert found == code and reason in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
