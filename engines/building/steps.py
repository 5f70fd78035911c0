"""Bundle -> engines for the GPU at hand: what would be built, whether there is memory for it, the build, the cache."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from piflow_edge.engines import EngineOptions
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.building.engine_cache import EngineKey
from piflow_edge.engines.building.memory import Memory, Watch
from piflow_edge.engines.building.targets import Batch, Target
from piflow_edge.engines.ort import compiling as ort_compile
from piflow_edge.engines.trt import engine as trt
from piflow_edge.engines.trt import plans as trt_build
from piflow_edge.engines.trt import versions as trt_versions
from piflow_edge.errors import EngineError, PiFlowError
from piflow_edge.kernels import nvidia
from piflow_edge.option import check_options, option
from piflow_edge.system.hardware import free_memory

log = logging.getLogger(__name__)

BUILT_ENGINES = ("tensorrt", "ort-tensorrt", "tensorrt-rtx")


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

    engine: str = option(
        "tensorrt",
        "What to build for: TensorRT itself, or one of ONNX Runtime's providers.",
        choices=BUILT_ENGINES,
    )
    device: str = option("cuda", "The GPU: cuda or cuda:N.")
    batch: Batch = option(  # noqa: RUF009 - frozen
        Batch(), "Batch sizes it computes, best at OPT; one number is all. Fewer take as long as MIN."
    )
    workspace: int | None = option(
        None,
        "Memory of the GPU that one layer may use for scratch, in MiB; else all of it.",
        minimum=1 << 20,
        unit=1 << 20,
        title="workspace in bytes",
    )
    timing_cache: bool = option(True, "Time every kernel anew, and keep no times.")
    own_kernels: bool = option(False, "Leave cuBLAS and cuDNN out, which TensorRT 8 uses too: less memory.")

    def __post_init__(self):
        check_options(self, EngineError)
        if not re.fullmatch(r"cuda(:\d+)?", self.device):
            raise EngineError(f"engines are built for 'cuda' or 'cuda:N'; got device {self.device!r}")
        if self.own_kernels and self.engine != "tensorrt":
            raise EngineError(f"own_kernels is for engine 'tensorrt'; got engine {self.engine!r}")

    @property
    def ordinal(self) -> int:
        return nvidia.ordinal_in(self.device)


@dataclass(frozen=True)
class Plan:
    """What would be built. `key`: None where the machine lacks what it takes, as `obstacle` says."""

    target: Target
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
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
            "onnx": self.target.graph.sha256,
            "onnx_bytes": self.target.graph.size,
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


def plan(target: Target, settings: BuildSettings) -> Plan:
    """What building one graph takes. Needs neither a GPU nor the library; without them the key stays open."""
    weights, buffers = target.graph.size, target.buffers(settings.batch.most)
    memory = Memory(2 * weights + buffers + (settings.workspace or 0), 3 * weights)
    options, key, obstacle = _options(target, settings, None), None, None
    try:
        nvidia.name(
            settings.ordinal
        )  # the driver first: without a GPU it makes no odds which library is there
        release = _release(settings)
        options = _options(target, settings, release)
        key = EngineKey(
            onnx=target.graph.sha256,
            precision=target.precision,
            profile=target.describe_profile(settings.batch),
            options=options,
            **engine_cache.place(settings.engine, release, settings.device),
        )
        free, _ = nvidia.memory(settings.ordinal)
        shared = nvidia.shares_memory(settings.ordinal)
        memory = replace(memory, device_free=free, is_shared=shared)
    except PiFlowError as error:
        obstacle = error
    memory = replace(memory, host_free=free_memory())
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
        assert planned.obstacle is not None
        raise planned.obstacle
    reason = engine_cache.miss(key)

    def make() -> tuple[bytes, dict[str, Any]]:
        planned.memory.check(target.name)
        say(f"{target.name} ({target.file}): building for {key.gpu}, batches {key.profile}; {reason}")
        with Watch(settings.ordinal) as watch:
            data = _make_plan(planned, key, settings)
        facts = {**watch.facts(), "needed": vars(planned.memory)}
        if settings.engine == "tensorrt":
            facts["inspection"] = _inspect(data, target, settings, say)
        return data, facts

    entry, built = engine_cache.get_or_build(
        key, make, usable=lambda data: _opens(data, target, settings), rebuild=rebuild
    )
    return Report(planned, built, reason if built else None, str(entry.path), entry.size, entry.built)


def _make_plan(planned: Plan, key: EngineKey, settings: BuildSettings) -> bytes:
    target, times = planned.target, None
    if settings.timing_cache:
        parts = (key.backend, key.tensorrt, key.gpu, key.compute_capability)
        times = engine_cache.folder() / (re.sub(r"[^\w.]+", "-", "-".join(parts)) + ".timing")
    if settings.engine == "tensorrt":
        return trt_build.build_plan(
            target.graph, target.computes_in, planned.profile, ordinal=settings.ordinal,
            workspace=settings.workspace, timing_cache=times, own_kernels=settings.own_kernels,
        )  # fmt: skip
    return ort_compile.compile_graph(
        settings.engine, target.graph, target.computes_in, planned.profile, device=settings.device,
        workspace=settings.workspace, timing_cache=times,
    )  # fmt: skip


def _inspect(
    data: bytes, target: Target, settings: BuildSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    found = trt_build.inspect_plan(data, target.graph, target.computes_in, settings.ordinal)
    say(f"{target.name} ({target.file}): {found.describe()}")
    for complaint in found.complaints:
        log.warning("%s (%s) in %s: %s", target.name, target.file, target.precision, complaint)
    return vars(found)


def _opens(data: bytes, target: Target, settings: BuildSettings) -> bool:
    try:
        if settings.engine == "tensorrt":
            trt.TensorRTEngine(target.graph, settings.device, EngineOptions(), plan=data).close()
        else:
            ort_compile.open_compiled(
                settings.engine, data, settings.device, target.describe_profile(settings.batch)
            ).close()
    except EngineError as error:
        log.warning("%s", error)
        return False
    return True


def _release(settings: BuildSettings) -> str:
    if settings.engine != "tensorrt":
        return ort_compile.BACKENDS[settings.engine].describe_release()
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
            flags = ",".join(trt_versions.builder_flags(row, target.computes_in)) or "none"
        options += ["tf32=off", f"flags={flags}", f"kernels={'own' if settings.own_kernels else 'all'}"]
    return " ".join(options)
