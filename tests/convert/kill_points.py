"""Kills a conversion at one moment after another, and tells what each leaves.

    python kill_points.py SOURCE SCRATCH NAME TO [OLDER]

A moment is anything that Python reports to an audit hook (opening, renaming, making and removing
files and folders) or one more tensor written. At the n-th one the process kills itself as the
system would, without any clean-up; of the many tensors few are tried. Each attempt has an empty
folder in SCRATCH and a process of its own, forked from a warm one; OLDER is a model that lies at
NAME before. One line of JSON a moment: what the output was then, and after a second run.
A program rather than a test, because an audit hook cannot be taken off again.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from maple_convert import ConvertError, convert, open_model

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
EVERY_TENSOR = 120


def attempt(source: Path, out: Path, to: str, fatal: int) -> None:
    """Convert, printing every moment, and die at the ``fatal``-th."""
    count = 0

    def moment(what: str) -> None:
        nonlocal count
        os.write(1, f"{what}\n".encode())
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in EVENTS and str(out.parent) in str(args):
            moment(f"{event} {Path(str(args[0])).name}")

    sys.addaudithook(hook)
    convert(source, out, to=to, progress=lambda done, total, label: moment(f"wrote to {label}"))


def forked(source: Path, out: Path, to: str, fatal: int) -> list[str]:
    """The moments of one attempt, the fatal one last; all of them where ``fatal`` is -1."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(send, 1)
        try:
            attempt(source, out, to, fatal)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(send)
    with os.fdopen(receive) as pipe:
        moments = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) != (fatal >= 0) or (fatal < 0 and status):
        raise SystemExit(f"the attempt to die at moment {fatal} ended with status {status}")
    return moments


def state(out: Path) -> str:
    """What lies there: nothing, something broken, or a whole model and its type."""
    if not out.exists():
        return "absent"
    try:
        with open_model(out) as model:
            dtypes = {t.dtype for part in model.components.values() for _, t in part.tensors()}
        return f"whole {' '.join(dtypes)}"
    except ConvertError as error:
        return f"broken: {error}"


def main() -> None:
    source, scratch, name, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    older = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    os.fsync = lambda handle: None  # the machine does not die here, only the process

    def place(number: int) -> Path:
        folder = scratch / f"at{number}"
        folder.mkdir()
        if older is not None:
            shutil.copytree(older, folder / name)
        return folder

    moments = forked(source, place(-1) / name, to, -1)
    wrote = [n for n, what in enumerate(moments) if what.startswith("wrote")]
    tried = sorted(set(range(len(moments))) - set(wrote) | set(wrote[::EVERY_TENSOR]))
    for fatal in tried:
        folder = place(fatal)
        out = folder / name
        what = forked(source, out, to, fatal)[-1]
        found = {"moment": what, "then": state(out)}
        found["left"] = sorted(set(os.listdir(folder)) - {name})
        if to == "maple" or found["then"] == "absent":
            convert(source, out, to=to, digest=False)
        found["after"] = state(out)
        found["left_after"] = sorted(set(os.listdir(folder)) - {name})
        print(json.dumps(found), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
