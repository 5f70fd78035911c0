"""Engines of TensorRT and TensorRT for RTX inside ONNX Runtime, made ahead: an ONNX model that holds the engine."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from piflow_edge.engines import EngineOptions, Graph
from piflow_edge.engines.ort import cuda_sessions as ort_cuda
from piflow_edge.engines.ort.messages import plain_reason
from piflow_edge.engines.ort.sessions import give_weights
from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia

BACKENDS = {"ort-tensorrt": ort_cuda.OrtTensorRT, "tensorrt-rtx": ort_cuda.OrtTensorRTRTX}
# How the two providers call the same things.
_PREFIX = {"ort-tensorrt": "trt", "tensorrt-rtx": "nv"}


def provider_options(
    engine: str,
    computes_in: str,
    profile: Mapping[str, tuple[tuple[int, ...], ...]],
    *,
    ordinal: int,
    workspace: int | None,
    timing_cache: Path | None,
) -> dict[str, str]:
    """What the provider is told; see `compile_graph`."""
    prefix = _PREFIX[engine]
    options = {"device_id": str(ordinal)}
    for place, word in enumerate(("min", "opt", "max")):
        shapes = (f"{name}:{'x'.join(map(str, sizes[place]))}" for name, sizes in profile.items())
        options[f"{prefix}_profile_{word}_shapes"] = ",".join(shapes)
    if workspace is not None:
        options[f"{prefix}_max_workspace_size"] = str(workspace)
    if engine == "ort-tensorrt":  # TensorRT for RTX takes all types from the graph, and times nothing
        options["trt_fp16_enable"] = str(int(computes_in == "float16"))
        options["trt_int8_enable"] = str(int(computes_in == "int8"))
        if computes_in == "float16":
            options["trt_layer_norm_fp32_fallback"] = "1"
        if timing_cache is not None:
            options["trt_timing_cache_enable"] = "1"
            options["trt_timing_cache_path"] = str(timing_cache)
    return options


def compile_graph(
    engine: str,
    graph: Graph,
    computes_in: str,
    profile: Mapping[str, tuple[tuple[int, ...], ...]],
    *,
    device: str,
    workspace: int | None,
    timing_cache: Path | None,
) -> bytes:
    """An ONNX model whose nodes are the finished engine, for one GPU.

    Args:
        engine: "ort-tensorrt" or "tensorrt-rtx".
        graph: an ONNX model.
        computes_in: the narrowest number format of the graph's matrix products.
        profile: for each input its least, best and greatest shape.
        device: "cuda" or "cuda:N".
        workspace: bytes of the GPU's memory for scratch; None is all there is.
        timing_cache: folder for measured kernel times; None for none.

    Raises:
        MissingExtraError: ONNX Runtime, or the one with this provider, is not installed.
        EngineError: the provider cannot build the graph, or the graph reaches for what did not come with it.
    """
    graph.check()
    backend = BACKENDS[engine]
    module = backend.installed_runtime()
    if timing_cache is not None:
        timing_cache.mkdir(parents=True, exist_ok=True)
    options = provider_options(
        engine,
        computes_in,
        profile,
        ordinal=nvidia.ordinal_in(device),
        workspace=workspace,
        timing_cache=timing_cache,
    )
    settings = module.SessionOptions()
    settings.log_severity_level = 4
    give_weights(settings, graph)
    try:
        if hasattr(module, "ModelCompiler"):
            settings.add_provider(backend.provider, options)
            data = module.ModelCompiler(
                settings, graph.model, embed_compiled_data_into_model=True
            ).compile_to_bytes()
        else:  # onnxruntime before 1.23
            data = _compile_by_session(module, backend.provider, settings, graph, options)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"{backend.provider} cannot build the engine: {plain_reason(error)}") from error
    if b"EPContext" not in data:
        raise EngineError(f"{backend.provider} took no part of the graph; use another engine")
    return data


def _compile_by_session(module, provider: str, settings, graph: Graph, options: dict[str, str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="piflow-edge-") as folder:
        path = Path(folder) / "compiled.onnx"
        for name, value in {"enable": "1", "embed_mode": "1", "file_path": str(path)}.items():
            settings.add_session_config_entry(f"ep.context_{name}", value)
        module.InferenceSession(graph.model, settings, providers=[(provider, options)], enable_fallback=0)
        return path.read_bytes()


def open_compiled(engine: str, data: bytes, device: str, profile: str):
    """A compiled model for the sizes of `Target.describe_profile`, opened in its backend."""
    return BACKENDS[engine](Graph(b""), device, EngineOptions(), plan=data, profile=profile)
