"""`maple serve` under load: many clients that poll, many jobs in a row, and what HTTP adds.

    python benchmarks/serve_load.py polling  [--clients 200] [--jobs 20]
    python benchmarks/serve_load.py endurance [--jobs 1000]
    python benchmarks/serve_load.py latency  [--pictures 20]
    python benchmarks/serve_load.py first

polling    each client asks for progress once a second while jobs run: seconds from a request to its
           answer, as clients measure them; no job may be lost.
endurance  jobs one after the other on the tiny model: resident memory of the server and of its
           worker after the first 50 jobs and at the end.
latency    seconds from a request to the picture's bytes, less what the Python API takes for the
           same picture in the worker (its own timing of that very drawing); and the processor time
           that the server takes for one, of this request and one that lists jobs.
first      seconds from the command to the first picture of the embedded model.

Each prints one JSON object, with the machine's load before and after.
"""

import argparse
import asyncio
import base64
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2

TINY = Path(__file__).resolve().parent.parent / "tests" / "data" / "tiny-model"
_ADDRESS = re.compile(r"http://\S+:(\d+)/")
LEAF = {"prompt": "a red maple leaf on a yellow background", "seed": 7}


class Server:
    """`maple serve` on a free port; SIGINT at the end."""

    def __init__(self, folder: Path, model: str | None) -> None:
        self.began = time.perf_counter()
        self._log = open(folder / "log", "w")
        command = [sys.executable, "-m", "mlx_maple", "serve", "--port", "0"]
        command += ["--data", str(folder / "data"), *(["-m", model] if model else [])]
        self.process = subprocess.Popen(command, stderr=self._log)
        while not (match := _ADDRESS.search((folder / "log").read_text())):
            if self.process.poll() is not None:
                raise SystemExit((folder / "log").read_text())
            time.sleep(0.005)
        self.base = f"http://127.0.0.1:{match[1]}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


def resident(pid: int) -> int:
    """Resident memory in bytes (Linux)."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", text)
    assert match
    return int(match[1]) * 1024


def worker_of(pid: int) -> int:
    """The server's child that draws: the one with the most memory."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return max(map(int, children), key=resident)


def processor_seconds(pid: int) -> float:
    """Processor time that a process has taken (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_model(client: httpx2.Client) -> None:
    while client.get("/api/v1/system").json()["worker"]["state"] != "idle":
        time.sleep(0.05)


async def polled(server: Server, clients: int, jobs: int, steps: int) -> dict:
    """What clients see that poll while jobs run."""
    seconds: list[float] = []
    wrong: list[str] = []
    limits = httpx2.Limits(max_connections=clients + 20, max_keepalive_connections=clients + 20)
    async with httpx2.AsyncClient(base_url=server.base, timeout=60, limits=limits) as http:
        ids = []
        for number in range(jobs):
            draw = {**LEAF, "seed": number, "steps": steps, "count": 1}
            answer = await http.post("/api/v1/jobs", json=draw)
            assert answer.status_code == 202, answer.text
            ids.append(answer.json()["id"])
        is_over = asyncio.Event()

        async def poll(number: int) -> None:
            await asyncio.sleep(number / clients)  # not all in the same moment
            while not is_over.is_set():
                began = time.perf_counter()
                try:
                    answer = await http.get("/sdapi/v1/progress")
                    seconds.append(time.perf_counter() - began)
                    if answer.status_code != 200:
                        wrong.append(answer.text[:100])
                except httpx2.TransportError as error:
                    wrong.append(repr(error))
                await asyncio.sleep(max(0.0, 1 - (time.perf_counter() - began)))

        tasks = [asyncio.create_task(poll(number)) for number in range(clients)]
        began, left = time.perf_counter(), list(ids)
        cancelled = []
        while left:
            try:
                state = (await http.get(f"/api/v1/jobs/{left[0]}")).json()["state"]
                if state in ("done", "failed", "cancelled"):
                    left.pop(0)
            except httpx2.TransportError as error:
                wrong.append(repr(error))
            await asyncio.sleep(0.2)
        took = time.perf_counter() - began
        # One more, to be cancelled: how long the answer takes while it is drawn.
        job = (await http.post("/api/v1/jobs", json={**LEAF, "steps": 200})).json()["id"]
        await asyncio.sleep(1)
        start = time.perf_counter()
        await http.post(f"/api/v1/jobs/{job}/cancel")
        cancelled.append(time.perf_counter() - start)
        is_over.set()
        await asyncio.gather(*tasks)
        states = [(await http.get(f"/api/v1/jobs/{i}")).json()["state"] for i in ids]
    seconds.sort()
    return {
        "clients": clients,
        "jobs": jobs,
        "done": states.count("done"),
        "lost": jobs - states.count("done"),
        "seconds": round(took, 2),
        "polls": len(seconds),
        "wrong": len(wrong),
        "first_wrong": wrong[:1],
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 2),
        "p99_ms": round(1000 * seconds[int(len(seconds) * 0.99)], 2),
        "most_ms": round(1000 * seconds[-1], 2),
        "cancel_ms": round(1000 * cancelled[0], 2),
    }


def polling(args: argparse.Namespace, folder: Path) -> dict:
    with Server(folder, None) as server:
        with httpx2.Client(base_url=server.base, timeout=60) as client:
            wait_for_model(client)
        return asyncio.run(polled(server, args.clients, args.jobs or 20, args.steps))


def endurance(args: argparse.Namespace, folder: Path) -> dict:
    jobs, marks = args.jobs or 1000, {}
    draw = {**LEAF, "steps": 1, "width": 64, "height": 64}
    with Server(folder, str(TINY)) as server:
        with httpx2.Client(base_url=server.base, timeout=120) as client:
            wait_for_model(client)
            for number in range(1, jobs + 1):
                asked = {"prompt": draw["prompt"], "seed": number, "steps": 1}
                size = {"width": 64, "height": 64}
                answer = client.post("/sdapi/v1/txt2img", json={**asked, **size})
                assert answer.status_code == 200, answer.text
                if number in (50, jobs // 2, jobs):
                    pid = server.process.pid
                    marks[number] = {"server": resident(pid), "worker": resident(worker_of(pid))}
        total = {number: sum(mark.values()) for number, mark in marks.items()}
    return {
        "jobs": jobs,
        "resident": marks,
        "growth_percent": round(100 * (total[jobs] / total[50] - 1), 2),
    }


def latency(args: argparse.Namespace, folder: Path) -> dict:
    added, whole, processor = [], [], 0.0
    with Server(folder, None) as server, httpx2.Client(base_url=server.base, timeout=120) as client:
        wait_for_model(client)
        for number in range(args.pictures + 2):
            if number == 2:
                processor = processor_seconds(server.process.pid)
            began = time.perf_counter()
            asked = {**LEAF, "seed": number, "steps": args.steps}
            answer = client.post("/sdapi/v1/txt2img", json=asked).json()
            base64.b64decode(answer["images"][0])
            took = time.perf_counter() - began
            job = client.get("/api/v1/jobs").json()["jobs"][0]
            if number >= 2:  # the first ones warm up
                added.append(took - job["timings"]["total"])
                whole.append(took)
        processor = processor_seconds(server.process.pid) - processor
    return {
        "pictures": args.pictures,
        "steps": args.steps,
        "request_ms_median": round(1000 * statistics.median(whole), 1),
        "added_ms_median": round(1000 * statistics.median(added), 1),
        "added_ms_least": round(1000 * min(added), 1),
        "added_ms_most": round(1000 * max(added), 1),
        "server_processor_ms": round(1000 * processor / args.pictures, 1),
    }


def first(args: argparse.Namespace, folder: Path) -> dict:
    with Server(folder, None) as server, httpx2.Client(base_url=server.base, timeout=120) as client:
        answers = time.perf_counter() - server.began
        client.post("/sdapi/v1/txt2img", json={**LEAF, "steps": args.steps}).raise_for_status()
        drawn = time.perf_counter() - server.began
        timings = client.get("/api/v1/jobs").json()["jobs"][0]["timings"]
    return {
        "steps": args.steps,
        "answers_s": round(answers, 2),
        "first_picture_s": round(drawn, 2),
        "of_that_drawing_s": round(timings["total"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("polling", "endurance", "latency", "first"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = globals()[args.what](args, Path(folder))
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    load = {"load_before": round(before, 2), "load_after": round(os.getloadavg()[0], 2)}
    print(json.dumps({"what": args.what, **found, **machine, **load}))


if __name__ == "__main__":
    main()
