"""The frame of the command: exit codes, one line an error, quick help, signals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_maple import __version__, cli
from mlx_maple.cli import doctor, main


def run(*arguments, **options):
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_maple", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"maple {__version__}\n"
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for verb, text in cli.VERBS.items():
        assert verb in help_text and text.split()[0] in help_text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_a_text_for_every_option(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "exit codes" in capsys.readouterr().out
    for parser in cli.build_parser([verb])._subparsers._group_actions[0].choices[verb]._actions:
        assert parser.help


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["draw"],
        ["generate"],
        ["generate", "a", "--nonsense"],
        ["generate", "a", "-s", "many"],
        ["completion", "tcsh"],
        ["models", "clear"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("maple: ")


def test_help_imports_neither_mlx_nor_numpy_and_is_quick():
    code = (
        "import sys, mlx_maple.cli as c; c.main(['--help']); "
        "bad = {'mlx.core', 'numpy', 'PIL', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(len(bad))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    best = min(_seconds_of("--help") for _ in range(5))
    bare = min(_seconds_of_python() for _ in range(5))
    assert best - bare < 0.15, f"{best:.3f} s, of which Python itself takes {bare:.3f} s"


def _seconds_of(*arguments):
    start = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - start


def _seconds_of_python():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - start


def failing(monkeypatch, error):
    """Make `maple doctor` end in ``error``."""

    def fail(args):
        raise error

    monkeypatch.setattr(doctor, "run", fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (cli.Failure(3, "some.ckpt: no"), 3, "maple: some.ckpt: no\n"),
        (KeyboardInterrupt(), 130, "maple: cancelled\n"),
        (MemoryError(), 4, "maple: out of memory"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), 4, "maple: out of memory"),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), 4, "out of memory"),
        (RuntimeError("cudaMallocAsync failed: out of memory"), 4, "out of memory"),
        (OSError(28, "No space left on device", "a.png"), 1, "a.png: No space left on device"),
        (PermissionError(13, "Permission denied", "b"), 1, "maple: b: Permission denied\n"),
        (KeyError("x"), 1, "a fault in maple; --debug shows where"),
        (RuntimeError("two\nlines"), 1, "unexpected RuntimeError: two"),
    ],
)
def test_each_error_has_its_code_and_one_line(monkeypatch, capsys, error, code, words):
    failing(monkeypatch, error)
    assert main(["doctor"]) == code
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_json_prints_one_object_for_an_error_too(monkeypatch, capsys):
    failing(monkeypatch, cli.Failure(1, "b.png: full", {"files": ["a.png"]}))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == {"files": ["a.png"], "error": "b.png: full", "exit_code": 1}


def test_debug_shows_the_traceback(monkeypatch, capsys):
    failing(monkeypatch, KeyError("x"))
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error_to_talk_about():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mlx_maple", "completion", "bash"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_130(number):
    code = (
        "import time, mlx_maple.cli as c; from mlx_maple.cli import doctor; "
        "doctor.run = lambda args: (print('up', flush=True), time.sleep(60)); "
        "raise SystemExit(c.main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "maple: cancelled\n"
