"""Types of a converted graph: casts where float32 and fp16 meet, and none elsewhere; weights that both read."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.conversions.fp16 import to_fp16
from piflow_edge.export.half_graph import convert_to_half
from piflow_edge.export.onnx_graphs.large import check, graph_of, types

X = np.array([[0.5, -1.25]], np.float32)


def model_of(*nodes, outputs=("y",), **weights):
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", *outputs)
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()
    ]
    graph = helper.make_graph(list(nodes), "graph", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], name=kind.lower(), **attributes)


def convert(model, *kept):
    floats = {name for name, kind in types(model).items() if kind == TensorProto.FLOAT}
    half = convert_to_half(model, {}, kept, floats)
    check(graph_of(half))
    onnx.shape_inference.infer_shapes(half, check_type=True, strict_mode=True)
    return half


def run(model):
    return open_engine(Graph(model.SerializeToString()), engine="ort-cpu").run({"x": X})


CHAIN = (node("Mul", ["x", "a"], "m"), node("Exp", ["m"], "e"), node("Add", ["e", "a"], "y"))


def casts(model):
    return [n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((), [TensorProto.FLOAT16, TensorProto.FLOAT]),
        (("mul", "exp", "add"), []),
        (("exp",), [TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.FLOAT]),
        (("add",), [TensorProto.FLOAT16, TensorProto.FLOAT]),
        (("mul", "exp"), [TensorProto.FLOAT16, TensorProto.FLOAT]),
    ],
)
def test_casts_stand_where_types_meet_and_nowhere_else(kept, expected):
    model = model_of(*CHAIN, a=[1.5, 2.5])
    half = convert(model, *kept)
    assert casts(half) == expected
    assert model == model_of(*CHAIN, a=[1.5, 2.5])  # left as it was
    np.testing.assert_allclose(run(half)["y"], run(model)["y"], rtol=2e-3)


def test_a_weight_that_both_read_is_there_twice_and_one_that_nobody_reads_is_gone():
    weights = {t.name: t for t in convert(model_of(*CHAIN, a=[0.1, 0.2], b=[1.0]), "mul").graph.initializer}
    assert {name: t.data_type for name, t in weights.items()} == {
        "a": TensorProto.FLOAT16,
        "a.float": TensorProto.FLOAT,
    }
    np.testing.assert_array_equal(numpy_helper.to_array(weights["a.float"]), np.float32([0.1, 0.2]))


def test_a_value_that_is_an_output_and_read_inside_keeps_its_name():
    model = model_of(*CHAIN, outputs=("y", "m"), a=[1.5, 2.5])
    half = convert(model)
    assert [value.name for value in half.graph.output] == ["y", "m"]
    for name, value in run(half).items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, run(model)[name], rtol=2e-3)


def test_names_of_casts_are_not_those_of_the_network():
    nodes = (node("Mul", ["x", "a"], "m"), node("Exp", ["m"], "m.half"), node("Add", ["m.half", "m"], "y"))
    model = model_of(*nodes, a=[1.5, 2.5], **{"a.float": [0.5, 0.5]})
    model.graph.node.append(node("Sub", ["a.float", "a"], "spare"))
    np.testing.assert_allclose(run(convert(model, "mul"))["y"], run(model)["y"], rtol=2e-3)


def test_a_table_for_readers_in_both_types_is_widened_once():
    table, inner, outer = np.random.default_rng(0).standard_normal((3, 64, 64), np.float32) / 8
    nodes = [
        node("Gather", ["table", "ids"], "found"),
        node("Gemm", ["found", "inner"], "hidden"),  # in fp16
        node("MatMul", ["hidden", "outer"], "product"),
        node("Add", ["found", "product"], "y"),  # an output: in float32 from the last product on
    ]
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("ids", TensorProto.INT64, ["n"]), ("y", TensorProto.FLOAT, ["n", 64]))
    ]
    tensors = {"table": table, "inner": inner, "outer": outer}
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    whole = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    ids = np.array([5, 0, 63])
    converted = to_fp16(Graph(model.SerializeToString()), [{"ids": ids}])
    assert converted.float32_nodes.keys() == {"add", "matmul"}
    half = onnx.load_from_string(converted.graph.model)
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert kinds == {
        "table": TensorProto.FLOAT16,
        "inner": TensorProto.FLOAT16,
        "outer": TensorProto.FLOAT,
    }
    assert casts(half) == [TensorProto.FLOAT] * 2  # of what is found, and of `hidden`
    made = open_engine(converted.graph, engine="ort-cpu").run({"ids": ids})["y"]
    # Values of about 1, of a table, a weight and a value with 11 bits.
    np.testing.assert_allclose(made, table[ids] + table[ids] @ inner @ outer, rtol=0, atol=2**-11)


def test_nodes_that_hold_values_or_name_a_type_follow():
    constant = numpy_helper.from_array(np.float32([0.5, 0.25]))
    model = model_of(
        node("Constant", [], "c", value=constant),
        node("Shape", ["x"], "s"),
        node("ConstantOfShape", ["s"], "zeros"),
        node("Greater", ["x", "c"], "g"),
        node("Cast", ["g"], "ones", to=TensorProto.FLOAT),
        node("Sum", ["zeros", "ones", "c"], "y"),
    )
    half = convert(model)
    kinds = types(half)
    assert [kinds[name] for name in ("c", "zeros", "ones", "y")] == [TensorProto.FLOAT16] * 3 + [
        TensorProto.FLOAT
    ]
    np.testing.assert_array_equal(run(half)["y"], run(model)["y"])


def test_a_node_with_a_body_is_refused():
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "body",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 2])],
    )
    condition = node("Constant", [], "c", value=numpy_helper.from_array(np.array(True)))
    with pytest.raises(CheckFailedError, match="has a body"):
        convert(model_of(condition, node("If", ["c"], "y", then_branch=body, else_branch=body)))
