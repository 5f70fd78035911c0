"""ONNX Runtime."""

import numpy as np

from piflow_edge.engines import EngineOptions, Graph
from piflow_edge.errors import EngineError, MissingExtraError


def runtime():
    """The onnxruntime module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "engine 'ort-cpu' needs onnxruntime; get it with: pip install 'piflow-edge[cpu]'"
        ) from error
    return onnxruntime


class OrtEngine:
    """A network in ONNX Runtime.

    Args:
        graph: an ONNX model.
        device: "cpu".
        options: threads.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: ONNX Runtime cannot open or run the graph.
    """

    name = "ort-cpu"
    max_batch = None

    def __init__(self, graph: Graph, device: str, options: EngineOptions):
        ort = runtime()
        settings = ort.SessionOptions()
        settings.log_severity_level = 3  # errors reach the caller as exceptions; the rest is chatter
        settings.intra_op_num_threads = options.num_threads or 0
        if graph.weights:
            names, contents = list(graph.weights), list(graph.weights.values())
            sizes = [len(content) for content in contents]
            settings.add_external_initializers_from_files_in_memory(names, contents, sizes)
        try:
            self._session = ort.InferenceSession(graph.model, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"onnxruntime {ort.__version__} cannot open the network: {error}") from error
        self.device = device
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One network call."""
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise EngineError(f"the network call failed in onnxruntime: {error}") from error

    def close(self) -> None:
        """Free the network's memory."""
        self._session = None


def layer_values(graph: bytes, inputs: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Values inside a graph, computed node by node: nothing is fused or left out.

    Args:
        graph: an ONNX model.
        inputs: of the graph.
        names: values to read out, made by nodes at its top level.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        EngineError: ONNX Runtime cannot open or run the graph.
    """
    onnx, ort = _onnx(), runtime()
    model = onnx.load_from_string(graph)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"onnxruntime {ort.__version__} cannot run the network: {error}") from error


def first_non_finite(graph: bytes, inputs: dict[str, np.ndarray]) -> str | None:
    """The first node whose result holds NaN or infinity, with its operator and weights; None if there is none.

    Raises:
        MissingExtraError, EngineError: see `layer_values`.
    """
    nodes = _onnx().load_from_string(graph).graph.node
    values = layer_values(graph, inputs, [name for node in nodes for name in node.output if name])
    made = set(values)
    for node in nodes:
        results = (values[name] for name in node.output if name)
        if any(value.dtype.kind == "f" and not np.isfinite(value).all() for value in results):
            weights = [name for name in node.input if name not in made and "." in name]
            return f"{node.name} ({node.op_type}{' with ' + ', '.join(weights) if weights else ''})"
    return None


def _onnx():
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError(
            "looking into a graph needs onnx; get it with: pip install 'piflow-edge[train]'"
        ) from error
    return onnx
