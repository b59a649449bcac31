"""How much memory a drawing will take, told before it is drawn.

A network's demand is not written down here a second time: the network itself is described at the
asked size, without weights and without being run, and the description is walked in the order in
which MLX will work. Each array is counted from the operation that makes it to the last that reads
it; what sees another array's memory counts for nothing, and what may be made in its place, takes
it over.

Two things are the backend's: operations that need memory of their own (``_workspace``), and how
long memory that is no longer needed stays taken. MLX prepares operations before the device has
done those before them, and lets go of arrays when a batch of operations is done: ``LAG`` says how
many. The numbers are those of MLX 0.32.4.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_maple.engine import low_memory
from mlx_maple.engine.attention import (
    LOW_MEMORY_SCORE_BYTES,
    SCORE_BYTES,
    described_as_on,
    in_chunks,
    running_backend,
)
from mlx_maple.engine.compiled import room
from mlx_maple.engine.count import as_on_a_gpu
from mlx_maple.engine.kernels import Kernels, Plain, kernels_for, kernels_of
from mlx_maple.engine.prepare import (
    PreparedVAE,
    Recipe,
    prepare_unet,
    prepare_vae,
)
from mlx_maple.engine.prepared_control import prepare_controlnet
from mlx_maple.engine.quantize import QUANTIZED, as_quantized
from mlx_maple.engine.tiling import striped_bytes
from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextEncoder,
    CLIPVisionEncoder,
    ControlNet,
    ControlNetConfig,
    IPAdapter,
    T2IAdapter,
    T2IAdapterConfig,
    TAESDConfig,
    UNet,
)

# Operations between the last use of an array and its memory's return. On the CPU MLX is a hundred
# dispatches ahead of the work, two an operation and more; on CUDA the host is two batches of 20
# ahead of the device; on Metal a command buffer holds 40 to 50.
LAG = {"cpu": 48, "cuda": 40, "metal": 50}
BOUNDED_LAG = 20  # where a drawing waits for the device
# Where it waits for the CPU: MLX counts every tenth dispatch as a task and sees none running in
# between, so up to that many operations are under way at a bound all the same. How many is a race.
UNSEEN_LAG = 5
# A batch also ends when its operations have read so many numbers.
TOUCHED = {"cuda": 1000 << 20, "metal": 50 << 20}
# Of an autoencoder that works in stages, some maps ahead of the device: set by what was measured.
STAGE_LAG = 12

TOKENS = 77
SIZE_STEP = 64  # pixels between the sizes that are tried

# They see their input's memory in another shape, if it lies in order where that matters.
VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes Depends ExpandDims Slice Split Squeeze StopGradient "
    "Transpose Unflatten View".split()
)
RESHAPES = frozenset({"Reshape", "Flatten"})  # views of what lies in order, copies of the rest
# Their result may take the place of an input that nobody reads afterwards.
IN_PLACE = frozenset(
    "Abs Add ArgReduce AsType Ceil Cos Divide Erf Exp Floor Log Maximum Minimum Multiply Negative "
    "Power Remainder Round Rsqrt Select Sigmoid Sign Sin SliceUpdate Softmax Sqrt Square Subtract "
    "Tanh Where Compiled LayerNorm RMSNorm".split()
)


# The plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a drawing.

    Attributes:
        name: "text", "look", "encode", "control", "step", "preview" or "decode".
        weights: bytes of the networks that are in memory.
        working: bytes beside them, at most.
    """

    name: str
    weights: int
    working: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.working


@dataclass(frozen=True, kw_only=True)
class Request:
    """A drawing and how a model is loaded for it.

    Attributes:
        configs: of the text encoders (text_encoder, text_encoder_2, or both), unet and vae, and of
            IP-Adapters and their image encoders (ip_adapter, …, image_encoder, …),
            and perhaps of networks that steer and of a taesd.
        width: in pixels.
        height: in pixels.
        count: pictures at once.
        guided: whether a negative prompt takes part.
        from_picture: whether the drawing starts from one.
        looks: whether it is prompted with pictures.
        steered: whether the networks that steer do, each by a picture.
        previewed: whether the taesd shows the steps.
        dtype: of weights and activations.
        bits: of the quantised weights: 8, 4 or None.
        low_memory: whether only the network in use is held.
        backend: "metal", "cuda" or "cpu".
        max_memory: bytes above which a GPU is waited for, as far as an operation lets it.
    """

    configs: Mapping[str, Any]
    width: int
    height: int
    count: int = 1
    guided: bool = True
    from_picture: bool = False
    looks: bool = False
    steered: bool = False
    previewed: bool = False
    dtype: mx.Dtype = mx.float16
    bits: int | None = None
    low_memory: bool = False
    backend: str = ""
    max_memory: int | None = None

    @property
    def encoders(self) -> list[str]:
        """Names of the text encoders."""
        return [part for part in self.configs if part.startswith("text_encoder")]

    @property
    def adapters(self) -> list[str]:
        """Names of the IP-Adapters."""
        return [part for part in self.configs if part.startswith("ip_adapter")]

    @property
    def image_encoders(self) -> list[str]:
        """Names of what looks at their pictures."""
        return [part for part in self.configs if part.startswith("image_encoder")]

    @property
    def controls(self) -> list[str]:
        """Names of the networks that steer."""
        kinds = ControlNetConfig | T2IAdapterConfig
        return [part for part, config in self.configs.items() if isinstance(config, kinds)]

    @property
    def vae_dtype(self) -> mx.Dtype:
        """Of the autoencoder, which may not bear float16."""
        is_kept = getattr(self.configs["vae"], "force_upcast", False)
        return mx.float32 if is_kept and self.dtype == mx.float16 else self.dtype

    @property
    def batch(self) -> int:
        """Pictures in one call of the UNet."""
        if self.backend == "cpu":  # one by one, both halves of the guidance together
            return 2 if self.guided else 1
        return self.count * (2 if self.guided and not self.low_memory else 1)


class Plan:
    """What a drawing takes.

    Attributes:
        request: the drawing.
        components: bytes of each network's weights; the autoencoder's halves apart, as each is
            read when it is first used.
        phases: in their order.
    """

    def __init__(self, request: Request) -> None:
        request = request if request.backend else replace(request, backend=running_backend())
        self.request = request
        self._networks = _networks(self.request)
        self.components = {
            **{
                part: _weight_bytes(self._networks[part])
                for part in (*request.encoders, *request.image_encoders, *request.adapters)
            },
            "unet": _weight_bytes(self._networks["unet"]),
            "vae_encoder": _weight_bytes(self._networks["vae"], but="decoder"),
            "vae_decoder": _weight_bytes(self._networks["vae"], but="encoder"),
            **{part: _weight_bytes(self._networks[part]) for part in self.request.controls},
        }
        if self._is_previewed:
            self.components["taesd"] = _weight_bytes(self._networks["taesd"], but="encoder")

    @property
    def _is_previewed(self) -> bool:
        return self.request.previewed and "taesd" in self._networks

    @property
    def _is_steered(self) -> bool:
        return self.request.steered and bool(self.request.controls)

    @cached_property
    def phases(self) -> list[Phase]:
        """What each part of the drawing takes, in their order."""
        request, sizes = self.request, self.components
        looking = [*request.image_encoders, *request.adapters]
        names = ["text", *(["look"] if request.looks else [])]
        names += ["encode"] if request.from_picture else []
        names += [*(["control"] if self._is_steered else []), "step"]
        names += [*(["preview"] if self._is_previewed else []), "decode"]
        controls = sum(sizes[part] for part in request.controls)
        taesd = sizes.get("taesd", 0)
        step = sizes["unet"] + (controls if self._is_steered else 0)
        own = {
            "text": sum(sizes[part] for part in request.encoders),
            "look": sum(sizes[part] for part in looking),
            "encode": sizes["vae_encoder"],
            "control": controls,
            "step": step + taesd,
            "preview": step + taesd,
            "decode": sizes["vae_decoder"] + taesd,
        }
        # What steers or looks is read when the model is loaded, whether it will or not.
        held = own["text"] + own["look"] + sizes["unet"] + controls + own["decode"]
        held += sizes["vae_encoder"] if request.from_picture else 0
        working = {
            "text": self._text,
            "look": self._look,
            "encode": lambda: self._autoencoder(is_encoding=True),
            "control": self._control,
            "step": lambda: self._stepping,
            "preview": self._preview,
            "decode": lambda: self._autoencoder(is_encoding=False),
        }
        return [
            Phase(
                name=name,
                weights=own[name] if request.low_memory else held,
                working=working[name](),
            )
            for name in names
        ]

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(phase.total for phase in self.phases)

    def _text(self) -> int:
        ids = mx.zeros((1, TOKENS), mx.int32)
        return max(
            self._peak(part, lambda network: lambda ids: network(ids).last, ids)
            for part in self.request.encoders
        )

    def _look(self) -> int:
        def peak(part: str) -> int:
            side = self.request.configs[part].image_size
            pixels = mx.zeros((1, side, side, 3), self.request.dtype)
            return self._peak(part, lambda network: lambda x: tuple(network(x)), pixels)

        return max((peak(part) for part in self.request.image_encoders), default=0)

    def _images(self) -> list[list[mx.array]]:
        """What the UNet is shown of each image prompt."""
        request = self.request
        if not request.looks:
            return []
        dtype, unet = request.dtype, request.configs["unet"]
        found = []
        for part in request.adapters:
            tokens = request.configs[part].tokens
            if tokens is None:  # as many as an encoder has
                config = request.configs[request.image_encoders[0]]
                tokens = (config.image_size // config.patch_size) ** 2 + 1
            prompt = mx.zeros((request.batch, tokens, unet.cross_attention_dim), dtype)
            found.append(self._networks[part].keys_values(prompt, unet))
        return [[mx.zeros(x.shape, dtype) for x in each] for each in found]

    def _hint(self, part: str) -> tuple[mx.array, ...]:
        """What a network that steers has made of its picture, as described; and the picture."""
        network, config = self._networks[part], self.request.configs[part]
        size = (1, self.request.height, self.request.width, config.hint_channels)
        picture = mx.zeros(size)
        is_adapter = isinstance(network, T2IAdapter)
        made = network(picture) if is_adapter else [network.embed_hint(picture)]
        return picture, *[mx.zeros(each.shape, each.dtype) for each in made]

    def _control(self) -> int:
        """The pictures that steer, read one after the other."""

        def call(network: Any) -> Callable[..., Any]:
            return network if isinstance(network, T2IAdapter) else network.embed_hint

        return max(self._peak(part, call, self._hint(part)[0]) for part in self.request.controls)

    def _preview(self) -> int:
        """A picture of a step; a GPU may be at the next one."""
        config, request = self.request.configs["taesd"], self.request
        factor = config.downscale
        shape = (1, request.height // factor, request.width // factor, config.latent_channels)
        shown = self._peak("taesd", lambda taesd: taesd.decode, mx.zeros(shape))
        is_ahead = request.backend != "cpu" and not request.low_memory
        return shown + (self._stepping if is_ahead else 0)

    @cached_property
    def _stepping(self) -> int:
        request = self.request
        config, factor = request.configs["unet"], request.configs["vae"].downscale
        rows, columns = request.height // factor, request.width // factor
        latents = mx.zeros((request.batch, rows, columns, config.in_channels), request.dtype)
        context = mx.zeros((request.batch, TOKENS, config.cross_attention_dim), request.dtype)
        told = {}
        if config.vector_channels is not None:
            told["vector"] = mx.zeros((request.batch, config.vector_channels))
        if config.time_cond_dim is not None:
            told["guidance"] = mx.zeros((request.batch,))

        images = self._images()
        controls = request.controls if self._is_steered else []
        hints = {part: self._hint(part)[1:] for part in controls}
        adapters = [part for part in controls if isinstance(self._networks[part], T2IAdapter)]

        def call(unet: Any, *networks: Any) -> Callable[..., mx.array]:
            steering = dict(zip(controls, networks, strict=True))

            def step(x: mx.array, time: mx.array, states: mx.array, *more: mx.array) -> mx.array:
                said: dict[str, Any] = dict(zip(told, more, strict=False))
                given = iter(more[len(told) :])
                seen = {part: [next(given) for _ in made] for part, made in hints.items()}
                vector = [said["vector"]] if "vector" in said else []
                latents = x[..., : config.out_channels]
                maps = [
                    network(latents, time, states, *seen[part], *vector)
                    for part, network in steering.items()
                    if part not in adapters
                ]
                features = [seen[part] for part in adapters]
                for name, sets in (("control", maps), ("features", features)):
                    if sets:
                        said[name] = [_weighted(each) for each in zip(*sets, strict=True)]
                return unet(x, time, states, **said, image=images)

            return step

        bound = room((request.batch, rows, columns, 0), False, request.backend)
        if request.max_memory is not None:
            bound = max(request.max_memory - sum(self.components.values()), low_memory.AHEAD_BYTES)
        pictures = [each for made in hints.values() for each in made]
        given = (latents, mx.zeros((1,)), context, *told.values(), *pictures)
        taken = self._peak(["unet", *controls], call, *given, bound=bound)
        return taken + sum(each.nbytes for each in pictures)

    def _autoencoder(self, *, is_encoding: bool) -> int:
        request = self.request
        config, dtype = request.configs["vae"], request.vae_dtype
        height, width = request.height, request.width
        is_taesd = isinstance(config, TAESDConfig)  # which is small enough to do without stripes
        if request.low_memory and not is_taesd:
            return striped_bytes(
                config,
                width,
                height,
                dtype.size,
                is_encoding=is_encoding,
                unfolds=request.backend == "cpu",
                ahead=low_memory.AHEAD_BYTES if request.backend == "cpu" else 0,
            )
        if is_encoding:
            pixels = mx.zeros((1, height, width, 3 if is_taesd else config.in_channels), dtype)
            if is_taesd:
                return self._peak("vae", lambda network: network.encode, pixels)
            return self._peak("vae", lambda network: lambda x: network.encode(x).mean, pixels)
        shape = (1, height // config.downscale, width // config.downscale, config.latent_channels)
        return self._peak("vae", lambda network: network.decode, mx.zeros(shape, dtype))

    def _peak(
        self,
        parts: str | Sequence[str],
        call: Callable[..., Callable[..., Any]],
        *inputs: mx.array,
        bound: int | None = None,
    ) -> int:
        """The most that a call of networks takes, whose weights are described as arguments.

        Above ``bound`` MLX waits for the device; up to it, it prepares a batch more.
        """
        parts = [parts] if isinstance(parts, str) else parts
        networks = [self._networks[part] for part in parts]
        parameters = [_parameters(network) for network in networks]

        def described(*arrays: mx.array) -> Any:
            weights = iter(arrays[len(inputs) :])
            for network, found in zip(networks, parameters, strict=True):
                network.update(tree_unflatten([(name, next(weights)) for name, _ in found]))
            return call(*networks)(*arrays[: len(inputs)])

        backend = self.request.backend
        trace = _Trace(backend)
        values = [value for found in parameters for _, value in found]
        try:
            with _as_on(backend):
                mx.export_function(trace.read, described, *inputs, *values)
        finally:
            for network, found in zip(networks, parameters, strict=True):
                network.update(tree_unflatten(found))
        if not self.request.low_memory:
            staged = isinstance(networks[0], PreparedVAE)
            lag, stage = LAG[backend], STAGE_LAG
            if self.request.max_memory is not None and backend != "cpu":
                lag, stage = BOUNDED_LAG, STAGE_LAG // 2
            usual = trace.peak(stage if staged else lag)
            return usual if bound is None else max(usual, min(trace.peak(2 * LAG[backend]), bound))
        if backend == "cpu":  # which waits where more than the bound was taken before an operation
            bounded = low_memory.AHEAD_BYTES + trace.largest
            return min(trace.peak(LAG[backend]), max(trace.peak(UNSEEN_LAG), bounded))
        return trace.peak(2 * low_memory.BATCH)  # one batch runs while the next is prepared


def advice(request: Request, free: int) -> list[tuple[str, int]]:
    """What would fit into so many bytes: options to add, and what they take.

    From the least change to the greatest; empty where nothing fits.
    """
    found: list[tuple[str, int]] = []
    tried = replace(request, low_memory=True)
    steps = [("--count 1", replace(request, count=1))] if request.count > 1 else []
    steps.append(("--low-memory", tried))
    if request.bits is None:
        steps += [(f"--low-memory --quantize {b}", replace(tried, bits=b)) for b in (8, 4)]
    for words, other in steps:
        if other != request and (peak := Plan(other).peak) <= free:
            found.append((words, peak))
            break
    smaller = _largest(request, free)
    if smaller is not None:
        found.append((f"-W {smaller.width} -H {smaller.height}", Plan(smaller).peak))
    elif not found:
        least = replace(tried, bits=4 if request.bits is None else request.bits, count=1)
        smaller = _largest(least, free)
        if smaller is not None:
            bits = "" if request.bits else " --quantize 4"
            words = f"--low-memory{bits} -W {smaller.width} -H {smaller.height}"
            found.append((words, Plan(smaller).peak))
    return found


def _largest(request: Request, free: int) -> Request | None:
    """The same drawing at the largest smaller size that fits, of about the same proportions."""
    longer = max(request.width, request.height)
    low, high, best = 1, (longer - 1) // SIZE_STEP, None
    while low <= high:
        middle = (low + high) // 2
        scale = middle * SIZE_STEP / longer
        width, height = (max(8, int(n * scale) // 8 * 8) for n in (request.width, request.height))
        tried = replace(request, width=width, height=height)
        if Plan(tried).peak <= free:
            best, low = tried, middle + 1
        else:
            high = middle - 1
    return best


def _networks(request: Request) -> dict[str, Any]:
    """The networks of a request, made ready as they will be, with no weights in them."""
    classes: dict[str, Any] = dict.fromkeys(request.encoders, CLIPTextEncoder)
    is_taesd = isinstance(request.configs["vae"], TAESDConfig)
    classes |= dict.fromkeys(request.image_encoders, CLIPVisionEncoder)
    classes |= dict.fromkeys(request.adapters, IPAdapter)
    classes |= {"unet": UNet, "vae": TAESD if is_taesd else AutoencoderKL}
    for part in request.controls:
        is_adapter = isinstance(request.configs[part], T2IAdapterConfig)
        classes[part] = T2IAdapter if is_adapter else ControlNet
    if request.previewed and "taesd" in request.configs:
        classes["taesd"] = TAESD
    found: dict[str, Any] = {}
    for part, make in classes.items():
        network = make(request.configs[part])
        network.set_dtype(request.vae_dtype if part == "vae" else request.dtype)
        if request.bits is not None and part in QUANTIZED:
            as_quantized(network, request.bits)
            network.set_dtype(request.dtype)  # of what stays as it is
        found[part] = network
    steer = [part for part in request.controls if classes[part] is ControlNet]
    if request.low_memory:
        for part in ("unet", *steer):
            in_chunks(found[part])
    if request.backend != "cpu":
        recipe = _recipe(request)
        found["unet"] = prepare_unet(found["unet"], recipe)
        for part in steer:
            found[part] = prepare_controlnet(found[part], recipe)
        if not request.low_memory and not is_taesd:
            found["vae"] = prepare_vae(found["vae"], recipe)
    return found


def _weighted(maps: Sequence[mx.array]) -> mx.array:
    """The sum of what several networks add, each times its weight."""
    total = 0.5 * maps[0]
    for each in maps[1:]:
        total = total + 0.5 * each
    return total


def _recipe(request: Request) -> Recipe:
    """How the networks are made ready, with kernels that can be described wherever this is."""
    backend = request.backend
    kernels: Kernels | Plain = kernels_of(backend, lambda **making: _kernel)
    if backend == running_backend() and isinstance(kernels_for(backend, request.dtype)[0], Plain):
        kernels = Plain()
    score_bytes = LOW_MEMORY_SCORE_BYTES if request.low_memory else SCORE_BYTES
    return Recipe.of(backend, kernels, score_bytes)


@contextmanager
def _as_on(backend: str) -> Iterator[None]:
    """Describe fused operations as the one operation that they are on a GPU, wherever this is."""
    if backend == "cpu":
        yield
        return
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))  # a description is the same everywhere
    try:
        with as_on_a_gpu(), described_as_on(backend):
            yield
    finally:
        mx.set_default_device(before)


def _kernel(
    *,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    **options: Any,
) -> list[mx.array]:
    arrays = [each for each in inputs if isinstance(each, mx.array)]
    zero = mx.depends([mx.zeros(())], arrays)[0] if arrays else mx.zeros(())
    shapes = zip(output_shapes, output_dtypes, strict=True)
    return [mx.erfinv(mx.broadcast_to(zero.astype(dtype), tuple(shape))) for shape, dtype in shapes]


def _weight_bytes(network: nn.Module, but: str = "") -> int:
    """Bytes of a network's weights, but for those below one name."""
    found = _parameters(network)
    return sum(value.nbytes for name, value in found if not but or not name.startswith(f"{but}."))


def _parameters(network: nn.Module) -> list[tuple[str, Any]]:
    found = tree_flatten(network.parameters())
    assert isinstance(found, list)
    return found


# What a call takes --------------------------------------------------------------------------------


def peak_of(
    function: Callable[..., Any],
    *inputs: mx.array,
    backend: str | None = None,
    lag: int | None = None,
) -> int:
    """The most memory, in bytes, that a call takes beside its inputs and what it captures.

    Args:
        function: of arrays, to one or several arrays; it must not evaluate.
        inputs: arrays of the shapes and types in question; they need no values.
        backend: that it will run on; None is the one that runs.
        lag: operations until memory returns; None is the backend's.
    """
    backend = running_backend() if backend is None else backend
    trace = _Trace(backend)
    mx.export_function(trace.read, function, *inputs)
    return trace.peak(LAG[backend] if lag is None else lag)


@dataclass(eq=False)
class _Buffer:
    """Memory that arrays share.

    Attributes:
        nbytes: how much.
        last: the number of the last operation that reads it.
        is_ours: whether the call takes it; else it was there before.
    """

    nbytes: int
    last: int = -1
    is_ours: bool = True


@dataclass
class _Array:
    """An array: whose memory it sees, and whether that lies in the array's own order."""

    buffer: _Buffer
    shape: tuple[int, ...]
    in_order: bool = True


@dataclass
class _Operation:
    name: str
    inputs: list[_Array]
    outputs: list[_Array]
    workspace: int

    @property
    def is_view(self) -> bool:
        return all(each.buffer in [i.buffer for i in self.inputs] for each in self.outputs)


class _Trace:
    """The description of a call, as ``mx.export_function`` tells it."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._arrays: dict[str, _Array] = {}
        self._operations: list[_Operation] = []
        self._results: list[str] = []

    def read(self, entry: Mapping[str, Any]) -> None:
        """Take in one part of it."""
        kind = entry["type"]
        if kind == "inputs":
            for name, shape, dtype in entry["inputs"]:
                self._arrays[name] = _Array(_Buffer(_nbytes(shape, dtype), is_ours=False), shape)
        elif kind == "constants":
            for name, array in entry["constants"]:
                shape = tuple(array.shape)
                self._arrays[name] = _Array(_Buffer(array.nbytes, is_ours=False), shape)
        elif kind == "outputs":
            self._results = [name for name, _, _ in entry["outputs"]]
        elif kind == "primitive":
            self._operation(entry)

    def _operation(self, entry: Mapping[str, Any]) -> None:
        name, number = entry["name"], len(self._operations)
        inputs = [self._arrays[each[0]] for each in entry["inputs"]]
        outputs = [
            self._output(name, inputs, i, tuple(shape), dtype)
            for i, (_, shape, dtype) in enumerate(entry["outputs"])
        ]
        for each in (*inputs, *outputs):
            each.buffer.last = number
        for (key, _, _), array in zip(entry["outputs"], outputs, strict=True):
            self._arrays[key] = array
        workspace = _workspace(self._backend, name, entry["inputs"], entry["outputs"])
        self._operations.append(_Operation(name, inputs, outputs, workspace))

    @staticmethod
    def _output(
        name: str, inputs: list[_Array], i: int, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> _Array:
        if name in VIEWS or (name in RESHAPES and inputs[0].in_order):
            source = inputs[i] if name == "Depends" else inputs[0]
            return _Array(
                source.buffer, shape, source.in_order and _keeps_order(name, source, shape)
            )
        return _Array(_Buffer(_nbytes(shape, dtype)), shape)

    @property
    def largest(self) -> int:
        """The most that one operation takes for what it makes and for itself."""
        return max(
            operation.workspace
            + sum(
                each.buffer.nbytes
                for each in operation.outputs
                if not operation.is_view and each.buffer.is_ours
            )
            for operation in self._operations
        )

    def peak(self, lag: int) -> int:
        """The most that is taken at any time, if memory returns ``lag`` operations late."""
        last = {each.buffer: each.buffer.last for each in self._arrays.values()}
        for name in self._results:
            last[self._arrays[name].buffer] = len(self._operations)
        place_of: dict[_Buffer, _Buffer] = {}  # what was made in another's place, and whose it was
        counted: set[_Buffer] = set()
        owed: deque[tuple[int, int, int]] = deque()  # clock, numbers touched, and bytes to return
        limit = TOUCHED.get(self._backend, 1 << 62)
        taken = most = clock = touched = 0
        for number, operation in enumerate(self._operations):
            # A GPU is handed no views; on the CPU they are dispatched like all the rest.
            if self._backend == "cpu" or not operation.is_view:
                clock += 1
                touched += sum(_size(each.shape) for each in operation.inputs)
            while owed and (clock - owed[0][0] > lag or touched - owed[0][1] > limit):
                taken -= owed.popleft()[2]
            read = {place_of.get(each.buffer, each.buffer): None for each in operation.inputs}
            dying = [buffer for buffer in read if last[buffer] == number and buffer.is_ours]
            for each in operation.outputs:
                made = each.buffer
                if made in counted or not made.is_ours:
                    continue  # a view
                counted.add(made)
                place = None
                if operation.name in IN_PLACE or operation.name.startswith("Compiled"):
                    place = next((b for b in dying if b.nbytes == made.nbytes), None)
                if place is None:
                    taken += made.nbytes
                else:
                    dying.remove(place)
                    last[place] = last[made]
                    place_of[made] = place
            most = max(most, taken + operation.workspace)
            back = sum(buffer.nbytes for buffer in dying) + operation.workspace
            taken += operation.workspace
            if back:
                owed.append((clock, touched, back))
        return most


def _keeps_order(name: str, source: _Array, shape: tuple[int, ...]) -> bool:
    """Whether a view still lies in its own order."""
    before = source.shape
    if name == "Transpose":
        return [n for n in before if n != 1] == [n for n in shape if n != 1] and (
            sum(n != 1 for n in before) < 2
        )
    if name in ("Broadcast", "BroadcastAxes"):
        return _size(before) == _size(shape)
    if name in ("Slice", "Split", "AsStrided"):
        if _size(before) == _size(shape):
            return True
        axis = next(i for i, (a, b) in enumerate(zip(before, shape, strict=False)) if a != b)
        return all(n == 1 for n in before[:axis])
    return True


Described = Sequence[tuple[str, Sequence[int], mx.Dtype]]


def _workspace(backend: str, name: str, inputs: Described, outputs: Described) -> int:
    """Memory that an operation takes for itself."""
    if name == "Convolution" and backend == "cpu":
        # The CPU's convolution pads its input and unfolds it, both in float32, for one product.
        (_, source, _), (_, weight, dtype) = inputs[:2]
        _, out, _ = outputs[0]
        unfolded = 4 * _size(out[:-1]) * _size(weight[1:])
        copied = 0 if dtype == mx.float32 else 4 * (_size(weight) + _size(out))
        return unfolded + 4 * _size(source) + copied
    return 0


def _size(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _nbytes(shape: Sequence[int], dtype: mx.Dtype) -> int:
    return _size(shape) * dtype.size
