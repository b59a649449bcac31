"""The completion scripts, tried in the shells where these are installed."""

import shutil
import subprocess

import pytest

from mlx_maple.cli import VERBS, main


def script(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def bash(text, line, tmp_path):
    """What bash offers after ``line``."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{text}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _maple; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes_verbs_options_values_and_files(tmp_path, capsys):
    text = script("bash", capsys)
    (tmp_path / "model.ckpt").touch()
    assert bash(text, "maple ", tmp_path) >= set(VERBS)
    assert bash(text, "maple ge", tmp_path) == {"generate"}
    assert {"--steps", "--sampler", "--from-image"} <= bash(text, "maple generate -", tmp_path)
    assert {"dpmpp_2m", "euler_a", "ddim"} <= bash(text, "maple generate --sampler ", tmp_path)
    assert bash(text, "maple generate --preview l", tmp_path) == {"linear"}
    assert bash(text, "maple generate x -m mod", tmp_path) == {"model.ckpt"}
    assert bash(text, "maple generate --steps ", tmp_path) == set()
    assert {"list", "clear", "path"} <= bash(text, "maple models ", tmp_path)
    assert bash(text, "maple models clear --a", tmp_path) == {"--all"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path, capsys):
    text = script("zsh", capsys)
    code = f"autoload -Uz compinit && compinit -u -D\n{text}\nwhich _maple >/dev/null && echo there"
    done = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "there\n" and done.stderr == ""


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = script("fish", capsys)

    def offered(line):
        code = f"{text}\ncomplete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.stderr == ""
        return {row.split("\t")[0] for row in done.stdout.splitlines()}

    assert offered("maple ") >= set(VERBS)
    assert {"--steps", "--sampler"} <= offered("maple generate --s")
    assert {"dpmpp_2m", "ddim"} <= offered("maple generate --sampler ")
    assert offered("maple models cl") == {"clear"}
