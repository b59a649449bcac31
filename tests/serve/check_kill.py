"""SIGKILL at any time: finished pictures are there, the rest is offered again, nothing is torn.

Run by `make serve-check`.
"""

import io
import os
import random
import time

from live import Server
from PIL import Image

KILLS = 6
JOBS = 5
JOB = {"prompt": "a red maple leaf", "steps": 12, "width": 64, "height": 64}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def worker_of(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(word) for word in file.read().split()]
    return children[0]


def test_killed_at_any_time(tmp_path):
    data = tmp_path / "data"
    chance = random.Random(7)
    finished: dict[str, str] = {}  # pictures that a client has been told of, by id
    asked: set[str] = set()
    for kill in range(KILLS):
        server = Server(data)
        with server.client() as client:
            # What was there before is there now, whole.
            for picture_id, url in finished.items():
                image = Image.open(io.BytesIO(client.get(url).content))
                image.load()
                assert image.info["parameters"], picture_id
            jobs = client.get("/api/v1/jobs").json()["jobs"]
            states = {job["id"]: job["state"] for job in jobs}
            known = set(states) | {picture.partition("-")[0] for picture in finished}
            assert asked <= known, "a job was lost"
            offered = [job for job in jobs if job["state"] == "offered"]
            assert not [job for job in jobs if job["state"] in ("running", "failed")]
            for job in offered:
                assert client.post(f"/api/v1/jobs/{job['id']}/resume").status_code == 200
            for number in range(JOBS - len(offered)):
                answer = client.post("/api/v1/jobs", json={**JOB, "seed": number})
                asked.add(answer.json()["id"])
            worker = worker_of(server.pid)
            # Every other time not before something was finished, however busy the machine is.
            before, patience = len(finished), time.monotonic() + 60
            end = time.monotonic() + chance.uniform(0.05, 2.5)
            while time.monotonic() < end:
                for job in client.get("/api/v1/jobs").json()["jobs"]:
                    finished |= {p["id"]: p["url"] for p in job["pictures"]}
                if kill % 2 and len(finished) == before:
                    assert time.monotonic() < patience
                    end = time.monotonic() + chance.uniform(0.0, 0.5)
        server.kill()
        deadline = time.monotonic() + 10
        while is_alive(worker):
            assert time.monotonic() < deadline, f"the worker outlives its server (kill {kill})"
            time.sleep(0.05)
        for folder in ("pictures", "inputs"):
            for path in (data / folder).iterdir():
                if path.suffix == ".png":
                    Image.open(path).load()  # raises where it is torn
    assert finished, "nothing was finished before a kill: the test shows nothing"
    with Server(data) as server, server.client() as client:
        listed = client.get("/api/v1/pictures?limit=200").json()["pictures"]
        assert finished.keys() <= {picture["id"] for picture in listed}
        assert not list((data / "pictures").glob(".*.tmp"))
        for job in client.get("/api/v1/jobs").json()["jobs"]:
            if job["state"] == "offered":
                client.post(f"/api/v1/jobs/{job['id']}/resume")
        end = time.monotonic() + 120
        while (
            client.get("/api/v1/health").json()["queued"]
            or client.get("/api/v1/health").json()["running"]
        ):
            assert time.monotonic() < end
            time.sleep(0.1)
        listed = client.get("/api/v1/pictures?limit=200").json()["pictures"]
        assert {picture["job"] for picture in listed} == asked  # none lost, none drawn by nobody


def test_ctrl_c_ends_it_in_order(tmp_path):
    with Server(tmp_path / "data") as server:
        worker = worker_of(server.pid)
        assert server.stop() == 0
    assert not is_alive(worker) or time.sleep(6) or not is_alive(worker)
