"""What the server's tests share: the tiny model, a quick drawing, and patience."""

import time
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny-model"
BASE = "http://127.0.0.1:7860"
# Two steps of a small picture: enough to be drawn, watched and told of.
QUICK = {"prompt": "a red maple leaf", "seed": 7, "steps": 2, "width": 64, "height": 64}


def wait_until(condition, seconds=60):
    """What ``condition`` gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
