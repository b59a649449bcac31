"""The hostile corpora through the whole converter: one typed error, one line, nothing left.

Some cases of the readers' corpus come, too: whatever a reader refuses, the converter must refuse in
the same way.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_layouts import HOSTILE, LAYOUT_CASES

from maple_convert import cli

HERE = Path(__file__).parent
SECONDS = 2.0  # of processor time, so that a busy machine does not fail the test
MEMORY = 500 << 20
CODE = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "subprocess.", "pickle.")
CODE += ("marshal.", "ctypes.dlopen", "socket.", "code.__new__", "function.__new__")

EVERY_READER_CASE = 32
READERS = [case.name for case in HOSTILE if case.stage == "reader"][::EVERY_READER_CASE]
CASES = {case.name: case for case in HOSTILE if case.name in (*READERS, *LAYOUT_CASES)}
# A folder is no file, but may be a model.
OTHER_CODE = {"directory_named_ckpt": 3}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")


@pytest.fixture(scope="module")
def answers():
    """The harness's answers by case: see hostile_harness.py."""
    program = "import corpus_layouts, maple_convert.conversion, hostile_harness as h; h.main()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "convert", *CASES],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["name"]: answer for answer in found}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, answers):
    case, answer = CASES[name], answers[name]
    assert answer["exit_code"] == OTHER_CODE.get(name, case.exit_code), answer["message"]
    if name in LAYOUT_CASES:
        for words in case.words:
            assert words in answer["message"]
    message = answer["message"]
    assert message.isprintable() and len(message) < 1600, "not one printable line"
    assert "model" in message or "m" * 100 in message, "the line does not name the file"
    ran = [event for event in answer["events"] if event.startswith(CODE)]
    assert not ran and not answer["marker"], "something was run"
    assert not answer["changed"] and not answer["left_over"], "it left something"
    assert not answer["left_open"], "it left a file open"
    assert answer["cpu_seconds"] < SECONDS
    assert answer["peak_bytes"] < MEMORY


@pytest.mark.parametrize("verb", ["convert", "inspect"])
def test_refused_by_the_command(verb, tmp_path, capsys):
    """In this process, each by one verb; ``inspect`` reads no values and finds no fault in them."""
    out = tmp_path / "out"
    for number, case in enumerate(LAYOUT_CASES.values()):
        if (number % 2 == 0) != (verb == "convert"):
            continue
        (tmp_path / str(number)).mkdir()
        path = case.make(tmp_path / str(number))
        arguments = [str(path), str(out)] if verb == "convert" else ["inspect", str(path)]
        code = cli.main(arguments)
        captured = capsys.readouterr()
        if verb == "inspect" and code == 0:
            assert case.name.startswith(("weights_that_are_not_finite", "bfloat16_nan"))
            continue
        assert code == case.exit_code, (case.name, captured.err)
        assert captured.out == "" and captured.err.count("\n") == 1, case.name
        assert captured.err.startswith("maple-convert: ") and "Traceback" not in captured.err
        assert not out.exists() and not list(tmp_path.glob(".*"))
