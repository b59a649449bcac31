"""Networks that enlarge pictures: files of every spelling, pieces without seams, the command."""

import json
from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from torch_files import write_torch_zip

from maple_convert.errors import (
    ConvertError,
    InvalidCheckpoint,
    LayoutMismatch,
    UnreadableFile,
    UnsupportedCheckpoint,
)
from maple_convert.upscaler import expected_shapes, open_upscaler
from mlx_maple import enlarge, images, upscalers
from mlx_maple.cli import main
from mlx_maple.metadata import Settings
from mlx_maple.models.esrgan import ESRGAN, ESRGANConfig, unshuffled

SMALL = {"width": 8, "growth": 4, "num_blocks": 2, "doublings": 2, "shuffle": 1}


def weights(**changes) -> dict[str, np.ndarray]:
    """A small network's, under BasicSR's names and in torch's order of axes."""
    draw = np.random.default_rng(1)
    shapes = expected_shapes({**SMALL, **changes})
    return {n: draw.normal(0, 0.15, s).astype(np.float32) for n, s in shapes.items()}


def first_names(state):
    """ESRGAN's first spelling, by hand: its layers are counted."""
    renamed = OrderedDict()
    blocks = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("body."))
    ups = sum(n.startswith("conv_up") for n in state) // 2
    outer = {"conv_first": "model.0", "conv_body": f"model.1.sub.{blocks}"}
    outer |= {f"conv_up{i + 1}": f"model.{3 * i + 3}" for i in range(ups)}
    outer |= {"conv_hr": f"model.{3 * ups + 2}", "conv_last": f"model.{3 * ups + 4}"}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("body."):
            _, block, dense, conv = stem.split(".")
            stem = f"model.1.sub.{block}.{dense.upper()}.{conv}.0"
        else:
            stem = outer[stem]
        renamed[f"{stem}.{kind}"] = value
    return renamed


def middle_names(state):
    pairs = {"conv_body": "trunk_conv", "conv_hr": "HRconv", "conv_up": "upconv"}
    renamed = OrderedDict()
    for name, value in state.items():
        if name.startswith("body."):
            name = name.replace("body", "RRDB_trunk").replace("rdb", "RDB")
        for ours, theirs in pairs.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


SPELLINGS = {
    "BasicSR": lambda state: {
        "params_ema": OrderedDict(state),
        "params": OrderedDict(a=state["conv_last.bias"]),
    },
    "ESRGAN's first": first_names,
    "ESRGAN, in between": middle_names,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"doublings": 1}, {"doublings": 3, "num_blocks": 1}, {"doublings": 0}, {"shuffle": 2}],
)
def test_every_spelling_is_the_same_network(tmp_path, spelling, changes):
    state = weights(**changes)
    write_torch_zip(tmp_path / "x.pth", SPELLINGS[spelling](state))
    file = open_upscaler(tmp_path / "x.pth")
    assert file.spelling == spelling
    assert file.config == {**SMALL, **changes}
    assert file.tensors.keys() == state.keys()
    for name, value in state.items():
        wanted = value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
        assert np.array_equal(file.tensors[name].array, wanted)
    network = upscalers.open_named(tmp_path / "x.pth").network
    assert network.config.scale == 2**network.config.doublings / network.config.shuffle


def test_safetensors_too(tmp_path):
    save_file(weights(), tmp_path / "x.safetensors")
    assert open_upscaler(tmp_path / "x.safetensors").spelling == "BasicSR"


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


REFUSED = [
    (lambda s: without(s, "conv_hr.bias"), LayoutMismatch, "1 missing: conv_hr.bias"),
    (
        lambda s: {**s, "more.weight": s["conv_last.bias"]},
        LayoutMismatch,
        "1 unexpected: more.weight",
    ),
    (lambda s: {**s, "conv_hr.bias": np.zeros(9, np.float32)}, LayoutMismatch, "1 misshapen"),
    (lambda s: {**s, "conv_hr.bias": np.full(8, np.nan, np.float32)}, InvalidCheckpoint, "NaN"),
    (lambda s: {**s, "conv_hr.bias": np.zeros(8, np.int64)}, UnsupportedCheckpoint, "int64"),
    (
        lambda s: {**s, "body.0.rdb1.conv1x1.weight": s["conv_hr.bias"]},
        UnsupportedCheckpoint,
        "ESRGAN+",
    ),
    (lambda s: {"body.0.weight": s["conv_first.weight"]}, UnsupportedCheckpoint, "compact"),
    (lambda s: {"layers.0.residual_group.x": s["conv_hr.bias"]}, UnsupportedCheckpoint, "SwinIR"),
    (lambda s: {"a": s["conv_hr.bias"]}, UnsupportedCheckpoint, "no name of its network"),
    (
        lambda s: {**s, "body.999.rdb1.conv1.weight": s["conv_hr.weight"]},
        UnsupportedCheckpoint,
        "too large",
    ),
    (
        lambda s: {**s, "conv_first.weight": np.zeros((8, 1, 3, 3), np.float32)},
        UnsupportedCheckpoint,
        "of 1 channels",
    ),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED)
def test_other_files_are_refused_in_one_line(tmp_path, change, error, words):
    save_file(change(weights()), tmp_path / "x.safetensors")
    with pytest.raises(error) as caught:
        open_upscaler(tmp_path / "x.safetensors")
    line = str(caught.value)
    assert words in line and "\n" not in line and "x.safetensors" in line


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_MODELS", str(tmp_path))
    with pytest.raises(UnreadableFile, match="no network that enlarges by that name"):
        upscalers.open_named("nothing")
    (tmp_path / "ESRGAN").mkdir()
    save_file(weights(), tmp_path / "ESRGAN" / "4x_small.safetensors")
    assert upscalers.open_named("4x_small").name == "4x_small"
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(ConvertError):
        upscalers.open_named(tmp_path / "junk.pth")


# Enlarging ---------------------------------------------------------------------------------------


def network(**changes) -> ESRGAN:
    config = ESRGANConfig(**{**SMALL, **changes})
    made = ESRGAN(config)
    made.load_weights(
        [
            (n, mx.array(w.transpose(0, 2, 3, 1) if w.ndim == 4 else w))
            for n, w in weights(**changes).items()
        ]
    )
    return made


def test_unshuffling_is_torchs():
    """torch 2.13, pixel_unshuffle: the channel first, then the row, then the column of the fold."""
    x = mx.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
    folded = np.array(unshuffled(x, 2))
    assert folded.shape == (1, 1, 2, 12)
    assert folded[0, 0, 0].tolist() == [0, 3, 12, 15, 1, 4, 13, 16, 2, 5, 14, 17]
    with pytest.raises(ValueError, match="multiples of 4"):
        unshuffled(x, 4)


def picture(width, height):
    draw = np.random.default_rng(3)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("changes", [{"num_blocks": 1}, {"num_blocks": 1, "shuffle": 2}])
@pytest.mark.parametrize("size", [(40, 24), (37, 21)])
def test_pieces_leave_no_seams(changes, size):
    """A network that sees less far than the margin enlarges the same in pieces and at once."""
    upscaler = upscalers.Upscaler(network(**changes))
    image = picture(*size)
    whole = np.asarray(upscaler(image, side=4096), np.int16)
    assert whole.shape == (int(size[1] * upscaler.scale), int(size[0] * upscaler.scale), 3)
    told = []
    pieces = np.asarray(upscaler(image, lambda i, n: told.append((i, n)), side=12), np.int16)
    assert len(told) == told[0][1] > 4
    assert np.abs(whole - pieces).max() <= 1


def test_a_margin_of_nothing_leaves_seams(monkeypatch):
    monkeypatch.setattr(upscalers, "MARGIN", 0)
    upscaler = upscalers.Upscaler(network(num_blocks=1))
    image = picture(40, 24)
    whole, pieces = (np.asarray(upscaler(image, side=s), np.int16) for s in (4096, 12))
    assert np.abs(whole - pieces).max() > 1


def test_too_large_a_picture_is_refused(monkeypatch):
    monkeypatch.setattr(enlarge, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="160x96 are more than 1,000 pixels"):
        upscalers.Upscaler(network())(picture(40, 24))


# The command -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    save_file(weights(num_blocks=1), tmp_path / "small.safetensors")
    settings = Settings(prompt="a leaf", seed=7, steps=3)
    images.save_image(picture(32, 24), tmp_path / "in.png", settings)
    return tmp_path


def test_the_command_enlarges_and_keeps_the_settings(files, capsys):
    words = ["upscale", f"{files}/in.png", f"{files}/out.png", "-m", f"{files}/small.safetensors"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["width"], said["height"], said["scale"]) == (128, 96, 4)
    assert images.open_image(files / "out.png").size == (128, 96)
    assert images.read_settings(files / "out.png").settings.seed == 7
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"out": "out.gif"}, 2, "name it .png"),
        ({"in": "nothing.png"}, 1, "nothing.png"),
        ({"model": "nothing"}, 1, "no such file, and no network"),
        ({"model": "in.png"}, 3, "in.png"),
        ({"side": "1"}, 2, "--side must be"),
    ],
)
def test_the_command_refuses_in_one_line(files, capsys, monkeypatch, change, code, words):
    monkeypatch.chdir(files)
    said = {"in": "in.png", "out": "out.png", "model": "small.safetensors", "side": "64", **change}
    words_given = ["upscale", said["in"], said["out"], "-m", said["model"], "--side", said["side"]]
    assert main(words_given) == code
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert not (files / "out.png").exists()
