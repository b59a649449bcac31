"""`maple doctor --audit`: the report of a model for Apple's GPUs, told anywhere."""

import json

import pytest
import tiny_model

from mlx_maple.cli import _audit, main
from mlx_maple.engine.audit import RULES_OF
from mlx_maple.models import CLIPTextConfig, UNetConfig, VAEConfig

SD15 = {"text_encoder": CLIPTextConfig(), "unet": UNetConfig(), "vae": VAEConfig()}


def test_a_model_by_its_folder(capsys):
    model = str(tiny_model.maple_folder())
    assert main(["doctor", "--audit", "-m", model, "-W", "64", "-H", "128", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["width"], report["height"]) == (64, 128)
    assert report["networks"].keys() == {"text_encoder", "unet", "vae"}
    operations = report["networks"]["unet"]["operations"]
    assert {"attention", "convolution", "product", "kernel"} == {o["kind"] for o in operations}
    assert any("2x16x8x4 to 16x8x32" in o["shape"] for o in operations)  # height before width


def test_a_checkpoint_is_not_converted_for_it(tmp_path, capsys):
    model = str(tiny_model.folder() / "model.safetensors")
    assert main(["doctor", "--audit", "-m", model]) == 0
    out = capsys.readouterr().out
    assert RULES_OF in out and "UNet, a guided step" in out
    assert not list(tmp_path.rglob("*.safetensors"))


def test_sd15_for_a_person():
    text = "\n".join(_audit.lines(_audit.audit_networks(SD15, 512, 512), "SD 1.5"))
    assert "heads of 64: 4096 look at 4096" in text  # 40, padded
    assert "nothing heavy is slow" in text
    assert "no kernel for heads of 512" in text  # the decoder's own, which weighs little at 512
    assert "!" not in text


def test_what_is_heavy_and_slow_is_marked():
    """The decoder's attention stores its scores; at 1024 it is a twentieth of the arithmetic."""
    reports = _audit.audit_networks(SD15, 1024, 1024)
    slow = [each for report in reports.values() for each in report.slow]
    assert {each.kind for each in slow} == {"attention"}
    assert all("heads of 512" in each.kernel for each in slow)
    lines = _audit.lines(reports, "SD 1.5")
    assert any(line.startswith("!") for line in lines)
    assert "1 of weight have no fast kernel" in lines[-1]


@pytest.mark.parametrize("size", ["100", "0", "-64", "9000"])
def test_a_wrong_size_is_wrong_usage(size, capsys):
    model = str(tiny_model.maple_folder())
    assert main(["doctor", "--audit", "-m", model, "-W", size]) == 2
    assert capsys.readouterr().err.count("\n") == 1
