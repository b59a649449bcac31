"""docs/benchmarks.md is what the kept results make it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_networks  # noqa: E402
import make_page  # noqa: E402


def test_the_page_is_not_stale():
    assert make_page.PAGE.read_text() == make_page.page(), "run python benchmarks/make_page.py"


def test_a_changed_figure_is_seen(tmp_path):
    """The control."""
    name = "convert_streaming.json"
    report = json.loads((make_page.RESULTS / name).read_text())
    (tmp_path / name).write_text(json.dumps(report))
    before = make_page.page(tmp_path)
    report["rows"]["cp"]["seconds"] += 1
    (tmp_path / name).write_text(json.dumps(report))
    assert make_page.page(tmp_path) != before


def test_results_that_no_section_tells_of_are_an_error(tmp_path):
    (tmp_path / "unheard_of.json").write_text("{}")
    with pytest.raises(KeyError, match="unheard_of"):
        make_page.page(tmp_path)


def test_every_section_says_how_to_make_it_again():
    page = make_page.page()
    files = {path.stem for path in make_page.RESULTS.glob("*.json")}
    for name in files & make_page.SECTIONS.keys():
        assert f"python benchmarks/{name}.py" in page
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def gpu_row(rival, case, seconds, **more):
    facts = {"date": "2031-05-07", "commit": "abc1234", "python": "3.12", "versions": {"mlx": "1"}}
    row = {"device": "card", "rival": rival, "case": case, "facts": facts}
    return row | ({} if seconds is None else {"median_s": seconds}) | more


def test_a_gpus_table_holds_times_and_ratios(tmp_path):
    rows = [
        gpu_row("mlx-maple", "unet-512-b2", 0.005, in_a_row_s=0.0045),
        gpu_row("torch compiled", "unet-512-b2", 0.0075),
        gpu_row("mlx-maple", "vae-512", 0.01),
        gpu_row("torch compiled", "vae-512", None, error="RuntimeError: no"),
    ]
    page = make_page.gpu_networks({"rows": rows})
    assert "| guided step, 512x512 | 5.00 (4.50) | 7.50 |" in page
    assert "| guided step, 512x512 | 1.50 |" in page
    assert "| decoding to 512x512 | 10.0 | failed |" in page
    assert "commit abc1234" in page and "took turns" not in page


def test_the_rounds_of_rivals_that_took_turns_are_told():
    rounds = [[0.006, 0.005, 0.007], [0.008, 0.0079, 0.0081]]
    rows = [
        gpu_row(rival, "vae-512", each[0], rounds_s=each)
        for rival, each in zip(("mlx-maple", "torch compiled"), rounds, strict=True)
    ]
    line = "- decoding to 512x512: mlx-maple 6.00, 5.00, 7.00; torch compiled 8.00, 7.90, 8.10"
    assert line in make_page.gpu_networks({"rows": rows})


def test_rounds_come_to_the_middle_of_each_figure():
    ours = [
        gpu_row("mlx-maple", "vae-512", s, fastest_s=s / 2, peak_bytes=p, parts_s={"a": 1.0})
        for s, p in ((0.006, 5), (0.005, 7), (0.009, 6))
    ]
    found = gpu_networks.middle([ours[0], {"case": "vae-512", "error": "no"}, *ours[1:]])
    assert (found["median_s"], found["fastest_s"], found["peak_bytes"]) == (0.006, 0.003, 7)
    assert found["rounds_s"] == [0.006, 0.005, 0.009]
    assert gpu_networks.middle(ours[:1]) == ours[0]  # no turns


def test_switches_are_set_against_none(tmp_path):
    facts = {"device": "card", "seconds": "of the clock", "steps": 20, "mlx": "1", "side": 512}
    facts |= {"commit": "abc1234", "date": "2031-05-07", "prompts": 5}
    facts |= {"sampler": "ddim", "schedule": "leading", "guidance_scale": 3.0}
    none = {"switch": "none", "step_s": 0.006, "psnr": None, "least_psnr": None}
    fast = {"switch": "deep_cache=3", "step_s": 0.002, "psnr": 40.84, "least_psnr": 36.0}
    judged = [{**row, "read": 5, "score": 0.9} for row in (none, fast)]
    page = make_page.switches(
        {
            "runs": [
                {**facts, "model": "demo", "is_random": False, "rows": judged},
                {**facts, "model": "sd15", "is_random": True, "rows": [none, fast]},
            ]
        }
    )
    assert "| `deep_cache=3` | 2.00 | 3.00 | 40.8 | 36.0 | 5 of 5 | 0.90 |" in page
    assert "| `deep_cache=3` | 2.00 | 3.00 |\n" in page
    assert "### sd15, random weights, 512x512, guidance 3, card" in page


def test_a_users_bench_has_a_section(tmp_path):
    facts = {
        "date": "2031-05-07",
        "commit": None,
        "python": "3.12",
        "versions": {"mlx": "1"},
        "device": "Apple M9",
        "model": "x",
        "dtype": "float16",
        "processor": "M9",
        "memory": "16 GB",
    }
    rows = [
        {"rival": "mlx-maple", "case": "text", "median_s": 0.002, "peak_bytes": 10**9},
        {"rival": "diffusers eager", "case": "text", "error": "no"},
    ]
    (tmp_path / "bench_m9.json").write_text(json.dumps({"facts": facts, "rows": rows}))
    page = make_page.page(tmp_path)
    assert "## maple bench on Apple M9" in page
    assert "| text, mlx-maple | 2.00 |  | 1.00 |  |" in page
    assert "| text, diffusers eager | failed |" in page


def test_networks_in_16_bits_stand_below_the_pictures():
    report = json.loads((make_page.RESULTS / "fp16_fidelity.json").read_text())
    report.pop("families", None)
    without = make_page.fp16_fidelity(report)
    row = {"network": "xl-unet", "dtype": "float16", "cosine": {"t=9": 0.99995}, "bar": 0.9999}
    report["families"] = {"machine": report["machine"], "networks": [row]}
    assert "| xl-unet, float16 | t=9 | 0.999950 | 0.9999 |" in make_page.fp16_fidelity(report)
    assert "xl-unet" not in without and "--families" not in without
