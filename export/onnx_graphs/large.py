"""Models above 2 GiB, where a protobuf message ends: their weights lie in a file beside them.

A model in memory may be of any size; as a `Graph` it is bytes, of the model and of that file.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from piflow_edge.engines import Graph

# Bytes of weights above which they move out; what else a model holds counts towards protobuf's limit too.
LARGEST_MODEL = 2**31 - 2**26
# Smaller tensors stay: whoever infers shapes reads axes and sizes from them.
_STAYS = 1024
# Name of the file until the bundle gives it one.
_FILE = "weights"


def graph_of(model: onnx.ModelProto) -> Graph:
    """The model as bytes, its weights in a file of their own if they are too many. The model is used up."""
    if sum(map(count_bytes, model.graph.initializer)) <= LARGEST_MODEL:
        return Graph(model.SerializeToString())
    file = io.BytesIO()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= _STAYS:
            start = file.tell()
            set_external_data(tensor, _FILE, offset=start, length=file.write(tensor.raw_data))
            tensor.ClearField("raw_data")  # at once: memory holds one copy, not two
    return Graph(model.SerializeToString(), {_FILE: file.getvalue()})


def count_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's content, wherever that lies."""
    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)


def measure_lowered_share(graph: Graph) -> float:
    """Share of a graph's weights, by their number, in fewer bits than float32; matrices and kernels count."""
    tensors = [t for t in onnx.load_from_string(graph.model).graph.initializer if len(t.dims) > 1]
    lowered = (t for t in tensors if onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize < 4)
    return sum(math.prod(t.dims) for t in lowered) / max(sum(math.prod(t.dims) for t in tensors), 1)


def load_tensor(tensor: onnx.TensorProto, files: Mapping[str, bytes]) -> onnx.TensorProto:
    """The tensor with its content inside: itself, or a copy where the content lies in one of the `files`."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return tensor
    info = ExternalDataInfo(tensor)
    start, length = int(info.offset or 0), int(info.length or 0)
    content = memoryview(files[info.location])[start : start + length]
    return onnx.TensorProto(
        name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=bytes(content)
    )


def model_of(graph: Graph) -> onnx.ModelProto:
    """The model with all its weights inside, to be looked at or changed."""
    model = onnx.load_from_string(graph.model)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(load_tensor(tensor, graph.weights))
    return model


def check(graph: Graph) -> None:
    """onnx's checker, for models of one file; of others every tensor's place was written above, and they are run next.

    Raises:
        onnx.checker.ValidationError: it is not valid ONNX.
    """
    if not graph.weights:
        onnx.checker.check_model(graph.model, full_check=True)


def name_files(graph: Graph, name: str) -> dict[str, bytes]:
    """Files of a graph in a bundle: `name`, and `name`.data for the weights if they are apart."""
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
