"""The comparison of 16 bits with float32 that a GPU makes at true size, here on a tiny network."""

import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "convert")]

import families  # noqa: E402
import fp16_families  # noqa: E402

VAE = {"sdxl-vae": ("vae", "sdxl", 0, families.FAMILIES["sdxl"]["vae"])}


def test_an_autoencoder_in_16_bits_and_one_that_overflows(monkeypatch):
    rows = list(fp16_families.rows(VAE, cells=8))
    assert [row["dtype"] for row in rows] == ["float16", "bfloat16", "float16"]
    assert all(row["passes"] for row in rows), rows
    assert rows[0]["cosine"]["decoded"] > rows[1]["cosine"]["decoded"] > 0.999
    assert rows[2]["network"] == fp16_families.NET and "done in float32" in rows[2]["notes"][0]
    # The control: without the net the picture is lost, and the row says so.
    monkeypatch.setattr(fp16_families.autoencode, "_in_float32", lambda module: nullcontext())
    config, cells = VAE["sdxl-vae"][3], fp16_families.inputs("vae", VAE["sdxl-vae"][3], 8)
    lost = fp16_families.safety_net(config, cells["latents"])
    assert not lost["passes"]


def test_networks_of_another_type_are_told_apart(monkeypatch):
    """A bar that is missed is a row that does not pass."""
    monkeypatch.setattr(fp16_families, "BARS", {"bfloat16": 0.99999})
    assert not next(fp16_families.rows(VAE, cells=8))["passes"]
