"""`maple bench`: cases, processes, table and files, with a tiny model; no time is judged."""

import argparse
import json
import sys

import pytest
import tiny_model
from PIL import Image

from mlx_maple.cli import Failure, _bench_plot, bench, main
from mlx_maple.cli._bench_cases import Case


def arguments(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("unet-512-b2", Case("unet", 512, 2)),
        ("unet-768-b8", Case("unet", 768, 8)),
        ("vae-1024", Case("vae", 1024, 1)),
        ("xl-1024-b2", Case("xl", 1024, 2)),
        ("text", Case("text", 512, 1)),
        ("image-256", Case("image", 256, 1)),
        ("start", Case("start", 512, 1)),
    ],
)
def test_cases_by_name(name, case):
    assert Case.parse(name) == case
    assert case.name == name


@pytest.mark.parametrize(
    "name", ["", "unet-500-b2", "net-512", "unet-512-b0", "unet-512-b2-x", "vae-32", "unet--b2"]
)
def test_a_wrong_case_is_wrong_usage(name, capsys):
    assert main(["bench", f"--case={name}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--size", "100"],
        ["--runs", "0"],
        ["--case", "text", "--size", "512"],
        ["--case", "start"],  # without a model there is nothing to start with
        ["--against", "nothing"],
    ],
)
def test_wrong_usage(words, capsys):
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_measured_without_being_told(monkeypatch):
    monkeypatch.setattr(bench, "backend", lambda: "metal")
    groups = bench.plan(arguments())
    assert groups == {
        "unet": [f"unet-{size}-b{batch}" for size in (512, 768, 1024) for batch in (2, 8)],
        "vae": ["vae-512", "vae-768", "vae-1024"],
        "text": ["text"],
        "image": ["image-512"],
    }
    assert "start" in bench.plan(arguments("-m", "x"))
    monkeypatch.setattr(bench, "backend", lambda: "cpu")
    assert bench.plan(arguments())["unet"] == ["unet-256-b2"]
    assert bench.plan(arguments("--size", "64", "--batch", "4"))["unet"] == ["unet-64-b4"]


def test_a_tiny_model_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "STARTS", 1)
    model = str(tiny_model.maple_folder())
    output, plot = tmp_path / "new" / "b.json", tmp_path / "b.png"
    words = ["bench", "-m", model, "--runs", "1", "--warm-up", "0", "--json", "--published"]
    for case in ("unet-64-b2", "vae-64", "text", "image-64", "start"):
        words += ["--case", case]
    assert main([*words, "--output", str(output), "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output.read_text())
    rows = {row["case"]: row for row in report["rows"]}
    assert rows.keys() == {"unet-64-b2", "vae-64", "text", "image-64", "start"}
    assert all("error" not in row and row["median_s"] > 0 for row in rows.values())
    assert all(row["rival"] == "mlx-maple" for row in rows.values())
    assert rows["unet-64-b2"]["primitives"] > 50 and rows["unet-64-b2"]["peak_bytes"] > 0
    whole, parts = rows["image-64"], rows["image-64"]["parts_s"]
    assert 0 < whole["without_unet_s"] and {"text", "sample", "decode"} <= parts.keys()
    assert rows["start"]["parts_s"].keys() == {"import", "load", "text"}
    assert report["facts"]["versions"]["mlx"] and report["facts"]["runs"] == 1
    assert all(row["source"] for row in report["published"])
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > 1000


def test_published_figures_are_named_so_and_stay_away_from_other_machines(capsys):
    words = ["bench", "-m", str(tiny_model.maple_folder()), "--case", "text", "--runs", "1"]
    assert main([*words, "--quiet"]) == 0
    assert "published" not in capsys.readouterr().out
    assert main([*words, "--quiet", "--published"]) == 0
    out = capsys.readouterr().out
    assert "published by others, not measured here:" in out and "M2 Pro" in out


def test_a_model_that_cannot_be_used_ends_as_anywhere(tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 100)
    assert main(["bench", "-m", str(broken), "--case", "text", "--quiet"]) == 3
    assert "broken.safetensors" in capsys.readouterr().err
    assert main(["bench", "-m", str(tmp_path / "absent"), "--case", "text", "--quiet"]) == 1


def test_torch_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--against", "diffusers", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "torch" in err and "pip install" in err


# The processes -----------------------------------------------------------------------------------


def script(text):
    return [sys.executable, "-c", text]


def test_rows_come_as_they_are_printed_and_a_death_is_told():
    text = (
        "import sys\n"
        "print('noise')\n"
        'print(\'{"case": "a", "median_s": 1}\')\n'
        "print('first line\\nlast words', file=sys.stderr)\n"
        "sys.exit(9)\n"
    )
    rows = list(bench.process(script(text), ["a", "b"]))
    assert rows[0] == {"case": "a", "median_s": 1}
    assert rows[1]["case"] == "b" and "9" in rows[1]["error"] and "last words" in rows[1]["error"]
    assert "first line" not in rows[1]["error"]


def test_an_exit_code_of_the_worker_is_ours():
    text = 'print(\'{"exit_code": 3, "error": "model.ckpt: torn"}\')'
    with pytest.raises(Failure, match=r"model\.ckpt: torn") as caught:
        list(bench.process(script(text), ["a"]))
    assert caught.value.exit_code == 3


def test_a_process_does_not_outlive_the_bench():
    text = 'import time\nprint(\'{"case": "a"}\', flush=True)\ntime.sleep(60)'
    rows = bench.process(script(text), ["a", "b"])
    assert next(rows) == {"case": "a"}
    rows.close()  # returns at once, or the test times out


def test_nothing_measured_is_an_error(monkeypatch, capsys):
    def fail(*given):
        yield {"case": "text", "error": "no luck"}

    monkeypatch.setattr(bench, "measure", fail)
    assert main(["bench", "--case", "text", "--quiet"]) == 1
    assert "no luck" in capsys.readouterr().err


def test_rivals_take_turns_on_the_same_work(monkeypatch, capsys):
    asked = []

    def measure(rival, options, cases, args, device):
        asked.append((rival, tuple(options), tuple(cases)))
        seconds = {"mlx-maple": 0.01, "diffusers eager": 0.03, "diffusers compiled": 0.005}
        yield from ({"case": case, "median_s": seconds[rival]} for case in cases)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    words = ["bench", "--against", "diffusers", "--quiet", "--case", "unet-64-b2", "--case", "text"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    everybody = ["mlx-maple", *bench.RIVAL_FORMS]
    assert [rival for rival, _, _ in asked] == everybody + everybody[:2]
    assert [cases for _, _, cases in asked] == 3 * [("unet-64-b2",)] + 2 * [("text",)]
    eager = next(line for line in lines if "diffusers eager" in line and "UNet" in line)
    assert eager.split()[-1] == "3.00"
    compiled = next(line for line in lines if "diffusers compiled" in line and "UNet" in line)
    assert compiled.split()[-1] == "0.50"


# The picture -------------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_figures():
    rows = [
        {"rival": "mlx-maple", "case": "unet-512-b2", "median_s": 0.25},
        {"rival": "diffusers eager", "case": "unet-512-b2", "median_s": 0.5},
        {"rival": "diffusers compiled", "case": "unet-512-b2", "error": "out of memory"},
    ]
    published = [
        {"case": "unet-512-b2", "seconds": 0.4, "device": "M2", "stack": "X", "work": "SD 2.1"},
        {"case": "vae-512", "seconds": 0.4, "device": "M2", "stack": "X", "work": "SD 1.5"},
    ]
    groups = _bench_plot.bars_of(rows, published, {"unet-512-b2": "UNet"})
    ((name, bars),) = groups
    assert name == "UNet"
    assert [bar.seconds for bar in bars] == [0.25, 0.5, None, 0.4]
    assert bars[2].figure == "out of memory"
    assert bars[3].label == "published: M2, X (SD 2.1)"
    image = _bench_plot.plot("title", "facts", groups, "footer")

    def pixels(colour):
        return sum(count for count, found in image.getcolors(1 << 20) if found == colour)

    ours, others = pixels(_bench_plot.OURS), pixels(_bench_plot.OTHERS)
    assert others == pytest.approx(2 * ours, rel=0.02)
    assert pixels(_bench_plot.PUBLISHED) == pytest.approx(1.6 * ours, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00712, "7.12 ms"), (0.0712, "71.2 ms"), (0.712, "712 ms"), (71.23, "71.2 s")],
)
def test_durations_have_three_digits(seconds, text):
    assert _bench_plot.milliseconds(seconds) == text
