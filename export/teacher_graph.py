"""A teacher's network as one ONNX file, so that its guided steps can be timed where there is no PyTorch."""

from pathlib import Path

import numpy as np
import torch

from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import CheckFailedError, CheckpointError
from piflow_edge.export.to_onnx import export_network
from piflow_edge.noise import philox_normal
from piflow_edge.system.files import write_atomic

# Relative to the largest velocity; as of a bundle's fp32 outputs.
_TOLERANCE = 1e-4
_LEVELS = (1.0, 0.5, 0.05)


def export_teacher(network: FlowNetwork, file: Path) -> float:
    """Write a class-conditional teacher as `x_t`, `t` (noise level), `class_labels` -> `u_t`, checked against PyTorch.

    The label after the last class stands for no class: `EngineTeacher` guides with it, on two samples in one call.

    Returns:
        The worst difference from PyTorch, relative to the largest velocity.

    Raises:
        CheckpointError: the network takes no labels.
        CheckFailedError: the graph does not reproduce PyTorch; nothing is written.
    """
    if network.num_classes is None:
        raise CheckpointError("a teacher's graph takes class labels; this network takes none")
    model = export_network(network)
    engine = open_engine(Graph(model), engine="ort-cpu")
    labels = np.array([0, network.num_classes - 1, network.num_classes], np.int64)
    x_t = philox_normal(0, range(len(labels)), network.sample_shape)
    worst = 0.0
    for level in _LEVELS:
        t = np.full(len(labels), level, np.float32)
        x, sigma, ids = map(torch.from_numpy, (x_t, t, labels))
        expected = network.velocity(x, sigma, labels=ids).numpy()
        largest = np.abs(expected).max() or 1.0  # a network that was never trained answers 0
        found = engine.run({"x_t": x_t, "t": t, "class_labels": labels})["u_t"]
        worst = max(worst, float(np.abs(found - expected).max() / largest))
    if not worst <= _TOLERANCE:  # NaN does not pass
        raise CheckFailedError(
            f"the teacher's graph is {worst:.1e} off PyTorch, which is more than {_TOLERANCE:.0e}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, model)
    return worst
