"""A check of a device is made once, and one that brought its process down is not made again."""

import os
import subprocess
import sys

import pytest

from mlx_maple.engine import verdict


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def never():
    raise AssertionError("checked again")


def test_what_has_passed_is_not_checked_again(cache):
    assert verdict.kept("key", lambda: None) is None
    assert verdict.kept("key", never) is None
    assert verdict.kept("another", lambda: "x") == "x"
    assert [path.name for path in cache.iterdir()] == ["key.verdict"]


def test_what_is_wrong_is_asked_again():
    assert verdict.kept("key", lambda: "no memory left") == "no memory left"
    assert verdict.kept("key", lambda: None) is None


def test_a_check_that_ended_two_processes_is_not_made_again(cache):
    code = (
        "import os; from mlx_maple.engine import verdict; verdict.kept('key', lambda: os._exit(7))"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    fault = verdict.kept("key", never)
    assert fault is not None and "did not come to their end" in fault and "key.verdict" in fault
    (cache / "key.verdict").unlink()
    assert verdict.kept("key", lambda: None) is None


def test_a_check_that_was_cancelled_says_nothing(cache):
    def cancelled():
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            verdict.kept("key", cancelled)
    assert list(cache.iterdir()) == []
    assert verdict.kept("key", lambda: None) is None


@pytest.mark.parametrize("text", ["", "unfinished", "unfinished x", "unfinished 1 x", "\xff"])
def test_a_damaged_note_is_no_verdict(cache, text):
    cache.mkdir()
    (cache / "key.verdict").write_bytes(text.encode("latin-1"))
    assert verdict.kept("key", lambda: "bad") == "bad"


def test_another_process_that_is_at_it_does_not_decide(cache):
    cache.mkdir()
    (cache / "key.verdict").write_text(f"{verdict.UNFINISHED} {os.getppid()} 2")
    assert verdict.kept("key", lambda: None) is None


def test_a_folder_that_cannot_be_written_costs_the_check_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "file"))
    assert verdict.kept("key", lambda: "bad") == "bad"
    assert verdict.kept("key", lambda: None) is None
