"""A look into a graph, node by node: which values it makes, and where the first odd one comes from."""

import numpy as np

from piflow_edge.engines import Graph
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.engines.ort.sessions import give_weights
from piflow_edge.errors import EngineError, MissingExtraError

# Nodes whose values are in memory together; for each lot of them the graph runs once more.
_NODES_TOGETHER = 64


def layer_values(graph: Graph, inputs: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """Values inside a graph, computed node by node: nothing is fused or left out.

    Args:
        graph: an ONNX model.
        inputs: of the graph.
        names: values to read out, made by nodes at its top level.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        EngineError: ONNX Runtime cannot open or run the graph, or the graph reaches for what did not come with it.
    """
    onnx, ort = _onnx(), import_onnxruntime()
    graph.check()
    model = onnx.load_from_string(graph.model)
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    give_weights(options, graph)
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise EngineError(f"onnxruntime {ort.__version__} cannot run the network: {error}") from error


def first_non_finite(graph: Graph, inputs: dict[str, np.ndarray]) -> str | None:
    """The first node whose result holds NaN or infinity, with its operator and weights; None if there is none.

    Raises:
        MissingExtraError, EngineError: see `layer_values`.
    """
    nodes = _onnx().load_from_string(graph.model).graph.node
    written = {name for node in nodes for name in node.output}
    for start in range(0, len(nodes), _NODES_TOGETHER):
        part = nodes[start : start + _NODES_TOGETHER]
        values = layer_values(graph, inputs, [name for node in part for name in node.output if name])
        for node in part:
            results = (values[name] for name in node.output if name)
            if any(value.dtype.kind == "f" and not np.isfinite(value).all() for value in results):
                weights = [name for name in node.input if name not in written and "." in name]
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
