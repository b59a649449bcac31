"""Traced functions: what a thread has traced ends with the function, whoever called it last."""

import ast
import gc
import queue
import threading
import weakref
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_networks import CONTEXT, SMALL, normal, unet

import mlx_maple.engine
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet
from mlx_maple.engine.traced import Traced

BYTES = 4 << 20


@pytest.fixture
def elsewhere():
    """What has a call made in one other thread, which goes on."""
    calls, results = queue.SimpleQueue(), queue.SimpleQueue()

    def work():
        while (call := calls.get()) is not None:
            results.put(call())
            del call
        mx.clear_streams()  # or MLX may end the process when the thread ends

    thread = threading.Thread(target=work)
    thread.start()
    yield lambda call: (calls.put(call), results.get())[1]
    calls.put(None)
    thread.join()


def times(number):
    """A function that multiplies, and has something large to keep."""
    large = mx.full((BYTES // 4,), float(number))
    mx.eval(large)
    return lambda parts: [number * parts[0] + large[:3]]


def run(function, x):
    return function([x])[0].tolist()


def left_over(wrap, elsewhere):
    """How often the other thread ran a function of before, and the bytes that are still held."""
    x, stale = mx.ones((3,)), 0
    mx.eval(x)
    gc.collect()
    before = mx.get_active_memory()
    for number in range(1, 8):
        function = wrap(times(number))
        stale += elsewhere(lambda function=function: run(function, x)) != [2.0 * number] * 3
        assert run(function, x) == [2.0 * number] * 3
        del function
        gc.collect()
    return stale, mx.get_active_memory() - before


def test_nothing_is_left_of_a_function_that_two_threads_ran(elsewhere):
    assert left_over(Traced, elsewhere) == (0, 0)
    _, held = left_over(mx.compile, elsewhere)
    assert held >= BYTES  # the control: MLX's own, or this module may go


def test_a_thread_does_not_trace_at_every_call(elsewhere):
    seen = []

    def traced(parts):
        seen.append(threading.get_ident())
        return [2 * parts[0]]

    function, x = Traced(traced), mx.ones((3,))
    for _ in range(4):
        assert run(function, x) == elsewhere(lambda: run(function, x)) == [2.0] * 3
    # MLX describes a thread's first one twice.
    assert len(set(seen)) == 2 and len(seen) <= 3


def test_steps_that_know_of_themselves_are_given_back():
    ready = prepare_unet(unet(**SMALL))
    ready.steps = GuidedSteps(ready, compiles=True)
    model = ready.steps.model(normal(1, 9, CONTEXT), None, 1.0, [400.0])
    mx.eval(model(normal(1, 8, 8, 4), 400.0))
    gone = weakref.ref(ready.steps)
    del ready, model
    gc.collect()
    assert gone() is None


def test_networks_are_traced_by_nothing_else():
    found = {}
    for path in Path(mlx_maple.engine.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "compile":
                if isinstance(node.value, ast.Name) and node.value.id == "mx":
                    found[path.name] = found.get(path.name, 0) + 1
    assert found == {"traced.py": 1, "compiled.py": 1}  # and the check whether it works at all
