"""Mutated files against the readers: whatever the bytes, only ConvertErrors may come out.

    python tests/convert/fuzz_readers.py --seconds 300 --seed 1
    python tests/convert/fuzz_readers.py --atheris -max_total_time=300    (pip install atheris)

The first mutates at random; the second is guided by coverage. Both change whole files, and also the
inside of a container around which lengths and directory are then made right again: a pickle, a
safetensors header, the parts of a legacy file. A file that opens is read to the end, and must give
what it listed. Anything else than a ConvertError, a run of more than ``SLOW`` seconds or more than
``MEMORY`` bytes is a finding; its file is kept.

``test_readers_fuzz.py`` runs a few thousand of these in the test suite.
"""

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from pathlib import Path

import corpus
import gguf_files as gf
import numpy as np
import torch_files as tf

from maple_convert.errors import ConvertError
from maple_convert.readers import open_checkpoint
from maple_convert.tensors import STORAGE

SLOW = 2.0
MEMORY = 1 << 30
EDGES = (0, 1, 2, 7, 8, 16, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000,
         0xFFFFFFFE, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
OPCODES = b"().0123RQXKMNJGqhjr}]lbtdsuaec\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95ioPp"
PIECES = (
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ccollections\nOrderedDict\n)R", b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n",
    b"ctorch.storage\nUntypedStorage\n", b"ctorch\nfloat16\n", b"ctorch\nSize\n",
    b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", corpus.short("state_dict"), corpus.short("storage"),
    corpus.short("_parameters"), corpus.STORAGE, corpus.raw_tensor(), b"K\0", b"K\4\x85", b"}(u",
    b"](e", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"I01\n", b"L5L\n", b"S'a'\n", b"Va\n",
)  # fmt: skip


class Finding(Exception):
    """Something other than a typed error."""


def seeds(folder: Path) -> dict[str, bytes]:
    """Small good files of every container and kind of content."""
    run = tf.Storage(np.arange(40, dtype=np.float32))
    tree = {
        "state_dict": OrderedDict(
            weight=np.arange(24, dtype=np.float32).reshape(4, 6),
            view=tf.TorchTensor(run, 3, (2, 3), (1, 5)),
            same=tf.TorchTensor(run, 0, (40,), (1,)),
            half=tf.bfloat16(np.ones(3, np.float32)),
            parameter=tf.parameter(np.ones(2, np.int64)),
            zero=np.zeros((0, 3), np.uint8), scalar=np.array(2.5), flags=np.array([True, False]),
        ),
        "epoch": 3, "rate": 1e-4, "name": "é", "none": None, "list": [1, (2.5, "x"), {}],
        "callbacks": {tf.Global("a.b", "C"): tf.Call(tf.Global("numpy", "dtype"), ("f8",))},
        "thing": tf.Call(tf.Global("pl.Thing", "T"), (1,), {"_x": 1, "_modules": {}}),
    }  # fmt: skip
    found = {
        "zip": tf.write_torch_zip(folder / "x", tree).read_bytes(),
        "zip4": tf.write_torch_zip(folder / "x", tree, protocol=4).read_bytes(),
        "legacy": tf.write_legacy(folder / "x", tree).read_bytes(),
        "legacy1": tf.write_legacy(folder / "x", tree, protocol=1).read_bytes(),
        "oldest": tf.write_legacy(folder / "x", {"w": np.ones(3)}, oldest=True).read_bytes(),
        "safetensors": corpus.good_safetensors(),
        "eight bits": corpus.one_entry(dtype="F8_E4M3", shape=[4, 4]),
        "index": json.dumps({"metadata": {}, "weight_map": {"w": "x.safetensors"}}).encode(),
    }
    arrays = {"w": np.ones((2, 256), np.float32), "c": np.ones((4, 8, 3, 3), np.float16)}
    for name, kind in (("gguf", None), ("gguf q8", gf.Q8_0), ("gguf q4", gf.Q4_K)):
        said = {"general.architecture": "sd1", "words": ["a", "b"]}
        gf.save(folder / "x", arrays, kind, folded=kind == gf.Q8_0, settings=said)
        found[name] = (folder / "x").read_bytes()
    (folder / "x").unlink()
    return found


class Mutator:
    """Makes hostile bytes out of good ones; equal seeds give equal files."""

    def __init__(self, good: dict[str, bytes], seed: int) -> None:
        self.random = random.Random(seed)
        self.good = good
        self.pickle, _ = tf.pickled(
            {"state_dict": {"w": np.ones(4, np.float32), "b": tf.bfloat16(np.ones(2))}, "epoch": 1}
        )
        self.pool = [*good.values(), self.pickle]

    def bytes_of(self, data: bytes) -> bytes:
        """One to a few random changes to bytes."""
        pick = self.random
        changed = bytearray(data)
        for _ in range(pick.choice((1, 1, 1, 2, 3, 8))):
            at = pick.randrange(len(changed) + 1)
            kind = pick.randrange(11)
            if kind == 0 and changed:
                changed[at % len(changed)] ^= 1 << pick.randrange(8)
            elif kind == 1 and changed:
                changed[at % len(changed)] = pick.randrange(256)
            elif kind == 2:
                del changed[at : at + pick.choice((1, 2, 4, 16, 100))]
            elif kind == 3:
                changed[at:at] = pick.randbytes(pick.choice((1, 2, 8)))
            elif kind == 4:
                size = pick.choice((2, 4, 8))
                value = pick.choice(EDGES) & ((1 << 8 * size) - 1)
                changed[at : at + size] = value.to_bytes(size, "little")
            elif kind == 5:
                end = min(len(changed), at + pick.choice((1, 4, 16, 64)))
                changed[at:at] = changed[at:end] * pick.choice((1, 2, 50))
            elif kind == 6:
                del changed[at:]
            elif kind == 7:
                other = pick.choice(self.pool)
                start = pick.randrange(len(other) + 1)
                changed[at:at] = other[start : start + pick.choice((2, 8, 40, 200))]
            elif kind == 8:
                changed[at : at + 1] = bytes([pick.choice(OPCODES)])
            elif kind == 9:
                changed[at:at] = pick.choice(PIECES)
            elif changed:
                other = pick.randrange(len(changed) + 1)
                step = pick.choice((1, 4, 16))
                changed[at : at + step], changed[other : other + step] = (
                    changed[other : other + step], changed[at : at + step],
                )  # fmt: skip
        return bytes(changed)

    def make(self, path: Path) -> None:
        """Write the next file."""
        pick = self.random
        kind = pick.choice(("file", "zip pickle", "header", "legacy part", "opcodes", "json"))
        if kind == "file":
            path.write_bytes(self.bytes_of(pick.choice(list(self.good.values()))))
        elif kind in ("zip pickle", "opcodes"):
            stream = self.bytes_of(self.pickle) if kind == "zip pickle" else self.opcodes()
            records = [("a/data.pkl", stream), ("a/data/0", bytes(16)), ("a/data/1", bytes(4))]
            tf.write_records(path, records)
        elif kind == "header":
            text = self.good["safetensors"][8:-104]
            text = self.bytes_of(text)
            path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(104))
        elif kind == "json":
            path.write_bytes(self.bytes_of(self.good["index"]))
        else:
            part = pick.choice(list(corpus.LEGACY_PARTS))
            spoiled = self.bytes_of(corpus.LEGACY_PARTS[part])
            path.write_bytes(corpus.legacy_parts(**{part: spoiled}))

    def opcodes(self) -> bytes:
        """A pickle of random opcodes and known pieces."""
        pick = self.random
        parts = [b"\x80\2"]
        for _ in range(pick.randrange(1, 60)):
            if pick.random() < 0.4:
                parts.append(pick.choice(PIECES))
            else:
                parts.append(bytes([pick.choice(OPCODES)]))
        return b"".join([*parts, b"."])


def try_file(path: Path) -> str:
    """Open and read a file; the name of the error that it ended in, or "read"."""
    started = time.process_time()  # a busy machine is no finding
    try:
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                value = checkpoint.read(name)
                if value.shape != info.shape or value.array.dtype != STORAGE[info.dtype]:
                    raise Finding(f"{name}: read as {value.shape}, listed as {info}")
            repr(checkpoint.objects)
            outcome = "read"
    except ConvertError as error:
        if not str(error).isprintable() or not error.reason:
            raise Finding(f"message {str(error)!r}") from error
        outcome = type(error).__name__
    if (taken := time.process_time() - started) > SLOW:
        raise Finding(f"took {taken:.1f} s of processor time")
    return outcome


def fuzz(folder: Path, seed: int, seconds: float = 0, count: int = 0) -> Counter[str]:
    """Run until the time or the count is up; how often each outcome came.

    Raises:
        Finding: at the first file that ends otherwise; it stays in the folder.
    """
    mutator = Mutator(seeds(folder), seed)
    outcomes: Counter[str] = Counter()
    path = folder / "mutated"
    end = time.monotonic() + seconds if seconds else float("inf")
    while time.monotonic() < end and not (count and outcomes.total() >= count):
        mutator.make(path)
        try:
            outcomes[try_file(path)] += 1
        except Exception as error:
            kept = path.rename(folder / f"finding-{seed}-{outcomes.total()}")
            raise Finding(f"{kept}: {type(error).__name__}: {error}") from error
    return outcomes


def guided(folder: Path, arguments: list[str]) -> None:
    """The same under atheris, whose coverage guides the mutations."""
    import atheris  # pyright: ignore[reportMissingImports]

    atheris.instrument_all()
    starts = folder / "seeds"
    starts.mkdir()
    for name, content in seeds(folder).items():
        (starts / name).write_bytes(content)
    path = folder / "input"

    def once(data: bytes) -> None:
        # The first byte chooses whether the bytes are a file or the inside of one.
        if data[:1] == b"\xf0":
            tf.write_records(path, [("a/data.pkl", data[1:]), ("a/data/0", bytes(16))])
        elif data[:1] == b"\xf1":
            path.write_bytes(struct.pack("<Q", len(data) - 1) + data[1:] + bytes(104))
        else:
            path.write_bytes(data)
        try_file(path)

    inside = tf.pickled({"state_dict": {"w": np.ones(4, np.float32)}, "epoch": 1})[0]
    (starts / "inside").write_bytes(b"\xf0" + inside)
    (starts / "header").write_bytes(b"\xf1" + corpus.good_safetensors()[8:-104])
    kept = f"-artifact_prefix={folder}/finding-"
    atheris.Setup([sys.argv[0], kept, *arguments, str(starts)], once)
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    options, rest = parser.parse_known_args()
    if sys.platform == "linux":  # elsewhere the peak that is printed must do
        resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY, 4 * MEMORY))
    folder = Path(tempfile.mkdtemp(prefix="fuzz-readers-"))
    if options.atheris:
        guided(folder, rest)
        return
    started = time.monotonic()
    outcomes = fuzz(folder, options.seed, seconds=options.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (
        20 if sys.platform == "darwin" else 10
    )
    spent = time.monotonic() - started
    print(f"{outcomes.total()} executions in {spent:.0f} s, {dict(outcomes)}, peak {peak} MB")
    (folder / "mutated").unlink()
    folder.rmdir()


if __name__ == "__main__":
    main()
