"""PyTorch network -> ONNX graph. The policy and its integration stay outside."""

import ast
import contextlib
import gc
import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import nn

from piflow_edge.bundle.sections import AxisSpec
from piflow_edge.bundle.sizes import HEIGHT, WIDTH
from piflow_edge.conditioning import TensorSpec
from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.distill.sources import describe_failure
from piflow_edge.distill.stored_weights import has_stored
from piflow_edge.engines import Graph
from piflow_edge.errors import CheckFailedError, CheckpointError
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.large import check, graph_of
from piflow_edge.export.onnx_graphs.stored_initializers import take_out_weights
from piflow_edge.export.onnx_graphs.weight_files import WeightsOnDemand

# TensorRT 8.6 (JetPack 6.0) reads up to 17 in full and most of 18; torch's exporter writes 18 or newer.
OPSET = 18

VELOCITY_OUTPUTS = ("u_t",)

# Length of a named axis that a network is traced with, in its units; a number that no other axis is likely to have.
_TRACED_UNITS = 13

# What steers a class-conditional network.
LABELS = (TensorSpec("labels", "int64", ("batch",)),)


# Where torch's exporter says which modules a node comes from, as a list, the outermost first.
_SCOPES = "pkg.torch.onnx.name_scopes"
# What is around a network here, and says nothing to its author.
_WRAPPERS = re.compile(r"^(network\.)?(module\.)?")


class _Positional(nn.Module):
    """The network with its inputs in a fixed order, as a graph has them."""

    def __init__(self, network: FlowNetwork, names: tuple[str, ...]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x_t, t, conditioning=()):
        return self.network(x_t, t, **dict(zip(self.names, conditioning, strict=True)))


def export_network(network: FlowNetwork, conditioning: Sequence[TensorSpec] = LABELS) -> bytes:
    """`network_graph` as one file, for networks whose weights fit into it.

    Raises:
        CheckpointError: they do not: the network is above 2 GiB.
        CheckFailedError: the exported graph is not valid ONNX.
    """
    graph = network_graph(network, conditioning)
    if graph.weights:
        raise CheckpointError(
            "a network of one ONNX file is below 2 GiB; this one is larger, take a smaller one"
        )
    return graph.model


def network_graph(
    network: FlowNetwork,
    conditioning: Sequence[TensorSpec] = LABELS,
    axes: Mapping[str, AxisSpec] | None = None,
) -> Graph:
    """The network as an ONNX model whose batch and named axes are dynamic; "height" and "width" are the states'.

    Inputs: `x_t` float32 (batch, C, H, W), `t` float32 (batch,), the noise level, and the conditioning under the names
    of the network's arguments. Outputs: a policy's parts of a student, `u_t` of a teacher.

    Args:
        network: teacher or student.
        conditioning: what steers it.
        axes: how long its named axes may be.

    Raises:
        CheckpointError: torch cannot make a graph of the network's code.
        CheckFailedError: the exported graph is not valid ONNX.
    """
    # Two samples, and no named axis of one: torch.export takes an axis of one for a constant.
    lengths = traced_lengths(axes or {})
    given = tuple(torch.zeros(spec.size(lengths), dtype=getattr(torch, spec.dtype)) for spec in conditioning)
    state, sides = size_state(network.sample_shape, axes or {}, lengths)
    example = (torch.zeros(2, *state), torch.ones(2))
    dims = build_dims(axes or {})
    shapes = ({0: dims["batch"], **{place: dims[name] for place, name in sides.items()}}, {0: dims["batch"]})
    if given:  # torch.export trips over an empty tuple
        dynamic = tuple(
            {place: dims[n] for place, n in enumerate(spec.shape) if isinstance(n, str)}
            for spec in conditioning
        )
        example, shapes = (*example, given), (*shapes, dynamic)
    names = tuple(spec.name for spec in conditioning)
    outputs = network.head.outputs if network.head else VELOCITY_OUTPUTS
    module = _Positional(network.eval(), names).eval()
    return trace_graph(module, example, ("x_t", "t", *names), outputs, shapes, name_dims(axes or {}))


def trace_graph(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
    axes: Mapping[str, str] | None = None,
) -> Graph:
    """Trace a module, and return what it does as a graph without traces of this machine, checked.

    Args:
        module: called with positional arguments, in evaluation.
        example: arguments to trace it with.
        inputs, outputs: names of the graph's.
        dynamic_shapes: of the arguments, as `torch.export` takes them.
        axes: what torch calls an axis -> what the graph is to call it.

    Raises:
        CheckpointError: torch cannot make a graph of the module's code.
        CheckFailedError: the exported graph is not valid ONNX.
    """
    in_files = has_stored(module)
    with quiet(), _rare_collections(), torch.no_grad(), _name_the_line():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
            optimize=not in_files,  # which would turn weights around that are not to be read yet
        )
        assert program is not None, "asked for, it is returned"
        weights = None
        if in_files:
            weights = take_out_weights(program.model, module)
            program.optimize()
    return _clean_graph(program.model_proto, axes or {}, weights)


@contextlib.contextmanager
def _rare_collections():
    """Let Python look for garbage less often: tracing makes millions of objects that stay, an eighth of its time."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


@contextlib.contextmanager
def _name_the_line():
    """Turn the exporter's pages of text into one error that names the user's line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the half of a graph that it has made
            yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise CheckpointError(
            f"torch cannot make a graph of the network: {describe_failure(cause)}; a graph takes the same way for "
            "every input: let no value of a tensor decide which code runs, and no code depend on the batch's size"
        ) from error


def name_dims(axes: Mapping[str, AxisSpec]) -> dict[str, str]:
    """What torch calls the axes of `build_dims` in a graph -> what they are called here."""
    return {_dim_name(name, axis): name for name, axis in axes.items()}


def traced_lengths(axes: Mapping[str, AxisSpec]) -> dict[str, int]:
    """Lengths to trace named axes with: two samples, and no two sides alike, which might be taken for one.

    An axis of one length keeps it, and may be 1.
    """
    lengths = {name: axis.nearest(_TRACED_UNITS * axis.multiple_of) for name, axis in axes.items()}
    if HEIGHT in axes and WIDTH in axes and lengths[HEIGHT] == lengths[WIDTH]:
        wider = axes[WIDTH].nearest(lengths[WIDTH] + axes[WIDTH].multiple_of)
        lengths[WIDTH] = wider if wider != lengths[WIDTH] else axes[WIDTH].shortest
    return {**lengths, "batch": 2}


def size_state(
    shape: Sequence[int], axes: Mapping[str, AxisSpec], lengths: Mapping[str, int]
) -> tuple[tuple[int, ...], dict[int, str]]:
    """Return the shape (C, H, W) to trace states with, and the places, after the batch, of their named axes."""
    if HEIGHT not in axes or WIDTH not in axes:
        return tuple(shape), {}
    return (shape[0], lengths[HEIGHT], lengths[WIDTH]), {2: HEIGHT, 3: WIDTH}


def build_dims(axes: Mapping[str, AxisSpec]) -> dict[str, object]:
    """Named axes as torch.export has them; None is an axis of one length."""
    dims: dict[str, object] = {"batch": torch.export.Dim("batch", min=1)}
    for name, axis in axes.items():
        if name == "batch":
            continue
        unit, most = axis.multiple_of, axis.longest
        if most == axis.shortest:
            dims[name] = None
        elif unit == 1:
            dims[name] = torch.export.Dim(name, min=axis.shortest, max=most)
        else:
            many = torch.export.Dim(f"{name}_units", min=axis.shortest // unit, max=most and most // unit)
            dims[name] = unit * many
    return dims


def _dim_name(name: str, axis: AxisSpec) -> str:
    """What torch calls an axis of `build_dims` in the graph."""
    return name if axis.multiple_of == 1 else f"{axis.multiple_of}*{name}_units"


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name each node by the module that it comes from and its operator: "blocks.3.mlp.2/MatMul"."""
    numbers: Counter[str] = Counter()
    for node in graph.node:
        said = {prop.key: prop.value for prop in node.metadata_props}.get(_SCOPES, "[]")
        modules = [
            scope for scope in ast.literal_eval(said)[:-1] if scope
        ]  # the last one is the operation's own
        module = _WRAPPERS.sub("", f"{modules[-1]}." if modules else "").rstrip(".")
        name = f"{module}/{node.op_type}" if module else node.op_type
        numbers[name] += 1
        node.name = name if numbers[name] == 1 else f"{name}_{numbers[name] - 1}"


def _clean_graph(model: onnx.ModelProto, names: Mapping[str, str], weights: WeightsOnDemand | None) -> Graph:
    """Return a traced model without what it says of this machine, its axes renamed by `names`, checked.

    `weights`: those that are not inside.
    """
    compact(model, [name for node in model.graph.node for name in node.output])
    _name_nodes(model.graph)
    for node in model.graph.node:  # stack traces with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    graph = graph_of(model, weights)
    try:
        check(graph)
    except onnx.checker.ValidationError as error:
        raise CheckFailedError(f"the exported graph is not valid ONNX: {error}") from error
    return graph


@contextlib.contextmanager
def quiet():
    """The exporter's progress and deprecation chatter, silenced: what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
