"""What precision a TensorRT engine computes in: what is pinned before 10.0, and what is told of what was built.

An H100 with TensorRT 8.6 showed both faults that are guarded here: an fp16 engine that did not build, for a CAST had
been given another type, and then one that was float32 throughout, for every layer had been pinned.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from piflow_edge.engines import Graph, graph_types
from piflow_edge.engines.onnx_file import read_model
from piflow_edge.engines.trt import inspection as trt_inspection
from piflow_edge.engines.trt import pins as trt_pins
from piflow_edge.engines.trt import plans as trt_build
from piflow_edge.engines.trt.inspection import Inspection
from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia
from tests.helpers.pretended_tensorrt import pretend

pytest.importorskip("onnx", reason="the network is made with onnx")

# As the export makes it: the products in half precision, the embedding of `t` and what leads to the output in float32.
_TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 8] x_t, float[batch] t, int64[batch] labels) => (float[batch, 8] u)
{
  axes = Constant <value_ints = [1]> ()
  shape = Shape (x_t)
  times = Unsqueeze (t, axes)
  waves = Cos (times)
  waves_half = Cast <to = 10> (waves)
  x_half = Cast <to = 10> (x_t)
  mixed = MatMul (x_half, weight_1)
  shifted = Add (mixed, waves_half)
  table_rows = Gather (table, labels)
  labelled = Add (shifted, table_rows)
  made = MatMul (labelled, weight_2)
  made_wide = Cast <to = 1> (made)
  shaped = Reshape (made_wide, shape)
  u = Neg (shaped)
}
"""
WIDE = {"times", "waves", "shaped", "u"}
OLD = ["8.5.3.1", "8.6.1"]
INPUTS = {"x_t": "float32", "t": "float32", "labels": "int64"}


@pytest.fixture(params=[*OLD, "10.3.0", "11.4.0.106"])
def release(request, monkeypatch):
    """A pretended module in the place of tensorrt, and no GPU asked for."""
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", pretend(request.param))
    monkeypatch.setattr(nvidia, "current", lambda ordinal: nullcontext())
    return request.param


only_old = pytest.mark.parametrize("release", OLD, indirect=True)


@pytest.fixture(scope="module")
def graph():
    import onnx

    model, rng = onnx.parser.parse_model(_TEXT), np.random.default_rng(0)
    for name, shape in [("weight_1", (8, 8)), ("weight_2", (8, 8)), ("table", (4, 8))]:
        values = rng.standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return Graph(model.SerializeToString())


def build(graph, computes_in="float16"):
    profile = {"x_t": ((1, 8), (2, 8), (4, 8)), "t": ((1,), (2,), (4,)), "labels": ((1,), (2,), (4,))}
    return trt_build.build_plan(graph, computes_in, profile, ordinal=0, workspace=None, timing_cache=None)


def inspect(graph, plan, computes_in="float16"):
    return trt_build.inspect_plan(plan, graph, computes_in, 0)


def test_a_graph_says_itself_what_is_wide_in_it(graph):
    wide = graph_types.find_wide_nodes(read_model(graph), INPUTS)
    assert wide == {name: {name} for name in WIDE}


@only_old
def test_what_the_export_kept_wide_is_pinned_and_nothing_else(release, graph):
    plan = json.loads(build(graph))
    assert set(plan["pinned"]) == WIDE
    # Of several layers that a parser makes of one node, all go with it: here the node is narrow.
    assert any(layer["Name"].startswith("(Unnamed") for layer in plan["layers"])


def test_an_fp16_engine_multiplies_in_half_precision_and_says_so(release, graph):
    found = inspect(graph, build(graph))
    assert found.products == {"float16": 2} and not found.complaints
    assert found.layers["float32"] >= len(WIDE) and "float16" in found.layers
    assert "float32" in found.describe() and "MiB" in found.describe()


def pin_all_that_reads_float(trt, network, graph, formats):
    """As it was done: before types are inferred every tensor reads FLOAT."""
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type.name not in ("CONSTANT", "SHAPE", "CAST", "IDENTITY"):
            layer.precision = trt.DataType.FLOAT


@only_old
def test_a_float32_engine_that_is_called_fp16_is_found_out(release, graph, monkeypatch):
    monkeypatch.setattr(trt_pins, "pin_float32", pin_all_that_reads_float)
    found = inspect(graph, build(graph))
    assert found.products == {"float32": 2}
    assert found.complaints == ["0 of 2 matrix products are in half precision: it is a float32 engine"]


@pytest.mark.parametrize("release", ["8.6.1"], indirect=True)
@pytest.mark.parametrize(("kind", "words"), [("CAST", "castLayer.cpp"), ("SHAPE", "a shape")])
def test_a_cast_or_a_shape_that_is_pinned_does_not_build(release, graph, monkeypatch, kind, words):
    def pin(trt, network, graph, formats):
        for layer in map(network.get_layer, range(network.num_layers)):
            if layer.type.name == kind:
                layer.set_output_type(0, trt.DataType.FLOAT)

    monkeypatch.setattr(trt_pins, "pin_float32", pin)
    with pytest.raises(EngineError, match=words):
        build(graph)


@only_old
def test_layers_whose_names_nobody_knows_are_not_built_without_pins(release, graph, monkeypatch):
    monkeypatch.setattr(trt_pins, "_layers_with_nodes", lambda network, makers: iter(()))
    with pytest.raises(EngineError, match="4 layers cannot be kept in float32"):
        build(graph)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("engine_mib", "complains"),
    [
        (32.5, True),
        (21.3, True),
        (20.9, False),
        (17.0, False),
    ],  # the H100's fp16 engine, of 32.6 MiB in float32
)
def test_the_size_of_an_fp16_engine_is_held_to_its_weights(engine_mib, complains):
    found = Inspection({}, {}, int(engine_mib * MIB), int(32.6 * MIB))
    complaints = trt_inspection._find_complaints(found, "float16")
    assert bool(complaints) == complains and all("32" in words or "21" in words for words in complaints)
    assert not trt_inspection._find_complaints(found, "float32")


def test_the_size_of_a_small_network_says_nothing():
    assert not trt_inspection._find_complaints(Inspection({}, {}, 900_000, 200_000), "float16")


@pytest.mark.parametrize(("narrow", "complains"), [(0, True), (3, True), (4, False), (8, False)])
def test_an_int8_engine_is_held_to_the_products_that_the_network_quantises(narrow, complains):
    products = {"int8": narrow, "float32": 10 - narrow}
    found = Inspection({"float32": 40}, products, 0, 0, quantised=8)
    assert bool(trt_inspection._find_complaints(found, "int8")) == complains


def test_products_of_a_quantised_network_are_counted():
    import onnx

    model = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 8] x) => (float[batch, 8] y)
{
  x_int = QuantizeLinear (x, scale, zero)
  x_back = DequantizeLinear (x_int, scale, zero)
  w_back = DequantizeLinear (w_int, scale, zero)
  made = MatMul (x_back, w_back)
  y = MatMul (made, w)
}
""")
    tensors = dict(
        scale=np.float32(0.1), zero=np.int8(0), w_int=np.ones((8, 8), np.int8), w=np.ones((8, 8), np.float32)
    )
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in tensors.items()
    )
    read = read_model(Graph(model.SerializeToString()))
    assert trt_inspection._count_quantised(read) == 1
    types = graph_types.find_types(read, {"x": "float32"})
    assert (types["x_int"], types["x_back"], types["made"]) == ("int8", "float32", "float32")


# As releases of 8.6 to 10 write them.
LAYERS = [
    ("CaskGemmMatrixMultiply", "MatrixMultiply", "Row major linear FP16 format", "Row major linear FP32"),
    ("CaskConvolution", "Convolution", "Channel major FP16 format where channel % 8 == 0", "Half"),
    ("gemm", "", "BFloat16", "BFloat16"),
    ("gemm", "", "Row major linear INT8 format", "Row major linear FP32"),
    ("kgen", "", "Row major linear FP32", "Row major linear FP16 format"),
    ("Reformat", "Reformat", "Row major linear FP32", "Row major linear FP16 format"),
]


def test_the_inspectors_words_are_understood():
    def tensor(text):
        return [{"Name": "x", "Format/Datatype": text}]

    layers = [
        {"LayerType": kind, "ParameterType": more, "Inputs": tensor(read), "Outputs": tensor(made)}
        for kind, more, read, made in LAYERS
    ]
    every, products = trt_inspection._count(layers)
    assert products == {"float16": 2, "bfloat16": 1, "int8": 1}
    assert every == {"float32": 2, "float16": 2, "bfloat16": 1}


@pytest.mark.parametrize("text", ["", "no JSON", '{"Layers": ["a name", "another"]}', "{}"])
def test_an_inspector_that_tells_nothing_is_no_error(text, graph):
    inspector = SimpleNamespace(get_engine_information=lambda format: text)
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
    found = trt_inspection.inspect_engine(pretend("8.6.1"), engine, 1000, graph, "float16")
    assert found.layers == {} and found.complaints == [] and "does not tell" in found.describe()
