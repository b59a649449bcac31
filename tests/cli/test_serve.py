"""`maple serve`, up to where it listens."""

import socket
import sys

import pytest

from mlx_maple.cli import main


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--port", "70000"], 2, "--port"),
        (["--token", "short"], 2, "12 characters"),
        (["--idle-unload", "0"], 2, "--idle-unload"),
        (["--models", "no/such/folder"], 1, "no such folder"),
    ],
)
def test_wrong_usage_is_one_line(options, code, words, capsys, tmp_path):
    assert main(["serve", "--data", str(tmp_path), *options]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_without_the_packages_it_says_how_to_get_them(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_maple.serve.app", None)
    # What an import ends with where a package of the extra is not installed.
    missing = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "mlx_maple.serve.app":
                raise missing

    monkeypatch.delitem(sys.modules, "mlx_maple.serve.app")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["serve"]) == 1
    assert 'pip install "mlx-maple[serve]"' in capsys.readouterr().err


def test_a_port_that_is_taken(capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port), "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said and "--port" in said and said.count("\n") == 1


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["serve", "--port", "0", "--data", str(tmp_path / "file" / "data")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("told", ["option", "environment", None])
def test_only_a_token_that_it_made_up_is_shown(told, monkeypatch, tmp_path):
    from mlx_maple.serve import app

    called = {}
    monkeypatch.setattr(app, "serve", lambda config, **how: called.update(how, config=config))
    monkeypatch.delenv("MAPLE_TOKEN", raising=False)
    options = ["--host", "0.0.0.0", "--data", str(tmp_path)]
    if told == "option":
        options += ["--token", "correct-horse-battery"]
    elif told == "environment":
        monkeypatch.setenv("MAPLE_TOKEN", "correct-horse-battery")
    assert main(["serve", *options]) == 0
    token = called["config"].token
    assert (token == "correct-horse-battery") == (told is not None)
    shown = app._addresses(called["config"], 7860, with_token=called["shows_token"])
    assert all((token in address) == (told is None) for address in shown)
