"""Bundle -> engines for the GPU at hand: what would be built, whether there is memory for it, the build, the cache."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from piflow_edge.bundle import Bundle, TensorSpec, decoder_file, sampler_file
from piflow_edge.engines import EngineOptions, Graph, engine_cache, ort_compile, trt, trt_build, trt_versions
from piflow_edge.engines.engine_cache import EngineKey
from piflow_edge.errors import BundleError, EngineError, PiFlowError
from piflow_edge.hardware import host_memory
from piflow_edge.kernels import nvidia

log = logging.getLogger(__name__)

BUILT_ENGINES = ("tensorrt", "ort-tensorrt", "tensorrt-rtx")
GRAPHS = ("student", "decoder", "sampler")

_ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Batch:
    """Batch sizes an engine is made for: from `least` to `most`, fastest at `best`.

    Raises:
        EngineError: they do not rise, or are not 1 or more.
    """

    least: int = 1
    best: int = 1
    most: int = 8

    def __post_init__(self):
        if not 1 <= self.least <= self.best <= self.most:
            raise EngineError(f"batch sizes rise from 1 or more: MIN <= OPT <= MAX; got {self}")

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """From "MIN:OPT:MAX", or one number for all three."""
        if not re.fullmatch(r"\d{1,6}(:\d{1,6}:\d{1,6})?", text):
            raise EngineError(f"batch sizes are MIN:OPT:MAX, such as 1:1:8, or one number; got {text!r}")
        numbers = [int(number) for number in text.split(":")]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))


@dataclass(frozen=True)
class BuildSettings:
    """How engines are built.

    Args:
        engine: one of `BUILT_ENGINES`.
        device: "cuda" or "cuda:N".
        batch: sizes the engine takes.
        workspace: bytes of the GPU's memory that one layer may use for scratch; None is all of it.
        timing_cache: keep the times of kernels for the next build.
        own_kernels: for "tensorrt", leave cuBLAS and cuDNN out, which releases before 10 use too: less memory.
    """

    engine: str = "tensorrt"
    device: str = "cuda"
    batch: Batch = Batch()
    workspace: int | None = None
    timing_cache: bool = True
    own_kernels: bool = False

    def __post_init__(self):
        if self.engine not in BUILT_ENGINES:
            raise EngineError(f"engines that are built: {', '.join(BUILT_ENGINES)}; got {self.engine!r}")
        if not re.fullmatch(r"cuda(:\d+)?", self.device):
            raise EngineError(f"engines are built for 'cuda' or 'cuda:N'; got device {self.device!r}")
        if self.own_kernels and self.engine != "tensorrt":
            raise EngineError(f"own_kernels is for engine 'tensorrt'; got engine {self.engine!r}")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise EngineError(f"workspace is 1 MiB or more; got {self.workspace} bytes")

    @property
    def ordinal(self) -> int:
        return trt.ordinal_of(self.device)


@dataclass(frozen=True)
class Target:
    """One graph of a bundle. `inputs`, `outputs`: as far as the manifest tells."""

    name: str
    file: str
    graph: Graph
    precision: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs, at a batch size."""
        return {spec.name: _sized(spec, batch) for spec in self.inputs}

    def profile(self, batch: Batch) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Least, best and greatest shape of each input."""
        sizes = [self.shapes(size) for size in (batch.least, batch.best, batch.most)]
        return {name: tuple(shapes[name] for shapes in sizes) for name in sizes[0]}


@dataclass(frozen=True)
class Memory:
    """Bytes that a build takes at the very least, and what is free; None where this machine does not tell.

    The GPU holds the weights twice (as read, and in the kernels' own layout), the inputs and outputs of the largest
    batch, and the workspace where one is named; the host holds the graph as a file, as read and as the finished engine.
    Where both are one memory, as on Jetson, the sum must fit.
    """

    device_needed: int
    host_needed: int
    device_free: int | None = None
    host_free: int | None = None
    is_shared: bool = False

    def check(self, name: str) -> None:
        """Refuse a build that cannot fit.

        Raises:
            EngineError: there is less memory than needed.
        """
        pools = {
            "the GPU": (self.device_needed, self.device_free),
            "this machine": (self.host_needed, self.host_free),
        }
        if self.is_shared:
            pools = {
                "this machine, whose GPU shares it,": (
                    self.device_needed + self.host_needed,
                    self.device_free,
                )
            }
        for where, (needed, free) in pools.items():
            if free is not None and needed > free:
                raise EngineError(
                    f"building the {name} needs {_mib(needed)} of memory at the very least, and {where} has "
                    f"{_mib(free)} free: end other programs, name a smaller --workspace, or a smaller --batch"
                )


@dataclass(frozen=True)
class Plan:
    """What would be built. `key`: None where the machine lacks what it takes, as `obstacle` says."""

    target: Target
    profile: dict[str, tuple[tuple[int, ...], ...]]
    options: str
    memory: Memory
    key: EngineKey | None
    obstacle: PiFlowError | None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        key = self.key
        return {
            "graph": self.target.name,
            "file": self.target.file,
            "precision": self.target.precision,
            "onnx": engine_cache.graph_hash(self.target.graph),
            "onnx_bytes": _size(self.target.graph),
            "profile": {
                name: dict(zip(("min", "opt", "max"), map(list, shapes), strict=True))
                for name, shapes in self.profile.items()
            },
            "options": self.options,
            "memory": vars(self.memory),
            "key": vars(key) if key else None,
            "file_in_cache": str(engine_cache.folder() / key.file_name) if key else None,
            "obstacle": str(self.obstacle) if self.obstacle else None,
        }


@dataclass(frozen=True)
class Report:
    """What was done. `built`: False if the cache had it. `miss`: what differed from the nearest one in the cache."""

    plan: Plan
    built: bool
    miss: str | None
    path: str
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        done = {"built": self.built, "miss": self.miss, "engine": self.path, "engine_bytes": self.bytes}
        return {**self.plan.as_json(), **done, "build": self.facts}


def targets(
    bundle: Bundle, *, graph: str | None = None, nfe: int | None = None, precision: str | None = None
) -> list[Target]:
    """The graphs to build: student and decoder, or the one that is named.

    Args:
        bundle: an exported folder.
        graph: one of `GRAPHS`; None is the student, and the decoder where there is one.
        nfe: calls of the sampler graph; None is the only one there is.
        precision: one of the bundle's; None is its first.

    Raises:
        BundleError: the bundle has no such graph or precision.
        EngineError: `graph`, `nfe` or `precision` that make no sense.
    """
    precision, manifest = bundle.precision(precision), bundle.manifest
    if graph not in (None, *GRAPHS):
        raise EngineError(f"graph is one of {', '.join(GRAPHS)}; got {graph!r}")
    if nfe is not None and graph != "sampler":
        raise EngineError("nfe chooses among sampler graphs; give it with graph 'sampler'")
    if precision == "int8":
        raise EngineError(
            "TensorRT has no int8 whose activations are scaled as they come; export with --precision int8-qdq"
        )
    if graph == "sampler":
        if nfe is None and not manifest.samplers:
            raise BundleError(
                f"bundle {bundle.name!r} has no sampler graph; export it with --sampler-graph NFE"
            )
        if nfe is None and len(manifest.samplers) > 1:
            has = ", ".join(map(str, manifest.samplers))
            raise EngineError(
                f"bundle {bundle.name!r} has sampler graphs of these calls: {has}; choose with nfe"
            )
        nfe = nfe or manifest.samplers[0]
        model = bundle.sampler(nfe, precision)
        state = ["batch", *manifest.latent.shape]
        inputs = [TensorSpec("noise", "float32", state)]
        inputs += [spec for spec in manifest.network.inputs if spec.name == "class_labels"]
        if any(segment.renoises for segment in manifest.schedule.schedule(nfe=nfe).segments):
            inputs.append(TensorSpec("renoise", "float32", [nfe - 1, *state]))
        outputs = [TensorSpec("latents", "float32", state)]
        return [
            Target(f"sampler of {nfe} calls", sampler_file(nfe, precision), model, precision, inputs, outputs)
        ]
    found = []
    if graph in (None, "student"):
        network = manifest.network
        found.append(Target("student", f"student.{precision}.onnx", bundle.graph(precision), precision,
                            network.inputs, network.outputs))  # fmt: skip
    if graph == "decoder" or (graph is None and manifest.decoder is not None):
        model, spec = bundle.decoder(precision), manifest.decoder
        found.append(Target("decoder", decoder_file(precision), model, precision, spec.inputs, spec.outputs))
    return found


def plan(target: Target, settings: BuildSettings) -> Plan:
    """What building one graph takes. Needs neither a GPU nor the library; without them the key stays open."""
    largest = [*target.inputs, *target.outputs]
    buffers = sum(_bytes(spec, settings.batch.most) for spec in largest)
    weights = _size(target.graph)
    memory = Memory(2 * weights + buffers + (settings.workspace or 0), 3 * weights)
    options, key, obstacle = _options(target, settings, None), None, None
    try:
        # The driver first: without a GPU it makes no odds which library is there.
        gpu = nvidia.name(settings.ordinal)
        release = _release(settings)
        options = _options(target, settings, release)
        key = EngineKey(
            backend=settings.engine,
            onnx=engine_cache.graph_hash(target.graph),
            precision=target.precision,
            profile=str(settings.batch),
            tensorrt=release,
            cuda=nvidia.driver_version(),
            gpu=gpu,
            compute_capability=nvidia.device(settings.ordinal).compute_capability,
            options=options,
        )
        free, _ = nvidia.memory(settings.ordinal)
        shared = nvidia.shares_memory(settings.ordinal)
        memory = replace(memory, device_free=free, is_shared=shared)
    except PiFlowError as error:
        obstacle = error
    memory = replace(memory, host_free=host_memory()[0])
    return Plan(target, target.profile(settings.batch), options, memory, key, obstacle)


def build(
    planned: Plan, settings: BuildSettings, *, rebuild: bool = False, say: Callable[[str], None] = log.info
) -> Report:
    """Build what was planned, unless the cache has it.

    Args:
        planned: from `plan`, with the same settings.
        settings: how.
        rebuild: build it in any case.
        say: told in a line what is done.

    Raises:
        MissingExtraError: the library, or `filelock`, is not installed.
        EngineError: no GPU, too little memory, or the graph cannot be built.
    """
    target, key = planned.target, planned.key
    if key is None:
        raise planned.obstacle
    reason = engine_cache.miss(key)

    def make() -> tuple[bytes, dict[str, Any]]:
        planned.memory.check(target.name)
        say(f"{target.name} ({target.file}): building for {key.gpu}, batches {key.profile}; {reason}")
        with _Watch(settings.ordinal) as watch:
            data = _made(planned, settings)
        return data, {**watch.facts(), "needed": vars(planned.memory)}

    entry, built = engine_cache.get_or_build(
        key, make, usable=lambda data: _opens(data, target, settings), rebuild=rebuild
    )
    return Report(planned, built, reason if built else None, str(entry.path), entry.size, entry.built)


def _made(planned: Plan, settings: BuildSettings) -> bytes:
    target, times = planned.target, None
    if settings.timing_cache:
        key = planned.key
        parts = (key.backend, key.tensorrt, key.gpu, key.compute_capability)
        times = engine_cache.folder() / (re.sub(r"[^\w.]+", "-", "-".join(parts)) + ".timing")
    if settings.engine == "tensorrt":
        return trt_build.build_plan(
            target.graph, target.precision, planned.profile, ordinal=settings.ordinal,
            workspace=settings.workspace, timing_cache=times, own_kernels=settings.own_kernels,
        )  # fmt: skip
    return ort_compile.compiled(
        settings.engine, target.graph, target.precision, planned.profile, device=settings.device,
        workspace=settings.workspace, timing_cache=times,
    )  # fmt: skip


def _opens(data: bytes, target: Target, settings: BuildSettings) -> bool:
    try:
        if settings.engine == "tensorrt":
            trt.TensorRTEngine(target.graph, settings.device, EngineOptions(), plan=data).close()
        else:
            ort_compile.open_compiled(settings.engine, data, settings.device).close()
    except EngineError as error:
        log.warning("%s", error)
        return False
    return True


def _release(settings: BuildSettings) -> str:
    if settings.engine != "tensorrt":
        return ort_compile.release(settings.engine)
    library = trt_versions.tensorrt()
    trt_versions.api(library.__version__)
    return library.__version__


def _options(target: Target, settings: BuildSettings, release: str | None) -> str:
    """What else an engine depends on, in one line."""
    options = [f"workspace={settings.workspace or 'all'}"]
    if settings.engine == "tensorrt":
        flags = "as the release wants"
        if release is not None:
            row = trt_versions.api(release)
            flags = ",".join(trt_versions.builder_flags(row, target.precision)) or "none"
        options += ["tf32=off", f"flags={flags}", f"kernels={'own' if settings.own_kernels else 'all'}"]
    return " ".join(options)


class _Watch:
    """Time, and peaks of memory: looked at twenty times a second, for no library tells of its builder's."""

    def __init__(self, ordinal: int):
        self._ordinal, self._over = ordinal, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._host: list[int] = []
        self._device: list[int] = []

    def __enter__(self) -> "_Watch":
        self._began = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._seconds = time.perf_counter() - self._began
        self._sample()
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        if (resident := host_memory()[1]) is not None:
            self._host.append(resident)
        with contextlib.suppress(EngineError):
            free, total = nvidia.memory(self._ordinal)
            self._device.append(total - free)

    def facts(self) -> dict[str, Any]:
        """Seconds; bytes at the peak: of this process on the host, and of the GPU above what it held before."""
        return {
            "seconds": round(self._seconds, 3),
            "peak_host_bytes": max(self._host, default=None),
            "peak_device_bytes": max(self._device) - self._device[0] if self._device else None,
        }


def _sized(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if size == "batch" else int(size) for size in spec.shape)


def _bytes(spec: TensorSpec, batch: int) -> int:
    count = 1
    for size in _sized(spec, batch):
        count *= size
    return count * _ITEM_BYTES[spec.dtype]


def _size(graph: Graph) -> int:
    return len(graph.model) + sum(map(len, graph.weights.values()))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
