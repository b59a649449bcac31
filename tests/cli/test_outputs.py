"""Names of pictures: patterns, free names, whole files."""

import os
import threading

import pytest

from mlx_maple.cli import Failure
from mlx_maple.cli._outputs import Outputs, parse_output, slug, whole_file

FIELDS = {
    "prompt": "A red maple-leaf, on/../yellow",
    "seed": 7,
    "index": 3,
    "model": "sd",
    "sampler": "ddim",
    "schedule": "leading",
    "steps": 20,
    "guidance": 7.5,
    "width": 512,
    "height": 640,
    "date": "2031-05-07",
    "time": "142501",
}


def save(path):
    path.write_bytes(b"picture")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "a-red-maple-leaf-on-yellow-7.png"),
        ("x.webp", "x.webp"),
        ("pictures/", "pictures/a-red-maple-leaf-on-yellow-7.png"),
        ("pictures", "pictures/a-red-maple-leaf-on-yellow-7.png"),
        ("{date}/{index:4}-{seed}.jpg", "2031-05-07/0003-7.jpg"),
        ("{seed}-{seed:2}.png", "7-07.png"),
        ("{sampler}-{steps}-{guidance}-{width}x{height}.png", "ddim-20-7.5-512x640.png"),
    ],
)
def test_patterns(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    assert str(parse_output(text, False).path(FIELDS)) == expected


@pytest.mark.parametrize("seed", [0, -5, 4294967295, 2**64 - 1])
def test_a_seed_is_written_whole(seed):
    name = Outputs("{seed}.png").path({**FIELDS, "seed": seed})
    assert name.stem == str(seed)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("x.tiff", 2, "pictures are written as .png, .jpg, .jpeg, .webp, not .tiff"),
        ("{seed.__class__}.png", None, ""),
        ("{sead}.png", 2, "no field {sead}; there are prompt, seed"),
    ],
)
def test_what_cannot_be_a_name(tmp_path, monkeypatch, text, code, words):
    monkeypatch.chdir(tmp_path)
    if code is None:  # not a field at all: taken as it is written, never looked up
        assert str(parse_output(text, False).path(FIELDS)) == text
        return
    with pytest.raises(Failure) as caught:
        parse_output(text, False)
    assert caught.value.exit_code == code and words in str(caught.value)


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="not a folder") as caught:
        parse_output(str(tmp_path / "file" / "x.png"), False)
    assert caught.value.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Failure, match="no permission"):
        parse_output(str(tmp_path / "x.png"), False)


def test_nothing_is_overwritten_unless_asked(tmp_path):
    outputs = Outputs(str(tmp_path / "x.png"))
    names = [outputs.write(FIELDS, save).name for _ in range(3)]
    assert names == ["x.png", "x-2.png", "x-3.png"]
    assert Outputs(str(tmp_path / "x.png"), overwrite=True).write(FIELDS, save).name == "x.png"
    assert len(list(tmp_path.iterdir())) == 3


def test_runs_at_once_take_different_names(tmp_path):
    outputs, names = Outputs(str(tmp_path / "x.png")), []
    threads = [
        threading.Thread(target=lambda: names.append(outputs.write(FIELDS, save)))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 12 == len(list(tmp_path.iterdir()))


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(OSError(95, "no links")))
    outputs = Outputs(str(tmp_path / "x.png"))
    assert [outputs.write(FIELDS, save).name for _ in range(2)] == ["x.png", "x-2.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-2.png", "x.png"]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        Outputs(str(tmp_path / "x.png")).write(FIELDS, fail)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "y.npy") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Cat!", "a-cat"),
        ("", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
        (".hidden", "hidden"),
        ("木 の葉", "木-の葉"),
        ("x" * 300, "x" * 48),
        ("🍁", "untitled"),
        ("a\nb\0c", "a-b-c"),
    ],
)
def test_prompts_as_names(text, expected):
    assert slug(text) == expected
