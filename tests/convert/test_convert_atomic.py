"""Whole or not at all: killed, interrupted, out of space, forbidden, in its own way."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from maple_convert import UnreadableFile, convert, open_model
from maple_convert.cli import main
from maple_convert.write import whole_or_nothing

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return tiny.save_ckpt(folder / "model.ckpt", tiny.compvis(np.float16))


@pytest.fixture(scope="module")
def older(tmp_path_factory, source):
    """A maple folder of another type, which a conversion replaces."""
    folder = tmp_path_factory.mktemp("older") / "older"
    convert(source, folder, dtype="float32")
    return folder


def names(folder):
    return sorted(os.listdir(folder))


# Killed


def kill_points(source, scratch, name, to, *older):
    program = [sys.executable, str(HERE / "kill_points.py")]
    done = subprocess.run(
        [*program, str(source), str(scratch), name, to, *map(str, older)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=240,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "name, to", [("out", "maple"), ("out", "diffusers"), ("out.safetensors", "compvis")]
)
def test_killed_at_any_moment(source, tmp_path, name, to):
    found = kill_points(source, tmp_path, name, to)
    assert len(found) > 8
    for moment in found:
        assert moment["then"] in ("absent", "whole float16"), moment
        assert all(left.startswith(f".{name}.partial-") for left in moment["left"]), moment
        assert moment["after"] == "whole float16" and moment["left_after"] == [], moment
    # Only what comes after the rename, the folder's own sync, finds the whole model there.
    assert [m["then"] for m in found].count("whole float16") <= 2
    assert {m["moment"].split()[0] for m in found} >= {"open", "wrote", "os.rename"}


def test_killed_while_it_replaces_an_older_one(source, older, tmp_path):
    found = kill_points(source, tmp_path, "out", "maple", older)
    assert len(found) > 15
    for moment in found:
        # Between the two renames there is nothing for an instant; the next run brings it back.
        assert moment["then"] in ("absent", "whole float16", "whole float32"), moment
        if moment["then"] == "absent":
            assert any(left.startswith(".out.replaced-") for left in moment["left"]), moment
        assert moment["after"] == "whole float16" and moment["left_after"] == [], moment
    assert [m["then"] for m in found].count("absent") <= 2


def test_what_a_running_conversion_writes_is_left_alone(source, tmp_path):
    alive = tmp_path / f".out.partial-{os.getppid()}"
    dead = tmp_path / ".out.partial-999999999"
    stranger = tmp_path / ".out.partial-notes"
    for folder in (alive, dead, stranger):
        folder.mkdir()
    convert(source, tmp_path / "out")
    assert names(tmp_path) == sorted([alive.name, stranger.name, "out"])


def test_what_was_set_aside_comes_back(source, older, tmp_path):
    """Killed between the renames and never run again with success: the older model returns."""
    aside = tmp_path / ".out.replaced-999999999"
    aside.symlink_to(older)
    with pytest.raises(RuntimeError), whole_or_nothing(tmp_path / "out", lambda path: True):
        raise RuntimeError
    assert names(tmp_path) == ["out"]


# Interrupted


def slow_command(source, out):
    """``maple-convert`` that waits a little at every tensor."""
    code = (
        "import sys, time; from maple_convert import cli\n"
        "cli._Bar.draw = lambda *_: (print('.', flush=True), time.sleep(0.002))\n"
        f"sys.exit(cli.main([{str(source)!r}, {str(out)!r}]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(source, tmp_path, number):
    process = slow_command(source, tmp_path / "out")
    assert process.stdout.readline() == ".\n"
    assert names(tmp_path) == [f".out.partial-{process.pid}"]
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "maple-convert: cancelled\n"
    assert names(tmp_path) == []


# No room


def test_a_file_that_may_not_grow(source, tmp_path):
    """The same as a disk that fills up while it is written, for any user on any system."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-m", "maple_convert", str(source), str(tmp_path / "out")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and str(tmp_path / "out") in done.stderr
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(source, small_disk, capsys, monkeypatch):
    out = small_disk / "out"
    assert main([str(source), str(out)]) == 1
    assert "GB free" in capsys.readouterr().err
    # The space that was there when it began may be taken by others meanwhile.
    monkeypatch.setattr("maple_convert.conversion._check_space", lambda out, needed: None)
    for to, name in (("maple", "out"), ("diffusers", "out"), ("compvis", "out.safetensors")):
        assert main([str(source), str(small_disk / name), "--to", to]) == 1
        assert capsys.readouterr().err.endswith("the disk is full; nothing was written\n")
        assert names(small_disk) == []


def test_a_folder_that_may_not_be_written(source, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.geteuid() == 0:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import os, sys\nfrom maple_convert.cli import main\n"
                "from maple_convert import conversion\nos.seteuid(65534)\n"
                f"sys.exit(main(['{readable(source, tmp_path)}', '{closed / 'out'}']))",
            ],
            capture_output=True,
            text=True,
        )
        code, text = done.returncode, done.stderr
    else:
        code = main([str(source), str(closed / "out")])
        text = capsys.readouterr().err
    assert code == 1 and "permission denied" in text and text.count("\n") == 1
    assert names(closed) == []


def readable(source, folder):
    """A copy that another user can reach."""
    for parent in (folder, *folder.parents[:2]):
        os.chmod(parent, 0o755)
    copy = folder / source.name
    copy.write_bytes(source.read_bytes())
    return copy


# In its own way


def test_existing_outputs_are_kept(source, older, tmp_path):
    for name, to in (("file", "maple"), ("folder", "maple"), ("out.safetensors", "compvis")):
        out = tmp_path / name
        if name == "folder":
            out.mkdir()
            (out / "config.json").write_text('{"format": "other"}')
        else:
            out.write_text("mine")
        before = names(tmp_path)
        with pytest.raises(UnreadableFile, match="exists already") as caught:
            convert(source, out, to=to)
        assert caught.value.exit_code == 1 and names(tmp_path) == before
    # A maple folder is replaced by a maple folder and by nothing else.
    (tmp_path / "maple").mkdir()
    for file in older.iterdir():
        (tmp_path / "maple" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UnreadableFile, match="exists already"):
        convert(source, tmp_path / "maple", to="diffusers")
    convert(source, tmp_path / "maple")
    with open_model(tmp_path / "maple") as model:
        assert model.components["unet"].dtypes.keys() == {"float16"}


def test_an_empty_folder_is_filled(source, tmp_path):
    for to in ("maple", "diffusers"):
        (tmp_path / to).mkdir()
        convert(source, tmp_path / to, to=to)
        with open_model(tmp_path / to):
            pass


def test_a_dangling_link_is_no_place(source, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UnreadableFile, match="exists already"):
        convert(source, tmp_path / "out")


def test_the_output_may_not_be_the_input_or_lie_in_it(source, tmp_path):
    maple = tmp_path / "maple"
    convert(source, maple)
    before = {file.name: file.read_bytes() for file in maple.iterdir()}
    with pytest.raises(UnreadableFile, match="the output is the input"):
        convert(maple, maple, dtype="bfloat16")
    (tmp_path / "link").symlink_to(maple)
    with pytest.raises(UnreadableFile, match="the output is the input"):
        convert(maple, tmp_path / "link")
    with pytest.raises(UnreadableFile, match="lies inside the input"):
        convert(maple, maple / "inner")
    with pytest.raises(UnreadableFile, match="lies inside the output"):
        convert(tiny.save_safetensors(maple / "inner.safetensors", tiny.compvis()), maple)
    (maple / "inner.safetensors").unlink()
    assert {file.name: file.read_bytes() for file in maple.iterdir()} == before


def test_a_place_that_is_not_there(source, tmp_path):
    with pytest.raises(UnreadableFile, match="its folder does not exist"):
        convert(source, tmp_path / "no" / "such" / "place")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreadableFile, match="its folder does not exist"):
        convert(source, tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]


def test_odd_names(source, tmp_path):
    for name in ("a [b] *?", "ünïcode", "-dash", ".hidden"):
        (tmp_path / f".{name}.partial-999999999").mkdir()
        convert(source, tmp_path / name)
        assert name in names(tmp_path) and len(names(tmp_path)) == 1
        with open_model(tmp_path / name):
            pass
        shutil.rmtree(tmp_path / name)


def test_two_conversions_to_one_place(source, tmp_path):
    """The second finds the place taken and leaves nothing behind."""
    process = slow_command(source, tmp_path / "out")
    assert process.stdout.readline() == ".\n"
    convert(source, tmp_path / "out", to="diffusers")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "exists already" in errors
    assert names(tmp_path) == ["out"] and "model_index.json" in names(tmp_path / "out")
