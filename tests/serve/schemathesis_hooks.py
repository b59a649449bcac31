"""What schemathesis may not ask for: drawings that take minutes. Everything else is as it likes."""

import schemathesis

SMALL = {
    "width": 64,
    "height": 64,
    "steps": 1,
    "count": 1,
    "n": 1,
    "batch_size": 1,
    "n_iter": 1,
    "size": "64x64",
}


@schemathesis.hook
def before_call(context, case, kwargs):
    """Make a drawing small, where it would be drawn at all."""
    path, body = case.operation.path, case.body
    if not isinstance(body, dict) or not path.endswith(("img", "generations", "edits", "jobs")):
        return
    for name in names(path):
        # A value of another type, or out of bounds, stays: it is refused before it is drawn.
        if name not in body or _is_drawable(name, body[name]):
            body[name] = SMALL[name]


def _is_drawable(name, value):
    if value is None or name == "size":
        return True
    try:
        return 0 < float(value) <= 2048  # "64" is as good as 64
    except (TypeError, ValueError):
        return False


def names(path):
    """The fields that make a drawing large, as the API at a path calls them."""
    if path.endswith(("generations", "edits")):
        return {"n", "size"}
    if path.endswith("jobs"):
        return {"width", "height", "steps", "count"}
    return {"width", "height", "steps", "batch_size", "n_iter"}
