"""Names by which pickles are known to run code.

Nothing here makes reading safe: no name is ever resolved, so any pickle is read without running
anything. The list only serves a clear refusal, because whoever holds such a file should not open it
with a program that unpickles. Names outside the list become inert stubs.
"""

# Modules of the standard library that no object in a checkpoint comes from. Names that people also
# give to packages of their own (code, profile, trace) are listed below one function at a time.
CODE_MODULES = frozenset(
    """
    os posix nt subprocess _posixsubprocess pty sys runpy importlib ctypes pdb bdb timeit cProfile
    doctest webbrowser shutil marshal pickle _pickle
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
        "code": "InteractiveInterpreter InteractiveConsole interact",
        "codeop": "compile_command",
        "commands": "getoutput getstatusoutput",
        "popen2": "popen2 popen3 popen4",
        "profile": "run runctx Profile",
        "trace": "Trace",
        "imp": "load_source load_module load_compiled",
        "pip": "main _internal",
        "multiprocessing.util": "spawnv_passfds",
        "socket": "socket create_connection",
        "dill": "load loads _dill",
        "cloudpickle": "load loads cloudpickle",
        "joblib": "load numpy_pickle",
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
# Double underscores lead from any object to its globals; these lead nowhere.
PLAIN_DUNDERS = frozenset(
    """
    __main__ __mp_main__ __torch__ __builtin__ __builtins__ __newobj__ __newobj_ex__
    """.split()
)


def runs_code(dotted: str) -> bool:
    """Whether a global's dotted name is one by which pickles run code."""
    parts = dotted.split(".")
    return (
        parts[0] in CODE_MODULES
        or any(".".join(parts[:count]) in CODE_NAMES for count in range(2, min(len(parts), 5) + 1))
        or any(p.startswith("__") and p.endswith("__") and p not in PLAIN_DUNDERS for p in parts)
    )
