"""The command: what it prints, where, and how it ends."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny

from maple_convert import cli, open_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    extras = {
        "alphas_cumprod": tiny.alphas_cumprod(),
        "betas": np.zeros(1000, np.float32),
        "model_ema.decay": np.zeros((), np.float32),
    }
    return tiny.save_ckpt(folder / "model.ckpt", {**tiny.compvis(), **extras})


@pytest.fixture
def run(capsys):
    def command(*arguments):
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def one_line(text):
    assert text.startswith("maple-convert: ") and text.count("\n") == 1 and text.endswith("\n")
    assert "Traceback" not in text
    return text


def test_convert(run, source, tmp_path):
    code, out, err = run(source, tmp_path / "out", "--dtype", "float16")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'out'}: maple layout, text_encoder, unet, vae, ")
    assert "of float16, in " in out and out.count("\n") == 1
    assert all(line.startswith("note: ") for line in err.splitlines()) and "heads: 8" in err
    with open_model(tmp_path / "out") as model:
        assert model.components["vae"].dtypes.keys() == {"float16"}


def test_quiet(run, source, tmp_path):
    code, out, err = run(source, tmp_path / "out", "--quiet")
    assert (code, err) == (0, "") and out


def test_json(run, source, tmp_path):
    code, out, err = run(source, tmp_path / "out.safetensors", "--to", "compvis", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["layout"] == "compvis" and report["dtype"] == "float32"
    assert report["bytes"] == (tmp_path / "out.safetensors").stat().st_size
    assert report["components"].keys() == tiny.CONFIGS.keys() and report["seconds"] >= 0


def test_overrides(run, source, tmp_path):
    (tmp_path / "c.json").write_text('{"defaults": {"width": 192}}')
    code, *_ = run(
        source, tmp_path / "out", "--config", tmp_path / "c.json", "--prediction", "v_prediction"
    )
    with open_model(tmp_path / "out") as model:
        assert code == 0
        assert model.prediction == "v_prediction" and model.defaults["width"] == 192
    (tmp_path / "c.json").write_text('{"colour": 1}')
    code, out, err = run(source, tmp_path / "x", "--config", tmp_path / "c.json")
    assert (code, out) == (2, "") and "config has no 'colour'" in one_line(err)
    (tmp_path / "c.json").write_text("[")
    assert run(source, tmp_path / "x", "--config", tmp_path / "c.json")[0] == 3
    assert run(source, tmp_path / "x", "--config", tmp_path / "none.json")[0] == 1


def test_ema(run, tmp_path, source):
    code, out, err = run(source, tmp_path / "out", "--ema")
    assert (code, out) == (3, "") and "holds no EMA copy" in one_line(err)


def test_inspect(run, source):
    code, out, err = run("inspect", source)
    assert (code, err) == (0, "")
    for words in (
        "container    torch zip",
        "family       Stable Diffusion 1.x (sd1)",
        "layout       compvis",
        "prediction   epsilon",
        "in channels  4",
        "EMA copy     no",
        "schedule     scaled_linear 0.00085 to 0.012, 1000 steps, stored in the file",
        "drawn at     128x128",
        "block_out_channels 32x64x32",
        "input_blocks.0.0.weight takes 4 channels",
        "1 key: counter of the EMA copy",
        "The file cannot say the UNet's heads: 8",
    ):
        assert words in out, words
    assert "conv_in.weight  " not in out


def test_inspect_keys(run, source):
    code, out, _ = run("inspect", source, "--keys")
    line = "  conv_in.weight  float32  [32, 3, 3, 4]  model.diffusion_model.input_blocks.0.0.weight"
    assert code == 0 and line in out.splitlines()


def test_inspect_json(run, source):
    code, out, _ = run("inspect", source, "--json")
    found = json.loads(out)
    assert code == 0 and found["family"] == "sd1" and "keys" not in found
    assert found["dropped"]["counter of the EMA copy"] == 1
    assert "keys" in json.loads(run("inspect", source, "--json", "--keys")[1])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "required: IN, OUT"),
        (["a"], "required: OUT"),
        (["a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a", "b", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["inspect"], "required: FILE"),
        (["a", "b.ckpt", "--to", "compvis"], "name it b.safetensors"),
        (["a", "b.safetensors"], "writes a folder"),
    ],
)
def test_wrong_usage(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and words in one_line(err)


def test_help(run):
    for arguments in (["--help"], ["inspect", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "exit codes" in out


def test_errors_end_in_their_codes(run, tmp_path):
    code, _, err = run(tmp_path / "none.ckpt", tmp_path / "out")
    assert code == 1 and "none.ckpt" in one_line(err)
    (tmp_path / "page.ckpt").write_text("<html>not found</html>")
    code, _, err = run(tmp_path / "page.ckpt", tmp_path / "out")
    assert code == 3 and "page.ckpt" in one_line(err)
    code, _, err = run("inspect", tmp_path / "page.ckpt")
    assert code == 3 and "page.ckpt" in one_line(err)
    assert sorted(os.listdir(tmp_path)) == ["page.ckpt"]


def test_names_cannot_play_with_the_terminal(run, tmp_path):
    path = tmp_path / "a\x1b[31m\nb.ckpt"
    path.write_text("<html>")
    code, _, err = run(path, tmp_path / "out")
    assert code == 3 and "\x1b" not in one_line(err)


def test_interrupt_and_faults(run, source, tmp_path, monkeypatch):
    def fail(error):
        def convert(*_, **__):
            raise error

        monkeypatch.setattr("maple_convert.conversion.convert", convert)
        return run(source, tmp_path / "out")

    assert fail(KeyboardInterrupt()) == (130, "", "maple-convert: cancelled\n")
    code, _, err = fail(OSError(28, "No space left on device", "x"))
    assert code == 1 and "x: No space left on device" in one_line(err)
    code, _, err = fail(RuntimeError("oh"))
    assert code == 1 and "unexpected RuntimeError: oh" in one_line(err)


def test_debug_shows_the_traceback(run, tmp_path):
    _, _, err = run(tmp_path / "none.ckpt", tmp_path / "out", "--debug")
    assert "Traceback" in err and err.splitlines()[-1].startswith("maple-convert: ")


def test_bar(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    bar = cli._Bar(shown=True)
    bar.draw(5_000_000, 10_000_000, "unet.safetensors")
    bar.draw(10_000_000, 10_000_000, "vae.safetensors")
    bar.clear()
    text = capsys.readouterr().err
    assert "unet.safetensors" in text and " 50%" in text and "100%" in text and "5.00 MB/s" in text
    assert text.endswith("\r\033[K")
    cli._Bar(shown=False).draw(1, 2, "x")
    assert capsys.readouterr().err == ""


def test_as_a_command_of_its_own(source, tmp_path):
    """No torch and no mlx is imported, and a closed pipe is no crash."""
    code = (
        "import sys; from maple_convert.cli import main\n"
        f"code = main([{str(source)!r}, {str(tmp_path / 'out')!r}])\n"
        "print(sorted({'torch', 'mlx', 'mlx_maple', 'huggingface_hub'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n")
    command = f"{sys.executable} -m maple_convert inspect {source} --keys | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1
