"""Names by which pickles are known to run code.

Nothing here makes reading safe: no name is ever resolved, so any pickle is read without running
anything. The list only serves a clear refusal, because whoever holds such a file should not open it
with a program that unpickles. Names outside the list become inert stubs.
"""

CODE_MODULES = frozenset(
    """
    os posix nt subprocess _posixsubprocess pty commands popen2 sys runpy importlib imp pkgutil pip
    ctypes cffi code codeop pdb bdb timeit trace profile cProfile doctest socket webbrowser shutil
    marshal pickle _pickle dill cloudpickle joblib multiprocessing
    """.split()
)
CODE_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "builtins": "eval exec compile open __import__ input breakpoint globals locals vars",
        "__builtin__": "eval exec execfile compile open file __import__ input apply reload",
        "io": "open open_code FileIO",
        "_io": "open open_code FileIO",
        "types": "CodeType FunctionType LambdaType",
        "asyncio": "create_subprocess_exec create_subprocess_shell",
        "operator": "methodcaller",
        "_operator": "methodcaller",
        "torch": "load",
        "torch.hub": "load load_state_dict_from_url download_url_to_file",
        "torch.serialization": "load",
        "torch.jit": "load",
        "torch.package": "PackageImporter",
        "torch.utils.cpp_extension": "load load_inline",
        "torch._inductor.codecache": "compile_file",
        "numpy": "load",
        "numpy.testing._private.utils": "runstring",
        "numpy.f2py": "compile",
    }.items()
    for name in names.split()
)
PLAIN_DUNDERS = frozenset({"__main__", "__torch__", "__builtin__", "__builtins__"})


def runs_code(dotted: str) -> bool:
    """Whether a global's dotted name is one by which pickles run code."""
    parts = dotted.split(".")
    return (
        parts[0] in CODE_MODULES
        or dotted in CODE_NAMES
        or any(p.startswith("__") and p.endswith("__") and p not in PLAIN_DUNDERS for p in parts)
    )
