"""ONNX Runtime."""

import numpy as np

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
            "engine 'ort' needs onnxruntime; get it with: pip install 'piflow-edge[cpu]'"
        ) from error
    return onnxruntime


class OrtEngine:
    """A network in ONNX Runtime.

    Args:
        graph: an ONNX model.
        device: "cpu".

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: ONNX Runtime cannot open or run the graph.
    """

    name = "ort"

    def __init__(self, graph: bytes, device: str):
        ort = runtime()
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors reach the caller as exceptions; the rest is chatter
        try:
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
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
