"""A teacher's network as a graph: opened to be compared with students, or as a file to be timed without PyTorch."""

from pathlib import Path

import numpy as np
import torch

from piflow_edge.conditioning import Arrays, ClassLabels, Conditioner, concatenate, count_of
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.loop.training import suggest_steering
from piflow_edge.distill.networks.flow_network import FlowNetwork, find_misfit
from piflow_edge.distill.sources import TeacherModel, ask_teacher
from piflow_edge.distill.teacher import as_tensors
from piflow_edge.engines import DEFAULT_OPTIONS, Engine, EngineOptions, Graph, open_engine
from piflow_edge.errors import CheckFailedError, CheckpointError, DataError
from piflow_edge.export.onnx_graphs.to_onnx import export_network, network_graph
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.teacher_engine import EngineTeacher
from piflow_edge.system.files import check_place, write_atomic

# Relative to the largest velocity; as of a bundle's fp32 outputs.
_TOLERANCE = 1e-4
_LEVELS = (1.0, 0.5, 0.05)


def open_teacher(
    model: TeacherModel, data: ImageData, *, options: EngineOptions = DEFAULT_OPTIONS
) -> EngineTeacher:
    """Open a teacher in the fastest engine here, to be compared with students that run in it too.

    Args:
        model: the teacher, wherever it came from.
        data: what it is compared on; says what steers a network that does not name its classes.
        options: threads and memory.

    Raises:
        DataError: the network knows another number of classes than the data.
        CheckFailedError, EngineError: the network cannot be exported, or no engine runs it.
    """
    network, conditioner = model.network, _find_conditioner(model, data)
    x_t = torch.from_numpy(philox_normal(0, range(2), network.sample_shape))
    ask_teacher(network, x_t, torch.full((2,), 0.5), as_tensors(conditioner.example(2)))
    engine = open_engine(network_graph(network, conditioner.inputs), options=options)
    return EngineTeacher(engine, conditioner, network.sample_shape)


def _find_conditioner(model: TeacherModel, data: ImageData) -> Conditioner:
    """Return what steers a teacher: what it was trained with if that is known, else what the data have."""
    network, conditioner = model.network, model.conditioner or data.conditioner
    if problem := find_misfit(network, conditioner):
        raise DataError(
            f"the teacher: {problem}; of {data.name!r}: {data.conditioner.summarize()}{suggest_steering(data)}"
        )
    if conditioner.null(1) is not None:
        return conditioner
    null = {name: value[None].cpu().numpy() for name, value in network.null.items()} or data.null()
    if null and null.keys() == {spec.name for spec in conditioner.inputs}:
        return Arrays(conditioner.inputs, null)
    return conditioner


def export_teacher(network: FlowNetwork, file: Path, conditioner: Conditioner | None = None) -> float:
    """Write a teacher as `x_t`, `t` (noise level) and what steers it -> `u_t`, checked against PyTorch.

    What stands for "no condition" is given under the same names: `EngineTeacher` guides with it, on two samples in one
    call where it is as long as the condition.

    Args:
        network: the teacher.
        file: to write.
        conditioner: what steers it; None is class labels, as many as the network knows.

    Returns:
        The worst difference from PyTorch, relative to the largest velocity.

    Raises:
        CheckpointError: what steers the network is not known.
        CheckFailedError: the graph does not reproduce PyTorch; nothing is written.
    """
    check_place(file)
    conditioner = conditioner or _name_classes(network)
    model = export_network(network, conditioner.inputs)
    worst = _compare_velocities(network, open_engine(Graph(model), engine="ort-cpu"), conditioner)
    if not worst <= _TOLERANCE:  # NaN does not pass
        raise CheckFailedError(
            f"the teacher's graph is {worst:.1e} off PyTorch, which is more than {_TOLERANCE:.0e}"
        )
    write_atomic(file, model)
    return worst


def _name_classes(network: FlowNetwork) -> ClassLabels:
    """Class labels for a network that was told nothing else; the last one it knows is that of no class."""
    if set(network.null) != {"labels"}:
        raise CheckpointError(
            "nothing says what steers this network; give the checkpoint of train-teacher, or a network whose null is "
            "that of 'labels'"
        )
    return ClassLabels(tuple(map(str, range(int(network.null["labels"])))))


def _compare_velocities(network: FlowNetwork, engine: Engine, conditioner: Conditioner) -> float:
    """The worst difference between graph and network, with and without a condition, relative to the largest."""
    given = conditioner.example(2)
    null = conditioner.null(1)
    if null and all(null[name].shape[1:] == array.shape[1:] for name, array in given.items()):
        given = concatenate([given, null])
    count = count_of(given) or 2  # a network that nothing steers
    x_t = philox_normal(0, range(count), network.sample_shape)
    worst = 0.0
    for level in _LEVELS:
        t = np.full(count, level, np.float32)
        expected = network.velocity(torch.from_numpy(x_t), torch.from_numpy(t), **as_tensors(given)).numpy()
        largest = np.abs(expected).max() or 1.0  # a network that was never trained answers 0
        found = engine.run({"x_t": x_t, "t": t, **given})["u_t"]
        worst = max(worst, float(np.abs(found - expected).max() / largest))
    return worst
