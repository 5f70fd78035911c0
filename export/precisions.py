"""An fp32 graph in other precisions: fp16 where its values allow it, int8 where the weights are.

What stays in float32 is found by measuring on calibration inputs, the states of the student's own trajectory, and is
recorded by name. Inputs and outputs of every graph stay float32.
"""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from piflow_edge.bundle import Manifest
from piflow_edge.engines import Graph, open_engine
from piflow_edge.engines.ort import layer_values
from piflow_edge.errors import CheckFailedError
from piflow_edge.noise import philox_normal
from piflow_edge.sampling import sample

log = logging.getLogger(__name__)

Inputs = dict[str, np.ndarray]

# Not the golden images' seed: a precision is checked on other inputs than it was fitted to.
CALIBRATION_SEED = 1
CALIBRATION_IMAGES = 16

# Calibration cannot see every input: half of fp16's range is left as headroom.
_FP16_LARGEST = float(np.finfo(np.float16).max) / 2
# Root mean square error of one node, relative to its output. Rounding inputs, weights and output to fp16's 11 bits
# costs at most some 5e-4; more means that the node magnifies rounding (the cosine of a large angle) or underflows.
_FP16_NODE_ERROR = 1e-3
# Ends of a walk against the data flow: sums of many products, in which single roundings average out.
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_ROUNDED = ".rounded"


@dataclass
class Conversion:
    """A graph in another precision. `kept`: nodes left in float32 -> why."""

    graph: bytes
    kept: dict[str, str] = field(default_factory=dict)


def calibration_inputs(student: bytes, manifest: Manifest, nfes: Iterable[int]) -> list[Inputs]:
    """What the network is fed along its own trajectories: one batch per student call.

    Args:
        student: the fp32 network as `export_network` writes it.
        manifest: of its bundle.
        nfes: calls per image; a trajectory is run for each.
    """
    engine = open_engine(Graph(student))
    classes = len(manifest.conditioning.class_names)
    ids = np.arange(CALIBRATION_IMAGES, dtype=np.int64) % (classes or 1)
    noise = philox_normal(CALIBRATION_SEED, range(CALIBRATION_IMAGES), manifest.latent.shape)
    calls: list[Inputs] = []

    def network(x_t, sigma):
        calls.append(manifest.network_inputs(x_t, sigma, ids))
        return manifest.policy.policy(engine.run(calls[-1]), x_t, sigma)

    for nfe in nfes:
        schedule = manifest.schedule.schedule(nfe=nfe)
        sample(network, noise, schedule, temperature=manifest.schedule.temperature)
    return calls


def trajectory_error(
    student: bytes, converted: bytes, manifest: Manifest, batches: Sequence[Inputs]
) -> float:
    """Root mean square difference of the x_0 that both graphs predict on these inputs, over its root mean square.

    Predictions are the policy's velocities at the inputs, followed straight down to noise level 0.
    """
    exact, other = open_engine(Graph(student)), open_engine(Graph(converted))
    squares = []
    for batch in batches:
        sigma = float(batch["t"][0]) / manifest.network.num_timesteps
        x_0 = [
            batch["x_t"]
            - sigma
            * manifest.policy.policy(engine.run(batch), batch["x_t"], sigma).velocity(batch["x_t"], sigma)
            for engine in (exact, other)
        ]
        squares.append([np.mean((x_0[1] - x_0[0]) ** 2), np.mean(x_0[0] ** 2)])
    difference, scale = np.max(squares, axis=0)
    return float(np.sqrt(difference / max(scale, 1e-12)))


def to_fp16(graph: bytes, batches: Sequence[Inputs], *, exact_outputs: bool = True) -> Conversion:
    """Weights and activations in fp16, with casts around the nodes that calibration says must stay in float32.

    No operator gets inputs of mixed types, so that the graph suits strongly typed compilers such as TensorRT's.

    Args:
        graph: an fp32 ONNX model.
        batches: calibration inputs.
        exact_outputs: compute each output in float32 from the last matrix product on, as policies need it.

    Raises:
        CheckFailedError: the graph gives NaN or infinity on the calibration inputs.
    """
    model = onnx.load_from_string(graph)
    kept = delicate_nodes(model, batches)
    if exact_outputs:
        for output in model.graph.output:
            for node in _upstream(model, [output.name]):
                kept.setdefault(node, f"leads to output {output.name}")
    _unshare_weights(model, kept)
    # Of inputs and outputs too, which become round trips where the node behind is kept; those go again.
    model = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(kept))
    OnnxModel(model).topological_sort()  # the converter appends its casts at the end
    model.graph.ClearField("value_info")  # and notes types that it then changes
    _drop_round_trips(model)
    OnnxModel(model).topological_sort()
    onnx.checker.check_model(model, full_check=True)
    return Conversion(model.SerializeToString(), kept)


def delicate_nodes(model: onnx.ModelProto, batches: Sequence[Inputs]) -> dict[str, str]:
    """Nodes that fp16 would spoil on these inputs, and why: overflow, or an error far above rounding.

    Each node is run twice on the values that flow in float32: as they are, and rounded to fp16.

    Raises:
        CheckFailedError: a node gives NaN or infinity in float32 already.
    """
    twins, outputs = _with_rounded_twins(model)
    found: dict[str, str] = {}
    for batch in batches:
        values = layer_values(twins, batch, outputs)
        for node in model.graph.node:
            for name in node.output:
                if name in values and node.name not in found:
                    reason = _fp16_problem(name, values[name], values[name + _ROUNDED])
                    if reason:
                        found[node.name] = reason
    for node in model.graph.node:
        # A value that must not be rounded must not be made from rounded ones either: up to the last matrix product.
        if node.name in list(found) and "overflow" not in found[node.name]:
            for above in _upstream(model, node.input):
                found.setdefault(above, f"feeds {node.name}, which magnifies rounding")
    return found


def _fp16_problem(name: str, exact: np.ndarray, rounded: np.ndarray) -> str | None:
    if not np.isfinite(exact).all():
        raise CheckFailedError(f"the fp32 graph gives NaN or infinity in {name} on its own trajectory")
    largest = float(np.abs(exact).max(initial=0))
    if largest > _FP16_LARGEST:
        return f"{name} reaches {largest:.3g}: fp16 may overflow"
    with np.errstate(over="ignore"):
        difference = rounded.astype(np.float16).astype(np.float64) - exact
    scale = float(np.sqrt(np.mean(np.square(exact, dtype=np.float64)))) if exact.size else 0.0
    error = float(np.sqrt(np.mean(difference**2))) if exact.size else 0.0
    if scale > 0 and not error <= _FP16_NODE_ERROR * scale:
        return f"{name} is off by {error / scale:.1e} in fp16"
    return None


def _with_rounded_twins(model: onnx.ModelProto) -> tuple[bytes, list[str]]:
    """The model with a twin of every float node that reads the same values rounded to fp16; names to read out."""
    twins = copy.deepcopy(model)
    floats = _float_values(model)
    twins.graph.ClearField("node")
    rounded: dict[str, str] = {}
    names: list[str] = []

    def round_trip(name: str) -> None:
        if name in floats and name not in rounded:
            half, rounded[name] = f"{name}.half", f"{name}.in"
            twins.graph.node.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
            twins.graph.node.append(helper.make_node("Cast", [half], [rounded[name]], to=TensorProto.FLOAT))

    for node in model.graph.node:
        for name in node.input:
            round_trip(name)
        twins.graph.node.append(node)
        outputs = [name for name in node.output if name in floats]
        if outputs:
            twin = copy.deepcopy(node)
            twin.name = node.name + _ROUNDED
            twin.input[:] = [rounded.get(name, name) for name in node.input]
            twin.output[:] = [name and name + _ROUNDED for name in node.output]
            twins.graph.node.append(twin)
            names += [*outputs, *(name + _ROUNDED for name in outputs)]
    return twins.SerializeToString(), names


def _float_values(model: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    typed = [*inferred.value_info, *inferred.input, *inferred.output]
    floats = {value.name for value in typed if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {tensor.name for tensor in inferred.initializer if tensor.data_type == TensorProto.FLOAT}


def _upstream(model: onnx.ModelProto, names: Iterable[str]) -> list[str]:
    """Nodes that make these values, back to and with the last matrix products."""
    makers = {name: node for node in model.graph.node for name in node.output}
    floats = _float_values(model)
    found, queue = [], list(names)
    while queue:
        node = makers.get(queue.pop())
        if node is None or node.name in found or not any(name in floats for name in node.output):
            continue
        found.append(node.name)
        if node.op_type not in _PRODUCTS:
            queue += node.input
    return found


def _unshare_weights(model: onnx.ModelProto, kept: Iterable[str]) -> None:
    """Give kept nodes weights of their own: the converter would round what they share with others."""
    kept, weights = set(kept), {tensor.name: tensor for tensor in model.graph.initializer}
    used_in_half = {name for node in model.graph.node if node.name not in kept for name in node.input}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if node.name in kept and name in weights and name in used_in_half:
                node.input[i] = own = f"{name}.of.{node.name}"
                if not any(tensor.name == own for tensor in model.graph.initializer):
                    tensor = model.graph.initializer.add()
                    tensor.CopyFrom(weights[name])
                    tensor.name = own


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Let float32 nodes read each other's values: the converter puts fp32 -> fp16 -> fp32 between them."""

    def target(node):
        return node.attribute[0].i if node.op_type == "Cast" else None

    outputs = {value.name for value in model.graph.output}
    halved = {
        node.output[0]: node.input[0] for node in model.graph.node if target(node) == TensorProto.FLOAT16
    }
    floats = _float_values(model)
    renamed = {
        node.output[0]: halved[node.input[0]]
        for node in model.graph.node
        if target(node) == TensorProto.FLOAT and halved.get(node.input[0]) in floats
    }
    kept = [node for node in model.graph.node if node.output[0] not in renamed]
    # An output keeps its name, which its maker's result takes on.
    final = {renamed[name]: name for name in outputs & renamed.keys()}
    for node in kept:
        inputs = [renamed.get(name, name) for name in node.input]
        node.input[:] = [final.get(name, name) for name in inputs]
        node.output[:] = [final.get(name, name) for name in node.output]
    nodes = [copy.deepcopy(node) for node in kept]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    while True:  # nodes that nobody reads any more
        read = {name for node in model.graph.node for name in node.input} | outputs
        dead = [node for node in model.graph.node if not any(name in read for name in node.output)]
        if not dead:
            break
        for node in dead:
            model.graph.node.remove(node)


class _Batches(CalibrationDataReader):
    def __init__(self, batches: Sequence[Inputs]):
        self._left = iter(batches)

    def get_next(self) -> Inputs | None:
        return next(self._left, None)


def to_int8(
    graph: bytes, batches: Sequence[Inputs], *, static: bool, accepts: Callable[[bytes], float]
) -> Conversion:
    """Weights of matrix products in int8, one scale per output feature, for the CPU.

    Activations are scaled as they come (`static=False`), or by what calibration saw, as quantise-dequantise pairs.
    Should the result be too far off, the layers that cost most are left in float32, as few as will do.

    Args:
        graph: an fp32 ONNX model.
        batches: calibration inputs.
        static: QDQ with calibrated activations; else dynamic.
        accepts: how far a graph is off, in units of what is allowed: 1 or less will do.

    Raises:
        CheckFailedError: even one quantised layer is too much.
    """
    layers = quantisable(onnx.load_from_string(graph))

    def quantised(excluded: Sequence[str]) -> bytes:
        return _quantise(graph, batches, static=static, excluded=excluded)

    result = quantised([])
    off = accepts(result)
    if off <= 1:
        return Conversion(result)
    log.info("int8 is off by %.2f times what is allowed; measuring %d layers", off, len(layers))
    alone = {layer: accepts(quantised([other for other in layers if other != layer])) for layer in layers}
    worst_first = sorted(layers, key=alone.get, reverse=True)
    for count in range(1, len(layers)):
        excluded = worst_first[:count]
        result = quantised(excluded)
        if accepts(result) <= 1:
            return Conversion(
                result, {name: f"alone costs {alone[name]:.2f} of what is allowed" for name in excluded}
            )
    raise CheckFailedError(
        f"no layer of the student can be quantised within tolerance: alone, {worst_first[-1]} costs "
        f"{alone[worst_first[-1]]:.2f} times what is allowed; export without int8, or train it longer"
    )


def quantisable(model: onnx.ModelProto) -> list[str]:
    """Names of the matrix products with a constant weight."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights
    ]


def _quantise(graph: bytes, batches: Sequence[Inputs], *, static: bool, excluded: Sequence[str]) -> bytes:
    settings = dict(
        per_channel=True,
        # 7 bits: on CPUs without VNNI two 8-bit products overflow the 16 bits in which they are added.
        reduce_range=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        nodes_to_exclude=list(excluded),
    )
    with TemporaryDirectory() as folder, _quiet():
        source, out = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        if static:
            quantize_static(
                source,
                out,
                _Batches(batches),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                # Symmetric, as TensorRT wants it. Attention's own products have no weights to shrink.
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "MatMulConstBOnly": True,
                },
                **settings,
            )
        else:
            quantize_dynamic(source, out, extra_options={"MatMulConstBOnly": True}, **settings)
        model = onnx.load(out)
    del model.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet():
    """ONNX Runtime asks for a preprocessing step, which the exporter has done; it logs on the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
