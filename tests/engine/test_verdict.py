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


@pytest.mark.parametrize("answer", [None, "group norm differs by 1e-1"])
def test_a_check_is_made_once(answer):
    assert verdict.kept("key", lambda: answer) == answer
    assert verdict.kept("key", never) == answer
    assert verdict.kept("another", lambda: "x") == "x"


def test_a_check_that_ended_its_process_is_not_made_again(cache):
    code = (
        "import os; from mlx_maple.engine import verdict; verdict.kept('key', lambda: os._exit(7))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    fault = verdict.kept("key", never)
    assert fault is not None and "did not come to its end" in fault and "key.verdict" in fault
    (cache / "key.verdict").unlink()
    assert verdict.kept("key", lambda: None) is None


def test_another_process_that_is_at_it_does_not_decide(cache):
    cache.mkdir()
    (cache / "key.verdict").write_text(f"{verdict.UNFINISHED} {os.getppid()}")
    assert verdict.kept("key", lambda: None) is None


def test_a_folder_that_cannot_be_written_costs_the_check_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "file"))
    assert verdict.kept("key", lambda: "bad") == "bad"
    assert verdict.kept("key", lambda: None) is None
