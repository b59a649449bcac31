"""The worker's end of the line: what goes wrong in a drawing is told, and ends only that job."""

import io
import json
import threading
from multiprocessing import Pipe

import pytest
from known import QUICK, TINY
from PIL import Image

from mlx_maple.serve.config import Limits
from mlx_maple.serve.worker import OTHERS, ServerGone, Worker, _key

HOW = {"source": str(TINY), "dtype": None, "quantize": None, "low_memory": False}


@pytest.fixture(scope="module")
def model():
    import mlx_maple as maple

    return maple.load(TINY)


@pytest.fixture
def line(model):
    """A worker with a model in memory, and the other end of its line."""
    ours, theirs = Pipe()
    worker = Worker(theirs)
    worker._models[_key(HOW)] = model, dict.fromkeys(OTHERS)
    yield worker, ours
    for end in (ours, theirs):
        end.close()


def order(tmp_path, **values):
    job = {"job": "0" * 24, "model": HOW, "inputs": {}, "folder": str(tmp_path), "previews": False}
    return {**job, "arguments": dict(QUICK), **values}


def told(ours):
    found = []
    while ours.poll():
        found.append(json.loads(ours.recv_bytes()))
    return found


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (MemoryError(), "no_memory"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), "no_memory"),
        (RuntimeError("[read] Unable to read 8 bytes from file."), "failed"),
        (ZeroDivisionError("x"), "failed"),
        (OSError(28, "No space left on device"), "failed"),
        (EOFError("Ran out of input"), "failed"),  # of a model file, not of the line
    ],
)
def test_a_fault_is_told_in_one_line(line, tmp_path, monkeypatch, fault, code):
    worker, ours = line

    def broken(*args, **values):
        raise fault

    monkeypatch.setattr("mlx_maple.drawing.phases._phases", broken)
    worker._on_draw(**order(tmp_path))
    message = told(ours)[-1]
    assert message["kind"] == "failed" and message["error"]["code"] == code
    assert "\n" not in message["error"]["message"]
    # After running out of memory nothing is held that could be let go.
    assert bool(worker._models) == (code != "no_memory")


def test_a_drawing_writes_its_picture_whole(line, tmp_path):
    worker, ours = line
    worker._on_draw(**order(tmp_path))
    done = told(ours)[-1]
    assert done["kind"] == "done" and done["pictures"][0]["settings"]["seed"] == 7
    assert [path.name for path in tmp_path.iterdir()] == [f"{'0' * 24}-0.png"]


@pytest.mark.parametrize("count", [2, 3])
def test_pictures_that_a_part_is_put_back_into_are_bounded(line, tmp_path, monkeypatch, count):
    """They are as large as what was sent, whatever the size that is drawn."""
    monkeypatch.setattr("mlx_maple.serve.worker.LIMITS", Limits(whole_pixels=2 * 40 * 30))
    for name, colour in (("image", "red"), ("mask", "white")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{name}.png")
    inputs = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}
    worker, ours = line
    arguments = {**QUICK, "only_masked": 0, "count": count}
    worker._on_draw(**order(tmp_path, inputs=inputs, arguments=arguments))
    last = told(ours)[-1]
    if count == 2:
        assert [(each["width"], each["height"]) for each in last["pictures"]] == [(40, 30)] * 2
    else:
        assert last["error"]["code"] == "invalid"
        assert "3 pictures of 40x30 (3,600 pixels) would come back" in last["error"]["message"]


def test_of_a_part_the_size_is_not_the_pictures(line, tmp_path):
    """As a whole this one would be 64 wide and thousands high."""
    for name, colour in (("image", "red"), ("mask", "white")):
        Image.new("RGB", (2, 400), colour).save(tmp_path / f"{name}.png")
    inputs = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}
    worker, ours = line
    arguments = {name: value for name, value in QUICK.items() if name != "height"}
    for more, kind in (({"only_masked": 0}, "done"), ({}, "failed")):
        worker._on_draw(**order(tmp_path, inputs=inputs, arguments={**arguments, **more}))
        assert told(ours)[-1]["kind"] == kind


def test_a_word_to_cancel_counts_for_its_own_job_only(line, tmp_path):
    worker, ours = line
    for job, kind in (("1" * 24, "done"), ("0" * 24, "cancelled")):
        ours.send_bytes(json.dumps({"kind": "cancel", "job": job}).encode())
        worker._on_draw(**order(tmp_path))
        assert told(ours)[-1]["kind"] == kind


def test_a_job_is_cancelled_while_its_model_is_converted(line, tmp_path, monkeypatch):
    from mlx_maple import loading

    worker, ours = line
    done = []

    def load(progress, **how):
        for number in range(10):
            progress(number, 10, "converting")
            done.append(number)

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(worker, "_make_room", lambda how: None)
    ours.send_bytes(json.dumps({"kind": "cancel", "job": "0" * 24}).encode())
    worker._on_draw(**order(tmp_path, model={**HOW, "source": "other"}))
    assert told(ours)[-1]["kind"] == "cancelled" and not done


def test_a_job_that_waits_for_another_model_is_cancelled_too(line, tmp_path, monkeypatch):
    """The default model is loaded before any job, and what comes in meanwhile is read there."""
    from mlx_maple import loading

    worker, ours = line

    def load(progress, **how):
        progress(0, 1, "converting")
        raise OSError("no such model")

    monkeypatch.setattr(loading, "load", load)
    monkeypatch.setattr(worker, "_make_room", lambda how: None)
    job = order(tmp_path)
    for kind, values in (("draw", job), ("cancel", {"job": job["job"]})):
        ours.send_bytes(json.dumps({"kind": kind, **values}).encode())
    worker._on_load(model={**HOW, "source": "other"})
    (message,) = worker._later
    worker._on_draw(**{name: value for name, value in message.items() if name != "kind"})
    assert told(ours)[-1]["kind"] == "cancelled"


def test_errors_name_files_without_their_folders(line, tmp_path, monkeypatch):
    worker, ours = line
    torn = tmp_path / "torn"
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, "PNG")
    torn.write_bytes(buffer.getvalue()[:500])
    worker._on_draw(**order(tmp_path, inputs={"image": str(torn)}))
    error = told(ours)[-1]["error"]
    assert error["code"] == "unusable" and error["message"].startswith("image: a broken picture")

    def broken(*args, **values):
        raise OSError(28, "No space left on device", str(tmp_path / "file.png"))

    monkeypatch.setattr("mlx_maple.drawing.phases._phases", broken)
    worker._on_draw(**order(tmp_path))
    assert told(ours)[-1]["error"]["message"] == "file.png: No space left on device"


def test_a_size_that_follows_a_pictures_is_bounded(line, tmp_path):
    worker, ours = line
    Image.new("RGB", (8, 64)).save(tmp_path / "tall.png")
    for width, kind in ((64, "done"), (512, "failed")):
        job = order(tmp_path, inputs={"image": str(tmp_path / "tall.png")})
        job["arguments"] = {**QUICK, "width": width, "steps": 1, "strength": 1.0}
        del job["arguments"]["height"]
        worker._on_draw(**job)
        assert told(ours)[-1]["kind"] == kind


def test_a_plan_is_made_once(model):
    """Each new one takes memory that MLX keeps: a thousand drawings would take 400 MB."""
    from mlx_maple.cli import _memory, _plan

    plans = [
        _memory.plan_of(_plan.request_of(model, {"width": width}, low_memory=True))
        for width in (64, 64, 128)
    ]
    assert plans[0] is plans[1] and plans[0] is not plans[2]


def test_it_ends_when_the_server_is_gone(model):
    ours, theirs = Pipe()
    worker = Worker(theirs)
    ours.close()
    ended = []

    def run():
        try:
            worker.run()
        except ServerGone:
            ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    theirs.close()
    assert ended == [True]
