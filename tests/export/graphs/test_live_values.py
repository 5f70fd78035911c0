"""How many bytes of values are there at a time, in graphs small enough to count by hand."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.bundle.folder import Bundle
from piflow_edge.export.onnx_graphs.live_values import count_live_bytes
from piflow_edge.export.to_bundle import export_bundle
from tests.conftest import make_student

pytestmark = pytest.mark.torch


def graph_of(*nodes, given="x", made="y", weights=()):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 100]) for name in (given, made)]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def node(kind, given, made, **more):
    return helper.make_node(kind, given.split(), made.split(), **more)


def test_a_chain_holds_two_values_at_a_time():
    model = graph_of(node("Abs", "x", "a"), node("Neg", "a", "b"), node("Abs", "b", "y"))
    assert count_live_bytes(model, {"x": (3, 100)}) == 2 * 3 * 100 * 4


def test_what_is_read_later_stays_and_weights_are_not_counted():
    weight = numpy_helper.from_array(np.zeros((100, 1000), np.float32), "w")
    model = graph_of(
        node("Abs", "x", "a"), node("MatMul", "a w", "b"), node("ReduceSum", "b", "c"), node("Add", "a c", "y"),
        weights=[weight],
    )  # fmt: skip
    # At the sum: a (100), b (1000) and c (1) for each of two rows; c is one number.
    assert count_live_bytes(model, {"x": (2, 100)}) == 4 * (2 * 100 + 2 * 1000 + 1)


def test_a_bundle_says_it_of_each_network(tmp_path):
    export_bundle(make_student(), tmp_path / "one")
    export_bundle(make_student(depth=4), tmp_path / "deep")
    one, deep = (Bundle(tmp_path / n).manifest.provenance["live_bytes"]["student"] for n in ("one", "deep"))
    # It does not grow with depth; the outputs alone are some of it.
    assert one == deep > 4 * 64 * 8
