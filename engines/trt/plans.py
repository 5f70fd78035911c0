"""ONNX -> TensorRT engine: minutes of trying kernels on the GPU at hand."""

import logging
from collections.abc import Mapping
from pathlib import Path

from piflow_edge.engines import Graph
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.trt import inspection as trt_inspection
from piflow_edge.engines.trt import versions as trt_versions
from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia
from piflow_edge.system.files import sha256, write_atomic

log = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def build_plan(
    graph: Graph,
    computes_in: str,
    profile: Mapping[str, Shapes],
    *,
    ordinal: int,
    workspace: int | None,
    timing_cache: Path | None,
    own_kernels: bool = False,
) -> bytes:
    """A serialised engine of a graph, for one GPU.

    Args:
        graph: an ONNX model.
        computes_in: the narrowest number format of the graph's matrix products.
        profile: for each input its least, best and greatest shape.
        ordinal: the GPU.
        workspace: bytes of its memory that a layer may use for scratch; None is all there is.
        timing_cache: file of measured kernel times, used and added to; None for none.
        own_kernels: leave cuBLAS and cuDNN out.

    Raises:
        MissingExtraError: tensorrt is not installed.
        EngineError: TensorRT cannot read the graph, or cannot build it, or the graph reaches for what did not come with
            it.
    """
    graph.check()
    trt = trt_versions.tensorrt()
    row = trt_versions.api(trt.__version__)
    logger = trt_versions.logger(trt)
    with nvidia.current(ordinal):
        builder = _make(lambda: trt.Builder(logger), logger, "start its builder")
        network = trt_versions.create_network(row, trt, builder)
        parser = trt.OnnxParser(network, logger)
        if not trt_versions.parse(parser, graph):
            raise EngineError(f"TensorRT {trt.__version__} cannot read the graph: {_reasons(parser, logger)}")
        config = builder.create_builder_config()
        trt_versions.set_precision(row, trt, config, network, graph, computes_in)
        trt_versions.tell_layers(trt, config)
        trt_versions.share_profiles(row, trt, config)
        if own_kernels:
            trt_versions.use_own_kernels(trt, config)
        if workspace is not None:
            trt_versions.set_workspace(trt, config, workspace)
        _add_profile(builder, config, network, profile)
        if timing_cache is not None:
            times = config.create_timing_cache(_read_stored(timing_cache))
            if not config.set_timing_cache(times, ignore_mismatch=False):
                raise EngineError(f"TensorRT does not take the timing cache {timing_cache}; delete it")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot build the engine: {'; '.join(logger.errors) or 'no reason given'}"
            )
        if timing_cache is not None:
            _store(timing_cache, config)
        return bytes(plan)


def inspect_plan(plan: bytes, graph: Graph, computes_in: str, ordinal: int) -> trt_inspection.Inspection:
    """What was built: see `trt_inspection`. `plan`: of `build_plan`, of the same graph and number format.

    Raises:
        EngineError: TensorRT cannot open it.
    """
    trt = trt_versions.tensorrt()
    logger = trt_versions.logger(trt)
    with nvidia.current(ordinal):
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"TensorRT cannot open what it built: {'; '.join(logger.errors)}")
        return trt_inspection.inspect_engine(trt, engine, len(plan), graph, computes_in)


def _make(make, logger, what: str):
    try:
        result = make()
    except Exception as error:  # the bindings raise TypeError where the library returned nothing
        raise EngineError(f"TensorRT cannot {what}: {'; '.join(logger.errors) or error}") from error
    if result is None:
        raise EngineError(f"TensorRT cannot {what}: {'; '.join(logger.errors)}")
    return result


def _reasons(parser, logger) -> str:
    found = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    return "; ".join(found or logger.errors) or "no reason given"


def _add_profile(builder, config, network, profile: Mapping[str, Shapes]) -> None:
    shapes = {(tensor := network.get_input(n)).name: tuple(tensor.shape) for n in range(network.num_inputs)}
    if shapes.keys() != profile.keys():
        raise EngineError(f"the graph's inputs are {', '.join(shapes)}; the bundle says {', '.join(profile)}")
    ranges = builder.create_optimization_profile()
    for name, (least, best, most) in profile.items():
        if any(size not in (-1, *sizes) for size, *sizes in zip(shapes[name], least, most, strict=True)):
            raise EngineError(f"input {name} of the graph is {shapes[name]}; the bundle says {most}")
        ranges.set_shape(name, least, best, most)
    if config.add_optimization_profile(ranges) < 0:
        raise EngineError(f"TensorRT does not take batches of {profile}")


# --- kernel times, kept between builds: 64 hexadecimal digits of SHA-256, then TensorRT's bytes


def _read_stored(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise EngineError(f"the timing cache {path} cannot be read: {error.strerror}") from error
    if data[:64] != sha256(data[64:]).encode():
        log.warning("the timing cache %s is damaged; kernels are timed anew", path)
        return b""
    return data[64:]


def _store(path: Path, config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with engine_cache.hold_lock(path):
        times = config.get_timing_cache()
        # Another build may have added to the file meanwhile.
        if others := _read_stored(path):
            times.combine(config.create_timing_cache(others), ignore_mismatch=False)
        data = bytes(times.serialize())
        write_atomic(path, sha256(data).encode() + data)
