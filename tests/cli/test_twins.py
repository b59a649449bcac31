"""The cache of converted twins: found again, whole or not at all, one conversion at a time."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mlx_maple import twins


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "some.ckpt"
    path.write_bytes(b"weights")
    return path


def write(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "unet.safetensors").write_bytes(b"x" * 100)


def make(source, options=(), dtype="float16", write=write, waiting=lambda: None):
    return twins.make(
        source,
        dict(options),
        name=source.stem,
        dtype=dtype,
        source_dtype="float32",
        write=write,
        waiting=waiting,
    )


def find(source, options=(), dtype="float16"):
    key = twins.source_key(source, dict(options))
    return twins.find(key, lambda twin: twin.dtype == dtype)


def test_a_twin_is_found_again(source):
    assert find(source) is None
    made = make(source)
    assert find(source) == made and twins.all_twins() == [made]
    assert made.nbytes == 102 and made.is_whole and Path(made.source) == source
    assert find(source, dtype="float32") is None
    assert find(source, {"ema": True}) is None


def test_a_source_that_changed_gets_a_new_twin_and_the_old_one_goes(source):
    old = make(source)
    other = make(source, {"ema": True})
    os.utime(source, ns=(1, 1))
    assert find(source) is None
    new = make(source)
    assert find(source) == new and not old.path.exists()
    assert other in twins.all_twins()  # made with other options: it goes when its like is made


def test_a_link_and_its_target_share_a_twin(source, tmp_path):
    made = make(source)
    link = tmp_path / "link.ckpt"
    link.symlink_to(source)
    assert find(link) == made


def test_a_folder_is_known_by_its_files(tmp_path):
    folder = tmp_path / "model"
    write(folder)
    made = make(folder)
    assert find(folder) == made
    (folder / "picture.png").write_bytes(b"no part of the model")
    assert find(folder) == made
    (folder / "unet.safetensors").write_bytes(b"y" * 99)
    assert find(folder) is None


@pytest.mark.parametrize("damage", ["cut", "file gone", "record gone", "record mad", "record odd"])
def test_a_damaged_twin_is_not_used_and_is_made_again(source, damage):
    made = make(source)
    record = made.path / twins.RECORD
    if damage == "cut":
        os.truncate(made.path / "unet.safetensors", 50)
    elif damage == "file gone":
        (made.path / "unet.safetensors").unlink()
    elif damage == "record gone":
        record.unlink()
    else:
        record.write_text("[" * 9 if damage == "record mad" else '{"source": 1}')
    assert find(source) is None
    assert make(source).is_whole and find(source) is not None


def test_a_conversion_that_fails_leaves_nothing(source):
    def fail(path):
        write(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(source, write=fail)
    assert find(source) is None and not twins.unfinished() and not twins.all_twins()


def test_what_a_killed_conversion_left_is_cleared_by_the_next(source, tmp_path):
    left = twins.twins_folder() / f"{twins.UNFINISHED}0123456789abcdef"
    left.mkdir(parents=True)
    assert twins.unfinished() == [left]
    make(source)
    assert not twins.unfinished()


def _convert(source, log):
    def slow(path):
        with open(log, "a") as file:
            file.write("converted\n")
        time.sleep(0.5)
        write(path)

    made = make(source, write=slow)
    assert made.is_whole


def test_two_processes_convert_once(source, tmp_path):
    log = tmp_path / "log"
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_convert, args=(source, log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "converted\n" and len(twins.all_twins()) == 1


def test_removing(source):
    made = make(source)
    twins.remove(made)
    assert not made.path.exists() and twins.all_twins() == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MAPLE_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/mlx-maple"),
        ({"HOME": "/home/me"}, "/home/me/.cache/mlx-maple"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("MAPLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(twins.cache_folder()) == expected
