"""What is given to a drawing beside the prompt: ControlNets, more channels, a TAESD to decode.

With a tiny random model: that what is given counts, where and as much as it should. What it must
come to is compared with the reference in tests/parity.
"""

import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from PIL import Image
from safetensors.numpy import load_file, save_file

from maple_convert.errors import ConvertError
from maple_convert.layouts import LAYOUTS
from mlx_maple import images, load
from mlx_maple.control import input_channels, read_hint
from mlx_maple.drawing import denoise
from mlx_maple.drawing.masked_area import masked_area
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.prepare import PreparedUNet, Recipe, prepare_unet
from mlx_maple.loading import NoModel
from mlx_maple.models import TAESD, UNet, UNetConfig
from mlx_maple.pipeline import StableDiffusion

SMALL = {"width": 64, "height": 64, "seed": 1}


def test_a_taesd_stands_in_for_the_autoencoder():
    folder = tiny_model.folder()
    taesd = folder / "taesd.safetensors"
    sd = load(tiny_model.maple_folder(), vae=taesd, low_memory=True)
    assert isinstance(sd.vae, TAESD)
    result = sd("a", image=images.open_image(folder / "photo.png"), steps=4, strength=0.5, seed=1)
    assert result.images[0].size == (128, 128) and result.settings[0].vae == "taesd"
    drawn = np.array(sd.vae.decode(mx.array(result.latents)))[0]
    assert (np.asarray(result.images[0]) == np.asarray(images.to_image(drawn))).all()


def test_a_taesd_closes_pictures_at_their_edges():
    """The starting noise rolled, and the picture comes out rolled; with edges it does not."""
    sd = load(tiny_model.maple_folder(), vae=tiny_model.folder() / "taesd.safetensors")
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype("f")

    def seam(tile):
        drawn, rolled = (
            np.asarray(sd("a", latents=x, steps=2, tile=tile, **SMALL).images[0], int)
            for x in (noise, np.roll(noise, 4, axis=2))
        )
        return np.abs(np.roll(drawn, 32, axis=1) - rolled).max()

    assert seam("x") <= 1 and seam(None) > 8


# Networks that steer ------------------------------------------------------------------------------


def control_file(path, **changes):
    """A ControlNet for the tiny model, its zero convolutions not zero."""
    settings = {**tiny_model.CONFIGS["controlnet"], **changes}
    random = np.random.default_rng(3)
    save_file(
        {
            f"control_model.{row.published}": random.normal(0, 0.1, row.published_shape).astype("f")
            for row in LAYOUTS["controlnet"].rows(settings, "compvis")
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    path = control_file(tmp_path_factory.mktemp("control") / "edges.safetensors")
    return {
        low_memory: load(tiny_model.maple_folder(), controlnet=path, low_memory=low_memory)
        for low_memory in (False, True)
    }


def test_a_controlnet_steers(steered):
    sd = steered[False]
    assert sd.control_names == {"controlnet": "edges"}
    assert sd.info.components["controlnet"].parameters > 10_000
    photo = images.open_image(tiny_model.folder() / "photo.png")
    arguments = {**SMALL, "steps": 2, "control_image": photo}
    plain = sd("a", steps=2, **SMALL)
    assert plain.notes == ["no control_image: the ControlNet is not used"]
    weak, strong = (sd("a", control_weight=w, **arguments).latents for w in (0, 1))
    assert (weak == plain.latents).all() and np.abs(strong - weak).max() > 1e-3
    other = sd("a", control_preprocess="invert", **arguments).latents
    assert np.abs(other - strong).max() > 1e-4
    said = sd("a", **arguments).settings[0]
    assert said.control == "edges (weight 1, 0 to 1)"
    assert (steered[True]("a", **arguments).latents == strong).all()


def test_a_control_begins_and_ends(steered):
    """A share of the steps: without it they are a plain drawing's, bit for bit."""
    photo = images.open_image(tiny_model.folder() / "photo.png")

    def steps(**more):
        run = steered[False].generate("a", steps=4, sampler="euler", **SMALL, **more)
        return [np.asarray(p.preview()) for p in run if p.stage == "sample"]

    plain, all_of_it = steps(), steps(control_image=photo)
    late = steps(control_image=photo, control_start=0.5)
    early = steps(control_image=photo, control_end=0.5)
    for n in range(4):
        assert (late[n] == plain[n]).all() == (n < 2)
        assert (early[n] == all_of_it[n]).all() == (n < 2)


def test_a_t2i_adapter_steers():
    folder = tiny_model.folder()
    sd = load(
        tiny_model.maple_folder(),
        controlnet=[folder / "adapter.safetensors", folder / "control.safetensors"],
        low_memory=True,
    )
    assert sd.control_names == {"controlnet": "adapter", "controlnet_2": "control"}
    photo = images.open_image(folder / "photo.png")
    arguments = {**SMALL, "steps": 2, "count": 2, "control_image": [photo, photo]}
    found = {
        weights: sd("a", control_weight=list(weights), **arguments).latents
        for weights in ((0, 0), (0.3, 0), (0, 0.3))
    }
    plain = sd("a", steps=2, count=2, **SMALL).latents
    assert (found[0, 0] == plain).all()
    differences = [np.abs(each - plain).max() for each in list(found.values())[1:]]
    assert min(differences) > 1e-3 and len(set(differences)) == len(differences)


def test_an_adapter_of_another_family_is_refused(tmp_path):
    settings = {**tiny_model.CONFIGS["t2i_adapter"], "downscale": 16}
    state = {
        row.published: np.zeros(row.published_shape, "f")
        for row in LAYOUTS["t2i_adapter"].rows(settings, "diffusers")
    }
    save_file(state, tmp_path / "xl.safetensors")
    with pytest.raises(ConvertError, match="on cells of 16 pixels, and this model's"):
        load(tiny_model.maple_folder(), controlnet=tmp_path / "xl.safetensors")


def wide(channels: int, **config):
    """The tiny model's loaded networks with a UNet of more input channels, at random."""
    plain = load(tiny_model.maple_folder())
    mx.random.seed(channels)
    unet = UNet(UNetConfig(**{**vars(plain.unet.config), "in_channels": channels, **config}))
    return StableDiffusion(
        text_encoder=plain.text_encoder,
        unet=unet,
        vae=plain.vae,
        tokenizer=plain.tokenizer,
        noise_schedule=plain.noise_schedule,
        defaults=plain.defaults,
    )


@pytest.mark.parametrize("kind", ["control", "inpainting", "edit", "depth", "told"])
def test_a_network_made_ready_for_a_gpu_is_shown_the_same(kind):
    """With the plain operations, which run anywhere."""
    folder = tiny_model.folder()
    photo, mask = images.open_image(folder / "photo.png"), images.open_image(folder / "mask.png")
    arguments = {**SMALL, "steps": 2, "count": 2, "sampler": "euler"}
    if kind == "control":
        paths = [folder / "adapter.safetensors", folder / "control.safetensors"]
        sd = load(tiny_model.maple_folder(), controlnet=paths)
        arguments |= {"control_image": [photo, photo], "control_weight": 0.3, "control_end": 0.5}
    elif kind == "inpainting":
        sd = wide(9)
        arguments |= {"image": photo, "mask": mask}
    elif kind == "edit":
        sd = wide(8)
        arguments |= {"image": photo, "image_guidance_scale": 2.0}
    elif kind == "depth":
        sd = wide(5)
        arguments |= {"depth_image": photo}
    else:
        sd = wide(4, time_cond_dim=8)
        arguments |= {"guidance_scale": 4.0}
    plain = sd("a", **arguments).latents
    sd.unet = prepare_unet(sd.unet, Recipe("cpu", Plain()))
    ready = sd("a", **arguments).latents
    assert isinstance(sd.unet, PreparedUNet)
    assert np.abs(ready - plain).max() < 2e-3 * np.abs(plain).max()


@pytest.mark.parametrize("kind", ["control", "inpainting", "depth"])
def test_of_a_masked_part_alone_all_that_is_shown_is_the_part(kind, monkeypatch):
    """What is transparent of a depth map is far away, here as of a whole one."""
    across, down = np.meshgrid(np.arange(120), np.arange(96))
    photo = Image.fromarray(np.stack([across, down, across + down], -1).astype(np.uint8))
    mask = Image.new("L", photo.size)
    mask.paste(255, (60, 30, 80, 50))
    depth = photo.convert("RGBA")
    depth.putalpha(mask)
    area = masked_area(photo, mask, 8, (64, 64), 0)
    shown = {}

    def channels(*arguments, **given):
        shown.update(given)
        return input_channels(*arguments, **given)

    def hint(network, picture):
        shown["hint"] = picture
        return read_hint(network, picture)

    monkeypatch.setattr(denoise, "input_channels", channels)
    monkeypatch.setattr(denoise, "read_hint", hint)
    more, expected = {}, {"picture": area.part(photo), "mask": area.drawn_mask}
    if kind == "control":
        sd = load(tiny_model.maple_folder(), controlnet=tiny_model.folder() / "control.safetensors")
        more, expected["hint"] = {"control_image": photo}, area.part(photo)
    elif kind == "depth":
        sd = wide(5)
        more, expected["depth"] = {"depth_image": depth}, area.part(images.to_grey(depth))
    else:
        sd = wide(9)
    given = {"image": photo, "mask": mask, "mask_blur": 0, "only_masked": 8, **more}
    result = sd("a", steps=1, **given, **SMALL)
    for name, value in expected.items():
        assert np.array_equal(np.asarray(shown[name]), np.asarray(value)), name
    drawn, own = np.asarray(result.images[0]), np.asarray(photo)
    assert np.array_equal(drawn[area.mask == 0], own[area.mask == 0])
    assert (drawn[area.mask == 1] != own[area.mask == 1]).any(-1).mean() > 0.5


def test_sizes_that_a_network_cannot_steer_are_refused_at_once():
    path = tiny_model.folder() / "adapter.safetensors"
    sd = load(tiny_model.maple_folder(), controlnet=path)
    photo = images.open_image(tiny_model.folder() / "photo.png")
    object.__setattr__(sd.configs["controlnet"], "downscale", 16)
    with pytest.raises(ValueError, match="adapter steers sizes in multiples of 16 pixels"):
        sd.generate("a", width=72, height=64, control_image=photo)
    with pytest.raises(ValueError, match="multiples of 16 pixels, not 88x88"):
        sd.generate("a", width=80, height=80, control_image=photo, hires_scale=1.1)


@pytest.mark.parametrize(("prompt", "rescale"), [("a", 0.5), ("a AND b", 0.0)])
def test_an_edit_is_guided_in_one_way(prompt, rescale):
    """Three predictions; there is no telling what a fourth would be compared with."""
    photo = images.open_image(tiny_model.folder() / "photo.png")
    with pytest.raises(ValueError, match="takes no guidance_rescale, no AND"):
        wide(8).generate(prompt, image=photo, guidance_rescale=rescale, **SMALL)


def test_two_controlnets_add_up(tmp_path):
    path = control_file(tmp_path / "a.safetensors")
    photo = images.open_image(tiny_model.folder() / "photo.png")
    one = load(tiny_model.maple_folder(), controlnet=path)
    two = load(tiny_model.maple_folder(), controlnet=[path, path])
    assert list(two.control_names.values()) == ["a", "a (2)"]
    arguments = {**SMALL, "steps": 2}
    alone = one("a", control_image=photo, control_weight=0.75, **arguments).latents
    both = two("a", control_image=[photo] * 2, control_weight=[0.5, 0.25], **arguments).latents
    assert np.allclose(both, alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="1 pictures for 2 ControlNets"):
        two("a", control_image=photo)


def test_what_cannot_steer_is_refused(tmp_path, steered):
    photo = images.open_image(tiny_model.folder() / "photo.png")
    foreign = control_file(tmp_path / "x.safetensors", cross_attention_dim=32)
    with pytest.raises(ConvertError, match=r"another family: its context is 32, and .* 64"):
        load(tiny_model.maple_folder(), controlnet=foreign)
    with pytest.raises(ConvertError, match="holds no controlnet but vae"):
        load(tiny_model.maple_folder(), controlnet=tiny_model.folder() / "vae.safetensors")
    with pytest.raises(ConvertError, match="not a whole model"):
        load(foreign)
    for words, arguments in {
        "control_image needs a ControlNet": {"control_image": photo},
        "is for models that follow a depth map": {"depth_image": photo},
        "models that edit by instruction": {"image_guidance_scale": 2.0},
    }.items():
        sd = load(tiny_model.maple_folder())
        with pytest.raises(ValueError, match=words):
            sd("a", steps=1, **arguments)
    for words, arguments in {
        "unknown control_preprocess 'x'": {"control_preprocess": "x"},
        "is not before control_end": {"control_start": 0.5, "control_end": 0.5},
        "control_weight must be a number": {"control_weight": 11},
        "control_end has 2 entries": {"control_end": [0.5, 1]},
    }.items():
        with pytest.raises(ValueError, match=words):
            steered[False]("a", control_image=photo, **arguments)


def test_a_controlnet_is_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "ControlNet").mkdir()
    control_file(tmp_path / "ControlNet" / "edges_v1.safetensors")
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    sd = load(tiny_model.maple_folder(), controlnet="edges_v1")
    assert sd.control_names == {"controlnet": "edges_v1"}


# Others, later ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [False, True])
def test_other_networks_come_without_the_rest_being_read(tmp_path, monkeypatch, low_memory):
    """What an exchange gives is what loading with those networks gives, bit for bit."""
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))
    folder = tiny_model.folder()
    edges = control_file(tmp_path / "edges.safetensors")
    photo = images.open_image(folder / "photo.png")
    vae = tmp_path / "other.safetensors"
    weights = load_file(folder / "vae.safetensors")
    save_file({name: value * np.float16(1.1) for name, value in weights.items()}, vae)
    both = [edges, folder / "control.safetensors"]
    model = load(folder / "model.safetensors", low_memory=low_memory)
    held = None if low_memory else (model.unet, model.text_encoder)
    seen = set()
    turns: list[dict] = [{"vae": vae, "controlnet": both}, {"controlnet": edges}, {}]
    for others in turns[1:] if low_memory else turns:
        model.exchange(**others)
        expected = load(folder / "model.safetensors", low_memory=low_memory, **others)
        count = len(expected.control_names)
        shown = {"control_image": [photo] * count} if count else {}
        one, other = (sd("a leaf", **SMALL, steps=1, **shown) for sd in (model, expected))
        assert np.array_equal(one.latents, other.latents)
        assert one.images[0].tobytes() == other.images[0].tobytes()
        assert one.settings == other.settings
        assert model.info.components == expected.info.components
        assert model.control_names == expected.control_names
        seen.add(one.images[0].tobytes())
    assert len(seen) == len(turns) - low_memory
    assert low_memory or held == (model.unet, model.text_encoder)


def test_an_exchange_that_fails_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))
    edges = control_file(tmp_path / "edges.safetensors")
    foreign = control_file(tmp_path / "foreign.safetensors", cross_attention_dim=32)
    model = load(tiny_model.maple_folder(), controlnet=edges)
    before = dict(model.info.components)
    for wrong in ({"controlnet": foreign}, {"vae": edges}, {"vae": tmp_path / "gone.safetensors"}):
        with pytest.raises((ConvertError, NoModel)):
            model.exchange(**wrong)
        assert model.info.components == before and list(model.control_names.values()) == ["edges"]
    photo = images.open_image(tiny_model.folder() / "photo.png")
    model("a leaf", **SMALL, steps=1, control_image=photo)
