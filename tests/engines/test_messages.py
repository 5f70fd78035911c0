"""ONNX Runtime's errors as users read them."""

import numpy as np
import pytest

from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.engines.ort.messages import plain_reason


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:1778 "
            "onnxruntime::Provider& onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load "
            "library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open",
            "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open",
        ),
        ("matmul_helper.h:59 Compute MatMul dimension mismatch", "MatMul dimension mismatch"),
        ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find Foo(7)", "Could not find Foo(7)"),
        (
            r"D:\a\core\graph.cc:31 onnxruntime::Graph::Load(int) const no such node (x::y)",
            "no such node (x::y)",
        ),
        ("out of memory", "out of memory"),
    ],
)
def test_an_error_says_what_is_wrong_and_not_where_in_the_source(raw, plain):
    assert plain_reason(RuntimeError(raw)) == plain


def test_what_this_release_says_of_a_shape_that_does_not_fit():
    onnx = pytest.importorskip("onnx")
    make, float32, int64 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [make("x", float32, ["n"]), make("shape", int64, [1])]
    node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
    graph = onnx.helper.make_graph([node], "g", inputs, [make("y", float32, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="onnxruntime_src") as raised:
        session.run(None, {"x": np.zeros(3, np.float32), "shape": np.array([2])})
    told = plain_reason(raised.value)
    assert "/" not in told and "::" not in told and "ONNXRuntimeError" not in told
    assert "cannot be reshaped" in told and "requested shape:{2}" in told
