"""Runs the hostile corpus and watches what happens: ``python hostile_harness.py STAGE``.

Each case has a process of its own, forked from a warm one, with an address space limit and an audit
hook that notes every event of executing, importing, starting processes, writing or deleting. One
line of JSON a case goes to standard output. A program rather than a test, because an audit hook
cannot be taken off again and limits would bind the whole test run.

Stages: "reader" opens and reads everything; "convert" converts to a maple folder; "control"
unpickles as a careless program would, to show that the hook and the marker notice.
"""

import json
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpus
import torch_files as tf

from maple_convert.errors import ConvertError
from maple_convert.readers import open_checkpoint, read_json

CHANGING = ("open for writing", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chmod")
SHOWN = 100  # events told of one case
MEMORY = 500 << 20  # bytes that a case may add to the address space
SECONDS = 20  # until a case is killed; the tests ask for far less
NOBODY = 65534
WATCHED = (
    "exec", "compile", "import", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork",
    "os.startfile", "subprocess.", "pickle.", "marshal.", "code.__new__", "function.__new__",
    "ctypes.", "socket.", "urllib.", "ftplib.", "shutil.", "tempfile.", "os.remove", "os.rename",
    "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.putenv", "os.unsetenv", "os.kill", "webbrowser.", "cpython.run_", "mmap.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

events: list[str] = []
armed = False


def watch(event: str, args: tuple[Any, ...]) -> None:
    if not armed:
        return
    if event == "open":
        _, mode, flags = args
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & WRITING:
            events.append(f"open for writing {args[0]!r}"[:200])
    elif event.startswith(WATCHED):
        events.append(f"{event} {args!r}"[:200])


def read_everything(path: Path, out: Path) -> None:
    """The reader's stage: metadata, then every tensor."""
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)


def convert(path: Path, out: Path) -> None:
    """The whole converter, into a folder that must not exist afterwards."""
    from maple_convert import convert

    convert(path, out)


def unpickle(path: Path, out: Path) -> None:
    """What no reader may do."""
    with path.open("rb") as file:
        pickle.load(file)


ACTIONS: dict[str, Callable[[Path, Path], None]] = {
    "reader": read_everything,
    "convert": convert,
    "control": unpickle,
}


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            status = os.lstat(os.path.join(root, name))
            facts = (status.st_mode, status.st_size, status.st_mtime_ns)
            found[os.path.relpath(os.path.join(root, name), folder)] = facts
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def limit_memory() -> None:
    used = address_space()
    if used:  # elsewhere only the peak is measured
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.alarm(SECONDS)


def attempt(case: corpus.Case, stage: str, path: Path, out: Path) -> dict[str, Any]:
    """Run one case in this process and tell what it did."""
    global armed
    limit_memory()
    warnings.simplefilter("error")
    before = open_files()
    if case.unprivileged and os.geteuid() == 0:
        os.seteuid(NOBODY)
    result: dict[str, Any] = {"error": None, "exit_code": 0, "message": "", "reason": ""}
    started = time.perf_counter()
    armed = True
    try:
        ACTIONS[stage](path, out)
    except ConvertError as error:
        result.update(error=type(error).__name__, exit_code=error.exit_code, message=str(error))
        result["reason"] = error.reason
        result["path"] = str(error.path)
    except BaseException as error:
        result.update(error=type(error).__name__, exit_code=-1, message=repr(error))
    armed = False
    result["seconds"] = time.perf_counter() - started
    result["left_open"] = open_files() - before
    # The converter writes beside its output and cleans up: what is left tells.
    harmless = CHANGING if stage == "convert" else ()
    result["events"] = [event for event in events if not event.startswith(harmless)][:SHOWN]
    return result


def forked(work: Callable[[], Any]) -> tuple[Any, Any]:
    """The result of ``work`` in a process of its own, and what that process used."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            text = json.dumps(work())
        except BaseException as error:
            text = json.dumps({"error": type(error).__name__, "message": repr(error)})
        with os.fdopen(send, "w") as pipe:
            pipe.write(text)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(child, 0)
    killed = {"error": "killed", "message": f"ended with status {status}"}
    return (json.loads(text) if text else killed), usage


def make_all(cases: list[corpus.Case], folder: Path) -> list[str]:
    """Make every case in a folder of its own; the paths to open."""
    made = []
    for number, case in enumerate(cases):
        place = folder / str(number) / "case"
        place.mkdir(mode=0o755, parents=True)
        made.append(os.fsdecode(case.make(place)))
    return made


def run(case: corpus.Case, stage: str, folder: Path, path: Path) -> dict[str, Any]:
    place, out = folder / "case", folder / "out"
    before = snapshot(place)
    result, usage = forked(lambda: attempt(case, stage, path, out))
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    after = snapshot(place)
    result.update(
        name=case.name,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=peak,
        marker=(place / corpus.MARKER).exists(),
        changed=sorted(key for key in before | after if before.get(key) != after.get(key)),
        left_over=sorted(set(os.listdir(folder)) - {"case"}),
    )
    return result


def warm_up(folder: Path, stage: str) -> None:
    """Everything that Python and numpy load on first use, before anything is watched."""
    tree = {"a": np_view(), "b": tf.bfloat16(np_ones()), "text": "é", "x": [1.5, None]}
    good = [
        tf.write_torch_zip(folder / "a.pt", tree),
        tf.write_legacy(folder / "b.pt", tree),
        tf.write_legacy(folder / "c.pt", {"a": np_ones()}, protocol=1),
        corpus.write(folder / "d.safetensors", corpus.good_safetensors()),
    ]
    for path in good:
        read_everything(path, folder)
    for content in (b"", b"\x80\2Vab\\u0041\n.", b"<html>", b"{}", b"{", b"version https://"):
        try:
            open_checkpoint(corpus.write(folder / "e", content))
        except ConvertError:
            continue
    read_json(corpus.write(folder / "f.json", b'{"a": [1.0]}'))
    if stage == "convert":
        for path in good:
            try:
                convert(path, folder / "out")
            except ConvertError:
                continue
    for name in "abcdef":
        next(folder.glob(f"{name}*")).unlink()


def np_ones() -> Any:
    import numpy as np

    return np.ones(4, np.float32)


def np_view() -> Any:
    return tf.TorchTensor(tf.Storage(np_ones()), 0, (2,), (2,))


def main() -> None:
    stage = sys.argv[1]
    chosen = set(sys.argv[2:])
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the unprivileged case must reach its file
        warm_up(folder, stage)
        cases = [case for case in corpus.HOSTILE if not chosen or case.name in chosen]
        if stage == "reader":
            cases = [case for case in cases if case.stage == "reader"]
        made, _ = forked(lambda: make_all(cases, folder))
        if not isinstance(made, list):
            sys.exit(f"a case could not be made: {made}")
        sys.addaudithook(watch)
        for number, (case, path) in enumerate(zip(cases, made, strict=True)):
            print(json.dumps(run(case, stage, folder / str(number), Path(path))), flush=True)


if __name__ == "__main__":
    main()
