"""Models above 2 GiB, where a protobuf message ends: their weights lie in a file beside them.

A model in memory may be of any size; as a `Graph` it is bytes, of the model and of that file. Of a network that memory
may not hold, the file is one of `weight_files`.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir
from types import MappingProxyType
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from piflow_edge.engines import Graph
from piflow_edge.export.onnx_graphs.compact import compact
from piflow_edge.export.onnx_graphs.weight_files import STORED, WEIGHTS, WeightFile, WeightsOnDemand

# Bytes of weights above which they move out; what else a model holds counts towards protobuf's limit too.
LARGEST_MODEL = 2**31 - 2**26
# Smaller tensors stay: whoever infers shapes reads axes and sizes from them.
_STAYS = 1024


def graph_of(model: onnx.ModelProto, weights: WeightsOnDemand | WeightFile | None = None) -> Graph:
    """The model as bytes, its weights in a file of their own if they are too many. The model is used up.

    `weights`: where some of its weights are already; they move back into a model that is small enough.
    """
    name = STORED if isinstance(weights, WeightsOnDemand) else WEIGHTS
    if sum(map(count_bytes, model.graph.initializer)) <= LARGEST_MODEL:
        if weights is not None:
            _load_weights(model, {name: weights})
        if isinstance(weights, WeightFile):
            weights.drop()
        return Graph(model.SerializeToString())
    file = io.BytesIO()
    for tensor in model.graph.initializer:
        if weights is not None:
            move_out(tensor, weights)
        elif len(tensor.raw_data) >= _STAYS:
            _set_place(tensor, name, file.tell(), file.write(tensor.raw_data))
    return Graph(model.SerializeToString(), {name: file.getvalue() if weights is None else weights})


def move_out(tensor: onnx.TensorProto, weights: WeightsOnDemand | WeightFile) -> None:
    """Put a tensor's content into a file, unless it is there or so small that it may stay."""
    data = tensor.raw_data
    if len(data) < _STAYS:
        return
    if isinstance(weights, WeightFile):
        _set_place(tensor, WEIGHTS, weights.append(data), len(data))
    else:
        _set_place(tensor, STORED, weights.append(len(data), lambda: data), len(data))


def _set_place(tensor: onnx.TensorProto, file: str, start: int, length: int) -> None:
    set_external_data(tensor, file, offset=start, length=length)
    tensor.ClearField("raw_data")  # at once: memory holds one copy, not two


def is_on_demand(graph: Graph) -> bool:
    """Whether weights of the graph are made when they are read, because memory may not hold them."""
    return STORED in graph.weights


def drop_weights(graph: Graph) -> None:
    """Delete the file that a graph's weights were written to, if they were."""
    for content in graph.weights.values():
        if isinstance(content, WeightFile):
            content.drop()


class Workpiece:
    """A model in conversion, whose weights are changed one by one: no more than one has to be in memory.

    Args:
        model: it is changed.
        known: values that keep their names, see `compact`; None are all that its nodes make.
        files: contents of the files that its weights lie in, if they do.
        done: takes the weights that it will have, where memory may not hold them.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        known: Iterable[str] | None = None,
        files: Mapping[str, Any] = MappingProxyType({}),
        done: WeightFile | None = None,
    ):
        self.model, self._files, self._done = model, files, done
        self._known = {name for node in model.graph.node for name in node.output} if known is None else known

    @classmethod
    def open(cls, graph: Graph, room: Path | None = None) -> "Workpiece":
        """A graph's model; `room` is a folder for a file that its weights may need, None the system's."""
        if is_on_demand(graph):
            done = WeightFile(room or Path(gettempdir()))
            return cls(onnx.load_from_string(graph.model), files=graph.weights, done=done)
        return cls(model_of(graph))

    def load(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        """An initializer with its content inside."""
        return load_tensor(tensor, self._files)

    def replace(self, tensor: onnx.TensorProto, new: onnx.TensorProto) -> None:
        """Take `new` in the place of an initializer."""
        if self._done is not None:
            move_out(new, self._done)
        tensor.CopyFrom(new)

    def add(self, tensor: onnx.TensorProto) -> None:
        """Add an initializer."""
        self.replace(self.model.graph.initializer.add(), tensor)

    def finish(self) -> Graph:
        """The graph that it has become, compacted and checked."""
        compact(self.model, self._known)
        for tensor in self.model.graph.initializer:
            outside = tensor.data_location == onnx.TensorProto.EXTERNAL
            if outside and ExternalDataInfo(tensor).location in self._files:
                self.replace(tensor, self.load(tensor))
        graph = graph_of(self.model, self._done)
        check(graph)
        return graph


def count_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's content, wherever that lies."""
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)


def measure_lowered_share(graph: Graph) -> float:
    """Share of a graph's weights, by their number, in fewer bits than float32; matrices and kernels count."""
    tensors = [t for t in onnx.load_from_string(graph.model).graph.initializer if len(t.dims) > 1]
    lowered = (t for t in tensors if onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize < 4)
    return sum(math.prod(t.dims) for t in lowered) / max(sum(math.prod(t.dims) for t in tensors), 1)


def load_tensor(tensor: onnx.TensorProto, files: Mapping[str, Any]) -> onnx.TensorProto:
    """The tensor with its content inside: itself, or a copy where the content lies in one of the `files`."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    info = ExternalDataInfo(tensor)
    start, length = int(info.offset or 0), int(info.length or 0)
    file = files[info.location]
    is_made = isinstance(file, WeightsOnDemand | WeightFile)
    content = file.read(start, length) if is_made else memoryview(file)[start : start + length]
    return onnx.TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=bytes(content)
    )


def model_of(graph: Graph) -> onnx.ModelProto:
    """The model with all its weights inside, to be looked at or changed."""
    model = onnx.load_from_string(graph.model)
    _load_weights(model, graph.weights)
    return model


def _load_weights(model: onnx.ModelProto, files: Mapping[str, Any]) -> None:
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(load_tensor(tensor, files))


def check(graph: Graph) -> None:
    """onnx's checker, for models of one file; of others every tensor's place was written above, and they are run next.

    Raises:
        onnx.checker.ValidationError: it is not valid ONNX.
    """
    if not graph.weights:
        onnx.checker.check_model(graph.model, full_check=True)


def name_files(graph: Graph, name: str) -> dict[str, Any]:
    """Files of a graph in a bundle: `name`, and `name`.data for the weights if they are apart, bytes or a file."""
    if not graph.weights:
        return {name: graph.model}
    model = onnx.load_from_string(graph.model)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{name}.data"
    (weights,) = graph.weights.values()
    return {name: model.SerializeToString(), f"{name}.data": weights}


def save(graph: Graph, path: Path) -> None:
    """Write a graph where a tool wants files."""
    for name, data in name_files(graph, path.name).items():
        (path.parent / name).write_bytes(data)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value that has one known, weights included."""
    return infer_values(model, {})[0]


def infer_values(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], dict[str, int]]:
    """Element type of every value that has one known, weights included; and bytes of those whose shape is known.

    Args:
        model: its weights may be inside or in files.
        shapes: of inputs, as they will be; the others are as the model declares them.
    """
    inferred = onnx.shape_inference.infer_shapes(_skeleton_of(model, shapes), data_prop=True).graph
    typed = [*inferred.value_info, *inferred.input, *inferred.output]
    kinds = {v.name: v.type.tensor_type.elem_type for v in typed if v.type.tensor_type.elem_type}
    sizes = {}
    for value in typed:
        lengths = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        if value.name in kinds and value.type.tensor_type.HasField("shape") and all(lengths):
            width = onnx.helper.tensor_dtype_to_np_dtype(kinds[value.name]).itemsize
            sizes[value.name] = width * math.prod(lengths)
    return kinds | {tensor.name: tensor.data_type for tensor in inferred.initializer}, sizes


def _skeleton_of(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The model without large weights, of which shape and type are enough to infer others."""
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import))
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    skeleton.graph.input.extend(model.graph.input)
    skeleton.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and len(tensor.raw_data) < _STAYS:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    for value in skeleton.graph.input:
        for axis, length in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            axis.dim_value = length
    return skeleton
