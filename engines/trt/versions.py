"""TensorRT's Python interface, release by release: what differs between them is here, and nowhere else.

All of 8.5 to 11.x name tensors and queue with `execute_async_v3`, so nothing older is read. The rows below were checked
against the members of NVIDIA's own packages, recorded in tests/golden/tensorrt_surface.json.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError, MissingExtraError
from piflow_edge.kernels import nvidia

log = logging.getLogger(__name__)

# NVIDIA's names of number formats -> ours. On a GPU bfloat16 has no NumPy twin.
_FORMATS = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool", "UINT8": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class Api:
    """How a range of releases is called.

    `since`: its first release. `strongly_typed`: a network takes every type from the graph; before that the builder
    picks them, within what its flags allow. `contexts_by_strategy`: `create_execution_context` takes a strategy, of
    which USER_MANAGED leaves the memory to us; before that a method of another name does. `sized_memory`: a context is
    told how much memory it is given, and an engine tells its need in `device_memory_size_v2`. `profile_sharing`: how
    several contexts come to use one profile: "never", "asked" of the builder, or "always".
    """

    since: tuple[int, int]
    strongly_typed: bool
    contexts_by_strategy: bool
    sized_memory: bool
    profile_sharing: str


# 10.0 brought strong typing and strategies, and took the bindings by number away; 11 took away the builder's precision
# flags, EXPLICIT_BATCH and the memory size without "_v2". None of 9 was ever a general release.
TABLE = (
    Api((8, 5), False, False, False, "never"),
    Api((8, 6), False, False, False, "asked"),
    Api((10, 0), True, True, False, "always"),
    Api((10, 1), True, True, True, "always"),
)
# Of a major release, the minor ones that are known. NVIDIA keeps the interface within a major release, so that a newer
# one of 10 or 11 may come; of 8 none does.
_MINORS = {8: (5, 6), 10: None, 11: None}


def tensorrt():
    """The tensorrt module.

    Raises:
        MissingExtraError: it is not installed, or cannot be loaded.
    """
    try:
        import tensorrt  # pyright: ignore[reportMissingImports]  # NVIDIA's GPUs only
    except (ImportError, OSError) as error:  # the latter of libraries it does not find
        here = "" if isinstance(error, ModuleNotFoundError) else f", and what is here does not load ({error})"
        raise MissingExtraError(
            f"engine 'tensorrt' needs NVIDIA's tensorrt{here}; get it with: pip install 'piflow-edge[tensorrt]' "
            "(on Jetson it comes with JetPack: make the environment with --system-site-packages)"
            + nvidia.also_lacks_driver()
        ) from error
    return tensorrt


def api(release: str) -> Api:
    """How a release such as "10.3.0" is called.

    Raises:
        EngineError: it is not one of those we know.
    """
    try:
        major, minor = (int(number) for number in release.split(".")[:2])
    except ValueError:
        major, minor = -1, -1
    minors = _MINORS.get(major, ())
    if minors is not None and minor not in minors:
        raise EngineError(
            f"this piflow-edge knows TensorRT 8.5, 8.6, 10.x and 11.x; TensorRT {release} is here: install one of "
            "those, or a newer piflow-edge"
        )
    return max((row for row in TABLE if row.since <= (major, minor)), key=lambda row: row.since)


def logger(trt) -> Any:
    """A logger of TensorRT's that writes to ours and keeps what went wrong in `errors`."""
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.INFO,  # it warns of what nobody can change
        "INFO": logging.DEBUG,
        "VERBOSE": logging.NOTSET,
    }

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity, message):
            level = levels.get(severity.name, logging.DEBUG)
            if level >= logging.ERROR:
                self.errors.append(message.strip())
            elif level:
                log.log(level, "TensorRT: %s", message)

    return Logger()


# --- building


def create_network(row: Api, trt, builder):
    """An empty network, typed by its graph where the release can."""
    names = trt.NetworkDefinitionCreationFlag
    # Before 10 the batch is a dimension like any other only where that is asked for.
    flag = names.STRONGLY_TYPED if row.strongly_typed else names.EXPLICIT_BATCH
    return builder.create_network(1 << int(flag))


# Narrowest number format of a graph's matrix products -> what allows the builder to use it.
_FLAGS = {"float16": ("FP16", "OBEY_PRECISION_CONSTRAINTS"), "int8": ("INT8",)}


def builder_flags(row: Api, computes_in: str) -> tuple[str, ...]:
    """The builder's flags for a graph that computes in this number format: none where the graph's own types hold."""
    return () if row.strongly_typed else _FLAGS.get(computes_in, ())


def set_precision(row: Api, trt, config, network, graph: Graph, computes_in: str) -> None:
    """Let the builder use the types that the graph has, and no others."""
    # float32 is float32: TF32, on by default, has 11 bits. Who wants fewer than 24 takes fp16.
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in builder_flags(row, computes_in):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not row.strongly_typed and computes_in == "float16":
        inputs = (network.get_input(n) for n in range(network.num_inputs))
        from piflow_edge.engines.trt.pins import pin_float32  # late: only builds need it

        pin_float32(trt, network, graph, {tensor.name: format_of(tensor.dtype) for tensor in inputs})


def share_profiles(row: Api, trt, config) -> None:
    """Let several contexts of the engine use its one profile at a time, where the release can."""
    if row.profile_sharing == "asked":
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def tell_layers(trt, config) -> None:
    """Let the engine's inspector tell in which types its layers compute. Costs some bytes, and no time."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def use_own_kernels(trt, config) -> None:
    """Leave cuBLAS and cuDNN out, which releases before 10 try too: hundreds of megabytes of memory less."""
    kinds = trt.TacticSource.__members__.items()
    own = sum(1 << int(kind) for name, kind in kinds if not name.startswith(("CUBLAS", "CUDNN")))
    if not config.set_tactic_sources(own):
        raise EngineError("TensorRT does not build with its own kernels alone; leave that option out")


def set_workspace(trt, config, size: int) -> None:
    """Let each layer use `size` bytes of the GPU's memory for scratch."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)


def parse(parser, graph: Graph) -> bool:
    """Read a graph; what went wrong is in the parser's errors."""
    if not graph.weights:
        return parser.parse(bytes(graph.model))  # it may be a view of a file
    # All releases find weights in files beside a model; those before 10.14 in no other way.
    with tempfile.TemporaryDirectory(prefix="piflow-edge-") as folder:
        for name, content in graph.weights.items():
            (Path(folder) / name).write_bytes(content)
        path = Path(folder) / "model.onnx"
        path.write_bytes(graph.model)
        return parser.parse_from_file(str(path))


# --- running


def create_context(row: Api, trt, engine):
    """What runs an engine, without memory of its own; None if that failed."""
    if row.contexts_by_strategy:
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def memory_size(row: Api, engine) -> int:
    """Bytes of the GPU's memory that a context of this engine needs for scratch."""
    return engine.device_memory_size_v2 if row.sized_memory else engine.device_memory_size


def set_memory(row: Api, context, pointer: int, size: int) -> None:
    """Give a context its scratch memory."""
    if row.sized_memory:
        context.set_device_memory(pointer, size)
    else:
        context.device_memory = pointer


def format_of(dtype) -> str:
    """ "float32" for TensorRT's FLOAT.

    Raises:
        EngineError: a format we do not hand over.
    """
    name = dtype.name
    if name not in _FORMATS:
        raise EngineError(f"an engine's inputs and outputs are of {', '.join(_FORMATS)}; got {name}")
    return _FORMATS[name]
