"""The hostile corpus: one typed error, one line, nothing executed, nothing left, quickly."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import HOSTILE

from maple_convert.errors import InvalidCheckpoint
from maple_convert.readers import open_checkpoint

HARNESS = Path(__file__).with_name("hostile_harness.py")
SECONDS = 2.0  # of processor time, so that a busy machine does not fail the test
MEMORY = 500 << 20
ERRORS = ("InvalidCheckpoint", "UnsupportedCheckpoint", "UnreadableFile")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
CASES = {case.name: case for case in HOSTILE if case.stage == "reader"}


def run_harness(stage: str, *names: str) -> dict[str, dict]:
    """The harness's answers by case: see hostile_harness.py."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HARNESS), stage, *names],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["name"]: answer for answer in answers}


@pytest.fixture(scope="module")
def answers():
    return run_harness("reader")


def test_the_corpus_is_as_large_as_promised():
    names = {case.name.split("[")[0] for case in HOSTILE}
    assert len(names) >= 150, "different attacks"
    assert len({case.name for case in HOSTILE}) == len(HOSTILE), "two cases of one name"


@pytest.mark.parametrize("name", CASES)
def test_refused(name, answers):
    case, answer = CASES[name], answers[name]
    assert answer["error"] in ERRORS, answer["message"]
    assert answer["exit_code"] == case.exit_code, answer["message"]
    message = answer["message"]
    for words in case.words:
        assert words in message
    assert message.isprintable() and len(message) < 1000, "not one printable line"
    assert len(answer["reason"]) > 8, "no reason"
    assert "model" in message or "m" * 100 in message, "the line does not name the file"
    assert not answer["events"], "it did something"
    assert not answer["marker"], "its code was run"
    assert not answer["changed"] and not answer["left_over"], "it left something"
    assert not answer["left_open"], "it left a file open"
    assert answer["cpu_seconds"] < SECONDS
    assert answer["peak_bytes"] < MEMORY


def test_the_harness_notices_what_it_watches_for():
    """The control: unpickling really runs the payload, and hook and marker both say so."""
    answer = run_harness("control", "bare_pickle_with_code")["bare_pickle_with_code"]
    assert answer["marker"] and answer["changed"]
    assert any(event.startswith("pickle.find_class") for event in answer["events"])
    assert any(event.startswith("os.system") for event in answer["events"])


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_left_as_it_was(tmp_path, is_enabled):
    """Opening pauses it, and a refusal must not leave it so."""
    path = CASES["half_a_million_empty_lists"].make(tmp_path)
    before = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with pytest.raises(InvalidCheckpoint):
            open_checkpoint(path)
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if before else gc.disable)()
