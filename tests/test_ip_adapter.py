"""Pictures as prompts: that what is looked at counts, where and as much as it should.

With a tiny random model. What it must come to is compared with the reference in tests/parity.
"""

import shutil

import ip_adapters
import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from PIL import Image
from safetensors.numpy import load_file, save_file

from maple_convert import convert, open_model
from maple_convert.errors import ConvertError, UnsupportedCheckpoint
from mlx_maple import hub, images, load, loading
from mlx_maple.cli import main
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.memory import Plan, Request
from mlx_maple.engine.prepare import PreparedUNet, Recipe, prepare_unet
from mlx_maple.image_prompt import clip_pixels
from mlx_maple.models import deep_cache

SMALL = {"width": 64, "height": 64, "seed": 1, "steps": 2}
KINDS = tuple(ip_adapters.KINDS)


def adapter(kind: str):
    return ip_adapters.folder() / f"{kind}.safetensors"


def model(*kinds: str, **more):
    """The tiny model with adapters, and a small autoencoder, which takes less time."""
    taesd, paths = tiny_model.folder() / "taesd.safetensors", [adapter(kind) for kind in kinds]
    return load(tiny_model.maple_folder(), vae=taesd, ip_adapter=paths, **more)


def photo():
    return images.open_image(tiny_model.folder() / "photo.png")


def far(one, other) -> float:
    """The largest difference, in the other's own spread."""
    return float(np.abs(one - other).max() / other.std())


@pytest.fixture(scope="module")
def plain():
    return model()


@pytest.fixture(scope="module")
def sds():
    return {kind: model(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_counts_and_leaves_no_trace(kind, plain, sds):
    sd, without = sds[kind], plain("a", **SMALL).latents
    assert sd.ip_adapters == {"ip_adapter": kind}
    weak, strong, off = (
        sd("a", ip_image=photo(), ip_scale=scale, **SMALL).latents for scale in (0.2, 1, 0)
    )
    assert far(strong, without) > far(weak, without) > 1e-3
    assert (off == without).all()
    assert far(sd("a", ip_image=photo().rotate(90), **SMALL).latents, strong) > 1e-3
    again = sd("a", **SMALL)
    assert (again.latents == without).all()
    assert again.notes == ["no ip_image: the IP-Adapter is not used"]


def test_one_network_at_a_time_draws_the_same(sds):
    expected = sds["mlp"]("a", ip_image=photo(), **SMALL)
    low = model("mlp", low_memory=True)
    result = low("a", ip_image=photo(), **SMALL)
    assert (result.latents == expected.latents).all()
    assert result.settings[0].image_prompts == "mlp (scale 1, 0 to 1)"
    assert not {"ip_adapter", "image_encoder"} & low.networks._held.keys()


def test_it_counts_in_its_share_of_the_steps(sds):
    def steps(**more):
        run = sds["linear"].generate("a", **{**SMALL, "steps": 4}, sampler="euler", **more)
        return [np.asarray(p.preview()) for p in run if p.stage == "sample"]

    without, with_all = steps(), steps(ip_image=photo())
    late, early = (steps(ip_image=photo(), **{name: 0.5}) for name in ("ip_start", "ip_end"))
    for n in range(4):
        assert (late[n] == without[n]).all() == (n < 2)
        assert (early[n] == with_all[n]).all() == (n < 2)


def test_several_pictures_and_several_adapters():
    sd = model("linear", "resampler")
    assert list(sd.ip_adapters.values()) == ["linear", "resampler"]
    assert set(sd.image_encoders.values()) == {"image_encoder"}  # held once, for both
    one, other = photo(), photo().rotate(90)

    def drawn(*pictures, **more):
        return sd("a", ip_image=list(pictures), **SMALL, **more).latents

    both = drawn(one, [one, other], ip_scale=[0.4, 0.7])
    for changed in (
        drawn(one, [one, other], ip_scale=[0.7, 0.4]),
        drawn(one, one, ip_scale=[0.4, 0.7]),
        drawn(one, [one, other], ip_scale=[0.4, 0]),
    ):
        assert far(changed, both) > 1e-3
    # The same picture twice is looked at as once, but for rounding.
    assert far(drawn(one, [one, one]), drawn(one, one)) < 1e-3
    with pytest.raises(ValueError, match="ip_image has 3 entries for 2 IP-Adapters"):
        drawn(one, one, one)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_network_made_ready_for_a_gpu_sees_the_same(bits):
    """In steps of which some see no picture, compiled and not; with the plain operations."""
    sd = model("resampler", quantize=bits)
    arguments = {**SMALL, "steps": 3, "count": 2, "sampler": "euler", "ip_image": photo()}
    drawn = {end: sd("a", ip_end=end, **arguments).latents for end in (0.34, 1.0)}
    assert far(drawn[0.34], drawn[1.0]) > 1e-2
    sd.unet = prepare_unet(sd.unet, Recipe("cpu", Plain()))
    assert isinstance(sd.unet, PreparedUNet)
    sd.unet.steps = GuidedSteps(sd.unet, compiles=bits is None, one_by_one=bits is not None)
    for end, expected in drawn.items():
        assert far(sd("a", ip_end=end, **arguments).latents, expected) < 2e-3


def test_heads_that_are_padded_for_metal_are_padded_in_what_is_seen(sds):
    ready = prepare_unet(sds["mlp"].unet, Recipe("metal", Plain()))
    shown = [mx.ones((1, 5, 2 * width)) for width in (32, 64, 32, 32)]  # in the order of their use
    text, image = ready.prompt(mx.zeros((1, 7, 64)), [shown])[0]
    assert text.shape == (1, 7, 2 * 8 * 64)  # 8 heads, from 4 to 64
    heads = np.array(image).reshape(5, 16, 64)
    assert (heads[..., :4] == 1).all() and not heads[..., 4:].any()


def test_what_is_avoided_goes_with_no_picture(sds):
    """Also where the two halves are calls of their own, as for guidance that is rescaled."""
    arguments = {**SMALL, "ip_image": photo()}
    together = sds["linear"]("a", **arguments).latents
    apart = sds["linear"]("a", guidance_rescale=1e-6, **arguments).latents
    assert far(apart, together) < 1e-3


def test_deep_features_are_met_by_the_right_layers(sds):
    """A shallow call leaves layers out; of the same features, the others say the same."""
    unet = sds["linear"].unet
    random = np.random.default_rng(2)
    widths = (32, 64, 32, 32)  # in the order of their use
    image = [[mx.array(random.normal(size=(1, 3, 2 * width)).astype("f")) for width in widths]]
    given = (mx.array(random.normal(size=(1, 8, 8, 4)).astype("f")), 500.0, mx.ones((1, 7, 64)))
    for branch in range(3):
        out, deep = deep_cache.full(unet, branch, *given, image=image)
        assert np.array_equal(out, unet(*given, image=image))
        again, _ = deep_cache.shallow(unet, branch, deep, *given, image=image)
        assert np.allclose(again, out, rtol=0, atol=1e-5)
    assert np.abs(np.array(unet(*given)) - np.array(out)).max() > 1e-2


def test_clip_sees_the_middle_of_a_picture():
    wide = images.fitted(photo(), 256, 128, "stretch")
    seen = clip_pixels(wide, 16)
    assert seen.shape == (16, 16, 3) and seen.dtype == np.float32
    assert np.allclose(seen, clip_pixels(wide.crop((64, 0, 192, 128)), 16), atol=0.1)
    assert np.abs(seen - clip_pixels(photo(), 16)).max() > 0.5


def test_a_line_of_pixels_is_not_enlarged_as_a_whole(monkeypatch):
    """It would be 3,584,000 pixels long: a file of some hundred bytes takes gigabytes."""
    made, resize = [], Image.Image.resize

    def watched(self, size, *how):
        made.append(size[0] * size[1])
        return resize(self, size, *how)

    monkeypatch.setattr(Image.Image, "resize", watched)
    line = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16_000, 1, 3), np.uint8))
    seen = clip_pixels(line, 224)
    assert made == [64 * 224 * 224]
    assert np.array_equal(seen, clip_pixels(line.crop((0, 7990, 1, 8010)), 224))


# Files --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ip_adapters.folder(), tmp_path / "ip")


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_told_and_kept_bit_for_bit(kind, folder):
    """The original's two layouts and a maple folder."""
    state = load_file(folder / f"{kind}.safetensors")
    tiny_model.write_torch_zip(folder / "a.bin", ip_adapters.nested(state))
    convert(folder / "a.bin", folder / "maple")
    convert(folder / "maple", folder / "back.safetensors", to="compvis")
    back = load_file(folder / "back.safetensors")
    assert back.keys() == state.keys() and all((back[n] == state[n]).all() for n in state)
    for path in (folder / "a.bin", folder / "maple"):
        with open_model(path) as opened:
            assert opened.family == "ip_adapter"
            assert opened.components["ip_adapter"].config == ip_adapters.KINDS[kind]
    with open_model(folder / "a.bin") as opened:
        told = "; ".join(opened.evidence)
    assert "keys and values for 4 cross-attentions" in told and f"a {kind} projection" in told


def test_encoders_are_kept_bit_for_bit(folder):
    source = folder / "image_encoder"
    convert(source, folder / "maple")
    convert(folder / "maple", folder / "diffusers", to="diffusers")
    state, back = (
        load_file(place / "model.safetensors") for place in (source, folder / "diffusers")
    )
    assert back.keys() == state.keys() and all((back[n] == state[n]).all() for n in state)
    with open_model(folder / "diffusers") as opened:
        assert opened.components["image_encoder"].config == ip_adapters.ENCODER


@pytest.mark.parametrize("layout", ["openclip", "a whole CLIP", "a whole CLIP of OpenCLIP's"])
def test_encoders_of_other_layouts(layout, tmp_path):
    """One that lies in a whole CLIP is used, and its text half is left out by name."""
    spelling = "transformers" if layout == "a whole CLIP" else "openclip"
    with open_model(ip_adapters.folder() / "image_encoder") as opened:
        part = opened.components["image_encoder"]
        arrays = {name: tensor.array for name, tensor in part.tensors()}
    prefix = "" if spelling == "transformers" else "visual."
    state = ip_adapters.published("image_encoder", ip_adapters.ENCODER, arrays, spelling, prefix)
    count = len(state)
    if layout != "openclip":
        state |= tiny_model.weights("text_encoder", spelling, dtype="float32")
        state["logit_scale"] = np.zeros((), np.float32)
    save_file(state, tmp_path / "encoder.safetensors")
    with open_model(tmp_path / "encoder.safetensors") as opened:
        assert opened.family == "image_encoder" and list(opened.components) == ["image_encoder"]
        found = opened.components["image_encoder"]
        assert all((tensor.array == arrays[name]).all() for name, tensor in found.tensors())
        assert len(opened.dropped) == len(state) - count
        assert any("cannot say the CLIP image encoder's heads" in note for note in opened.notes)


def test_an_encoder_in_the_models_folders(folder, monkeypatch):
    """By what it is and not by its name; what does not fit is passed over."""
    root = folder.parent / "models"
    place = root / "clip_vision"
    place.mkdir(parents=True)
    wrong = {**ip_adapters.ENCODER, "projection_dim": 12, "hidden_size": 16}
    save_file(ip_adapters.state("image_encoder", wrong, "transformers"), place / "a.safetensors")
    (place / "b.safetensors").write_bytes(b"no model")
    shutil.move(folder / "image_encoder" / "model.safetensors", place / "z.safetensors")
    shutil.rmtree(folder / "image_encoder")
    monkeypatch.setenv("MAPLE_MODELS", str(root))
    (root / "ipadapter").mkdir()
    shutil.copy(folder / "mlp.safetensors", root / "ipadapter" / "face.safetensors")
    sd = load(tiny_model.maple_folder(), ip_adapter="face")
    assert sd.ip_adapters == {"ip_adapter": "face"}
    assert any("looks at pictures with" in n and "z.safetensors" in n for n in sd.info.notes)


def test_a_published_encoder_comes_from_the_hub(folder, monkeypatch):
    """Named by what the adapter reads of it."""
    shutil.rmtree(folder / "image_encoder")
    asked = []

    def fetch(name, **options):
        asked.append(str(name))
        raise hub.HubError("no network here")

    monkeypatch.setattr(loading.hub, "fetch", fetch)
    settings = {**ip_adapters.KINDS["resampler"], "image_dim": 1664}
    save_file(ip_adapters.state("ip_adapter", settings, "original"), folder / "g.safetensors")
    with pytest.raises(hub.HubError):
        load(tiny_model.maple_folder(), ip_adapter=folder / "g.safetensors")
    assert asked == ["h94/IP-Adapter:sdxl_models/image_encoder/model.safetensors"]
    with pytest.raises(UnsupportedCheckpoint, match="projection are 20 wide, and no such one"):
        load(tiny_model.maple_folder(), ip_adapter=folder / "linear.safetensors")


def test_what_cannot_be_used_is_refused(folder, plain):
    def refused(words, state):
        save_file(state, folder / "bad.safetensors")
        with pytest.raises(ConvertError, match=words) as caught:
            load(tiny_model.maple_folder(), ip_adapter=folder / "bad.safetensors")
        assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)

    def of(kind="linear", **changes):
        return ip_adapters.state("ip_adapter", {**ip_adapters.KINDS[kind], **changes}, "original")

    refused("is for SDXL .its text 2048 wide.; this model is", of(cross_attention_dim=2048))
    refused("for 2 cross-attentions, and this model's 4", of(channels=[32, 64]))
    lacking = of()
    del lacking["ip_adapter.3.to_v_ip.weight"]
    refused(r"1 missing: ip_adapter\.3\.to_v_ip", lacking)
    unknown = {**of(), "ip_adapter.2.to_k_ip.weight": np.zeros((32, 64), "f")}
    refused(r"1 unexpected: ip_adapter\.2\.to_k_ip", unknown)
    # Its tables are no longer than the tensors that are there.
    far_off = {"image_proj.layers.999999999.0.to_q.weight": np.zeros((2, 2), "f")}
    refused("1 unexpected: image_proj.layers.999999999", {**of("resampler"), **far_off})
    refused(r"1 missing: ip_adapter\.1", {"image_proj.latents": np.zeros((1, 2, 3), "f")})
    refused("has shape .4,., expected 2 axes", {**of(), "image_proj.proj.weight": np.ones(4, "f")})
    broken = of()
    broken["image_proj.proj.weight"][0, 0] = np.nan
    refused("values that are NaN or infinite", broken)
    face = of()
    face["image_proj.proj.0.weight"] = np.zeros((4, 4), "f")
    face["image_proj.proj.2.weight"] = face.pop("image_proj.proj.weight")
    refused("FaceID, which recognises faces with insightface", face)
    face = {"image_proj.perceiver_resampler.proj_in.weight": np.zeros((4, 4), "f"), **of()}
    refused("FaceID", {**face, "ip_adapter.0.to_q_lora.down.weight": np.zeros((4, 4), "f")})
    refused("holds no ip_adapter but vae", tiny_model.weights("vae", "diffusers"))
    refused("in one file: no model is kept so", {**of(), **tiny_model.weights("unet", "diffusers")})
    wrong = {**ip_adapters.ENCODER, "hidden_size": 16}
    save_file(ip_adapters.state("image_encoder", wrong, "transformers"), folder / "e.safetensors")
    for encoder, words in {
        folder / "e.safetensors": r"is not the image encoder of mlp\.safetensors",
        tiny_model.folder() / "vae.safetensors": "holds no image encoder but vae",
    }.items():
        with pytest.raises(ConvertError, match=words):
            load(
                tiny_model.maple_folder(),
                ip_adapter=folder / "mlp.safetensors",
                ip_encoder=encoder,
            )
    with pytest.raises(ConvertError, match=r"not a whole model; draw with .* --ip-adapter"):
        load(folder / "linear.safetensors")
    with pytest.raises(ValueError, match="ip_image needs an IP-Adapter"):
        plain("a", ip_image=photo(), **SMALL)
    with pytest.raises(ValueError, match="has no folder for an IP-Adapter"):
        convert(folder / "linear.safetensors", folder / "out", to="diffusers")


def test_bad_arguments_are_refused_at_once(sds):
    for words, arguments in {
        "ip_start 0.5 is not before ip_end 0.5": {"ip_start": 0.5, "ip_end": 0.5},
        "ip_scale must be a number": {"ip_scale": 11},
        "ip_scale has 2 entries": {"ip_scale": [1, 1]},
        "has 0 pictures, not 1 to 16": {"ip_image": []},
    }.items():
        with pytest.raises(ValueError, match=words):
            sds["linear"].generate("a", **{"ip_image": photo(), **arguments})


# The command, and memory --------------------------------------------------------------------------


def test_the_command_takes_pictures_as_prompts(tmp_path, capsys, sds):
    out, place = tmp_path / "a.png", tiny_model.folder() / "photo.png"
    taesd = tiny_model.folder() / "taesd.safetensors"
    flags = ["-m", tiny_model.maple_folder(), "--vae", taesd, "--ip-adapter", adapter("linear")]
    flags += ["--ip-scale", "0.6", "--ip-image", place, "--ip-image", place]
    small = ["-W", "64", "-H", "64", "-s", "2", "--seed", "1", "-o", out]
    assert main([str(word) for word in ("generate", "a", *flags, *small)]) == 0
    again = sds["linear"]("a", ip_image=[photo()] * 2, ip_scale=0.6, **SMALL)
    assert (np.asarray(images.open_image(out)) == np.asarray(again.images[0])).all()
    recipe = images.read_settings(out)
    assert recipe.settings.image_prompts == "linear (scale 0.6, 0 to 1)"
    assert any("name the same with --ip-adapter and --ip-image" in note for note in recipe.notes)
    assert "image_prompts" not in recipe.settings.arguments()
    capsys.readouterr()
    planned = ["doctor", "--plan", "-m", tiny_model.maple_folder(), "--ip-adapter", adapter("mlp")]
    assert main([str(word) for word in planned]) == 0
    shown = capsys.readouterr().out
    assert "image encoder" in shown and "IP-Adapter" in shown and "looking at pictures" in shown


def test_the_plan_counts_what_looks(sds):
    configs, components = sds["resampler"].configs, sds["resampler"].info.components

    def phases(**more):
        return {phase.name: phase for phase in plan(**more).phases}

    def plan(**more):
        return Plan(
            Request(configs=configs, width=64, height=64, dtype=mx.float32, backend="cpu", **more)
        )

    parts = ("ip_adapter", "image_encoder")
    assert all(plan().components[part] == components[part].bytes for part in parts)
    low, looking, unused = phases(looks=True, low_memory=True), phases(looks=True), phases()
    assert low["look"].weights == sum(components[part].bytes for part in parts)
    assert low["look"].working > 0 and low["step"].weights == components["unet"].bytes
    assert "look" not in unused and unused["step"].weights == looking["step"].weights
    assert looking["step"].working >= unused["step"].working
