"""What outlives the process, and what a killed one leaves."""

import numpy as np
import pytest
from PIL import Image

from mlx_maple import images
from mlx_maple.metadata import Settings
from mlx_maple.serve import store as module
from mlx_maple.serve.store import InUse, JobRecord, Picture, Store, new_id


@pytest.fixture
def store(tmp_path):
    opened = Store(tmp_path / "data")
    yield opened
    opened.close()


def record(state="queued", **draw):
    return JobRecord(
        id=new_id(),
        client="someone",
        state=state,
        created=1.0,
        started=None,
        finished=None,
        draw={"prompt": "a leaf", **draw},
        outcome={},
    )


def drawn(store, job, index=0, prompt="a leaf"):
    """A picture's file, as the worker writes it."""
    pixels = np.full((64, 64, 3), 40 * index, np.uint8)
    path = store.pictures / f"{job}-{index}.png"
    images.save_image(Image.fromarray(pixels), path, Settings(prompt=prompt, seed=index))
    return Picture(
        id=path.stem,
        job=job,
        index=index,
        created=2.0,
        width=64,
        height=64,
        settings={"prompt": prompt, "seed": index},
    )


def again(store, folder):
    """The folder after a kill: nothing was closed in order, but the lock is free."""
    store.close()
    return Store(folder)


def test_jobs_that_were_not_drawn_are_offered_again(store):
    waiting, begun, done = record(), record("running"), record()
    for job in (waiting, begun, done):
        store.add_job(job)
    store.finish(done.id, "done", {}, [drawn(store, done.id)])
    store = again(store, store.folder)
    assert {job.id for job in store.recover()} == {waiting.id, begun.id}
    assert store.job(done.id).state == "done"
    store.close()


def test_a_picture_whose_server_was_killed_before_it_knew_is_in_the_history(store):
    job = record("running", count=2)
    store.add_job(job)
    drawn(store, job.id, 0)
    drawn(store, job.id, 1)
    store = again(store, store.folder)
    assert store.recover() == []
    assert store.job(job.id).state == "done"
    assert [picture.id for picture in store.pictures_of(job.id)] == [f"{job.id}-0", f"{job.id}-1"]
    assert store.history(10, None, "")[0].settings["seed"] == 1
    store.close()


def test_a_job_half_of_whose_pictures_are_there_is_offered(store):
    job = record("running", count=2)
    store.add_job(job)
    drawn(store, job.id, 0)
    store = again(store, store.folder)
    assert [left.id for left in store.recover()] == [job.id]
    assert len(store.pictures_of(job.id)) == 1
    store.close()


def test_what_is_torn_is_taken_away_and_what_is_foreign_is_left_alone(store):
    torn = store.pictures / ".0123456789abcdef.tmp"
    torn.write_bytes(b"\x89PNG half")
    foreign = store.pictures / "holiday.png"
    foreign.write_bytes(b"not ours")
    broken = store.pictures / f"{new_id()}-0.png"
    broken.write_bytes(b"\x89PNG half")
    store.recover()
    assert not torn.exists() and foreign.exists() and broken.exists()
    assert store.history(10, None, "") == []


def test_inputs_live_as_long_as_their_job_waits_or_its_pictures_are_kept(store):
    job, other, done = record(), record(), record(count=2)
    for each in (job, other, done):
        store.add_job(each)
        store.keep_input(each.id, "image", b"picture")
    store.finish(job.id, "cancelled", {}, [])
    pictures = [drawn(store, done.id, index) for index in range(2)]
    store.finish(done.id, "done", {}, pictures)
    assert store.kept_input(f"{job.id}-image") is None
    store.recover()
    for each in (other, done):
        assert store.kept_input(f"{each.id}-image").read_bytes() == b"picture"
    store.remove_picture(pictures[0])
    assert store.kept_input(f"{done.id}-image")
    store.remove_picture(pictures[1])
    assert store.kept_input(f"{done.id}-image") is None
    assert store.kept_input(f"{other.id}-image")


def test_what_a_job_left_half_way_goes_with_its_end(store):
    """Enlarged pictures; not what pictures started from that an earlier try had drawn."""
    job, again = record(), record(count=2)
    (store.enlarged / f"{job.id}-image-00.png").write_bytes(b"")
    store.finish(job.id, "failed", {}, [])
    assert not any(store.enlarged.iterdir())
    store.add_job(again)
    store.keep_input(again.id, "image", b"picture")
    drawn(store, again.id, 0)
    assert [left.id for left in store.recover()] == [again.id]  # its second picture is missing
    store.finish(again.id, "cancelled", {}, [])
    assert store.kept_input(f"{again.id}-image")


def test_jobs_that_left_nothing_are_let_go_while_it_runs(store, monkeypatch):
    monkeypatch.setattr(module, "KEPT_JOBS", 3)
    monkeypatch.setattr(module, "FORGET_EACH", 5)
    for _ in range(11):
        job = record()
        store.add_job(job)
        store.finish(job.id, "cancelled", {}, [])
    assert len(store.recent_jobs(99)) == 4 and store.job(job.id)


def test_an_input_from_the_history_is_kept_without_links_too(store, monkeypatch):
    source = store.pictures / "source.png"
    source.write_bytes(b"picture")

    def refused(*paths):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    job = record()
    store.keep_input(job.id, "image", source)
    assert store.kept_input(f"{job.id}-image").read_bytes() == b"picture"


def test_a_name_of_an_input_leads_to_no_other_file(store):
    (store.inputs / "elsewhere").write_bytes(b"no")
    for name in ("elsewhere", "../lock", f"{'0' * 24}-../../lock", "", f"{'0' * 24}-image"):
        assert store.kept_input(name) is None


def test_one_server_at_a_time(store):
    with pytest.raises(InUse) as refused:
        Store(store.folder)
    assert "--data" in str(refused.value) and "\n" not in str(refused.value)


def test_a_search_takes_its_words_as_they_are(store):
    for prompt in ("100% leaf", "1000 leaves"):
        job = record()
        store.add_job(job)
        store.finish(job.id, "done", {}, [drawn(store, job.id, prompt=prompt)])
    assert [p.settings["prompt"] for p in store.history(10, None, "100%")] == ["100% leaf"]
    first, second = store.history(10, None, "lea")
    assert store.history(10, first.number, "lea") == [second]


@pytest.mark.parametrize("prompt", ["un été à Montréal", "紅葉", 'a "quoted" leaf', "a\\b"])
def test_a_search_finds_words_that_are_written_with_escapes(store, prompt):
    job = record()
    store.add_job(job)
    store.finish(job.id, "done", {}, [drawn(store, job.id, prompt=prompt)])
    assert len(store.history(10, None, prompt)) == 1


def test_a_job_that_is_drawn_again_takes_the_place_of_its_first_try(store):
    job = record("running", count=2)
    store.add_job(job)
    first = drawn(store, job.id, 0, prompt="first")
    store = again(store, store.folder)
    store.recover()
    small = store.thumbnail(first)
    pictures = [drawn(store, job.id, index, prompt="second") for index in (0, 1)]
    store.finish(job.id, "done", {}, pictures, 3.0)
    prompts = [picture.settings["prompt"] for picture in store.pictures_of(job.id)]
    assert prompts == ["second", "second"] and not small.exists()
    assert store.job(job.id).started == 3.0
    store.close()


def test_a_removed_picture_leaves_nothing(store):
    job = record()
    store.add_job(job)
    picture = drawn(store, job.id)
    store.finish(job.id, "done", {}, [picture])
    small = store.thumbnail(picture)
    assert small.exists()
    store.remove_picture(picture)
    assert not small.exists() and not store.picture_path(picture).exists()
    assert store.picture(picture.id) is None
