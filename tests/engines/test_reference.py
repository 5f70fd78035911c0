"""The NumPy engine: operators as ONNX Runtime computes them, every graph of our exports, and files that are broken."""

import re
import subprocess
import sys

import numpy as np
import pytest

from piflow_edge.bundle.folder import Bundle
from piflow_edge.doctor import examination as doctor
from piflow_edge.engines import DEFAULT_OPTIONS, Graph, open_engine
from piflow_edge.engines.onnx_file import read_model
from piflow_edge.engines.operators import OPERATORS
from piflow_edge.errors import EngineError
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.system import protobuf
from tests.conftest import make_autoencoder, make_student

IDENTITY = doctor.identity_model()
rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def ints(*values):
    return np.array(values, np.int64)


X = normal(2, 3, 4)
IMAGE, KERNEL = normal(2, 4, 5, 6), normal(6, 4, 3, 2)
BYTES = rng.integers(0, 256, (3, 4)).astype(np.uint8)
SIGNED = rng.integers(-64, 64, (4, 5)).astype(np.int8)
HALF = normal(3, 4, dtype=np.float16)
# Operator, inputs (None: left out), attributes.
CASES = [
    ("Add", [X, normal(4)], {}),
    ("Cast", [X], {"to": 10}),
    ("Cast", [np.array([-1.7, 2.7], np.float32)], {"to": 7}),
    ("Clip", [X, np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", [X, None, np.float32(0.5)], {}),
    ("Concat", [X, normal(2, 1, 4)], {"axis": 1}),
    ("Constant", [], {"value_ints": [1, 2]}),
    ("Constant", [], {"value_float": 0.5}),
    ("Constant", [], {"value": X}),
    ("Conv", [IMAGE, KERNEL, normal(6)], {}),
    ("Conv", [IMAGE, KERNEL], {"strides": [2, 1], "pads": [1, 0, 2, 1], "dilations": [1, 2]}),
    ("Conv", [IMAGE, normal(6, 2, 3, 3)], {"group": 2, "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}),
    ("Conv", [normal(1, 2, 9), normal(3, 2, 3)], {"strides": [3]}),
    ("Cos", [X], {}),
    ("DequantizeLinear", [SIGNED, np.float32(0.1), np.int8(3)], {}),
    ("DequantizeLinear", [SIGNED, np.abs(normal(4)), np.zeros(4, np.int8)], {"axis": 0}),
    ("Div", [X, normal(2, 1, 4)], {}),
    ("Div", [ints(-7, 7, -6), ints(2, -2, 3)], {}),
    ("DynamicQuantizeLinear", [X], {}),
    ("DynamicQuantizeLinear", [np.abs(X)], {}),
    ("Einsum", [normal(2, 1, 3, 2, 2, 4)], {"equation": "nhwpqc->nchpwq"}),
    ("Einsum", [X, normal(4, 5)], {"equation": "bij, jk -> bik"}),
    ("Erf", [X], {}),
    ("Exp", [X], {}),
    ("Exp", [HALF], {}),
    ("Expand", [normal(3, 1), ints(2, 1, 4)], {}),
    ("Gather", [X, ints(0, 2, -1)], {"axis": 1}),
    ("Gather", [X, np.array(1)], {}),
    ("Gemm", [normal(3, 4), normal(5, 4), normal(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [normal(4, 3), normal(4, 5)], {"transA": 1}),
    ("Identity", [X], {}),
    ("InstanceNormalization", [IMAGE, normal(4), normal(4)], {"epsilon": 1e-3}),
    ("LayerNormalization", [X, normal(4), normal(4)], {"epsilon": 1e-6}),
    ("LayerNormalization", [X, normal(3, 4)], {"axis": 1}),
    ("LogSoftmax", [X], {"axis": 1}),
    ("MatMul", [normal(2, 3, 4), normal(4, 5)], {}),
    ("MatMul", [normal(4), normal(2, 4, 5)], {}),
    ("MatMulInteger", [BYTES, SIGNED, np.uint8(7), np.int8(0)], {}),
    ("MatMulInteger", [BYTES, SIGNED, np.uint8(7), np.zeros(5, np.int8)], {}),
    ("Mul", [X, np.float32(3)], {}),
    ("Neg", [X], {}),
    ("Pow", [np.abs(X), np.float32(1.5)], {}),
    ("Pow", [X, ints(2)], {}),
    ("QuantizeLinear", [5 * X, np.float32(0.1), np.int8(3)], {}),
    ("QuantizeLinear", [5 * X, np.abs(normal(3)) + 0.1, np.zeros(3, np.int8)], {"axis": 1}),
    ("QuantizeLinear", [5 * X, np.float32(0.1)], {}),
    ("Reciprocal", [X], {}),
    ("ReduceMean", [X, ints(-1)], {}),
    ("ReduceMean", [X], {"keepdims": 0}),
    ("ReduceMean", [X], {"noop_with_empty_axes": 1}),
    ("ReduceSum", [X, ints(0, 2)], {"keepdims": 0}),
    ("Relu", [X], {}),
    ("Reshape", [X, ints(0, -1)], {}),
    ("Reshape", [X, ints(4, 6)], {"allowzero": 1}),
    ("Resize", [IMAGE, None, np.array([1, 1, 2, 2], np.float32)], "nearest"),
    ("Resize", [IMAGE, None, None, ints(2, 4, 7, 3)], "nearest"),
    ("Round", [np.array([0.5, 1.5, -2.5, 2.4], np.float32)], {}),
    ("Shape", [X], {}),
    ("Shape", [X], {"start": 1, "end": -1}),
    ("Sigmoid", [20 * X], {}),
    ("Sin", [X], {}),
    ("Slice", [X, ints(1, -3), ints(2**62, -1), ints(1, 2)], {}),
    ("Slice", [X, ints(-1), ints(-(2**62)), ints(2), ints(-2)], {}),
    ("Softmax", [X], {"axis": 1}),
    ("Softmax", [HALF], {}),
    ("Split", [X], {"axis": 2, "num_outputs": 3}),
    ("Split", [X, ints(1, 3)], {"axis": -1}),
    ("Sqrt", [np.abs(X)], {}),
    ("Squeeze", [normal(1, 3, 1), ints(-1)], {}),
    ("Squeeze", [normal(1, 3, 1)], {}),
    ("Sub", [X, X[0]], {}),
    ("Tanh", [X], {}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Unsqueeze", [X, ints(0, -1)], {}),
]
NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
OUTPUTS = {"DynamicQuantizeLinear": 3, "Split": 3}


def one_node(operator, inputs, attributes):
    """A model of one node, as bytes, and what to feed it."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    attributes = NEAREST if attributes == "nearest" else attributes
    attributes = {
        key: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for key, value in attributes.items()
    }
    arrays = [None if value is None else np.asarray(value) for value in inputs]
    names = ["" if array is None else f"in{i}" for i, array in enumerate(arrays)]
    count = 2 if operator == "Split" and inputs[1:] else OUTPUTS.get(operator, 1)
    node = helper.make_node(operator, names, [f"out{i}" for i in range(count)], name="the node", **attributes)
    feeds = {name: array for name, array in zip(names, arrays, strict=True) if name}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = helper.make_graph([node], "one", values, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model).SerializeToString(), feeds


@pytest.mark.parametrize(("operator", "inputs", "attributes"), CASES, ids=[case[0] for case in CASES])
def test_each_operator_computes_what_onnx_runtime_does(operator, inputs, attributes):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, feeds = one_node(operator, inputs, attributes)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    try:
        expected = session.run(None, feeds)
    except Exception:
        if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 20):
            raise
        pytest.skip(f"onnxruntime {onnxruntime.__version__} cannot do it")
    found = list(open_engine(Graph(model), engine="reference").run(feeds).values())
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        # Some roundings of float32, or one of half precision, on values of a few units; whole numbers are exact.
        allowed = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 2e-3}.get(ours.dtype, 0)
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), rtol=allowed, atol=allowed)


def test_every_operator_has_a_case():
    assert {case[0] for case in CASES} == set(OPERATORS)


def test_a_value_of_no_axis_stays_one():
    model, feeds = one_node("Mul", [np.float32(2), np.float32(3)], {})
    (found,) = open_engine(Graph(model), engine="reference").run(feeds).values()
    assert found.shape == () and found == 6


# --- whole networks


def both(graph, batch=3):
    """Outputs of ONNX Runtime and of the reference, on the same random inputs."""
    expected_engine = open_engine(graph, engine="ort-cpu")
    draw, feeds = np.random.default_rng(1), {}
    for value in expected_engine._session.get_inputs():
        shape = [n if isinstance(n, int) else batch for n in value.shape]
        feeds[value.name] = (
            draw.integers(0, 10, shape) if "int64" in value.type else draw.random(shape, np.float32)
        )
    return expected_engine.run(feeds), open_engine(graph, engine="reference").run(feeds)


def assert_alike(expected, found, precision):
    """Float32 sums in another order. ONNX Runtime widens half precision where NumPy rounds; an activation on the border
    between two of 256 steps may fall to either side.
    """
    allowed = {"fp32": 2e-5, "fp16": 5e-3, "int8": 1e-2, "int8-qdq": 1e-2}[precision]
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = found[name]
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dtype == np.uint8:
            assert np.abs(ours.astype(int) - theirs).max() <= 1
        else:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=allowed * max(1, np.abs(theirs).max()))


@pytest.fixture(scope="module", params=["gm", "dx", "polynomial"])
def exported(request, tmp_path_factory):
    """A bundle in every precision, with its sampler graph."""
    pytest.importorskip("torch", reason="making a bundle needs the 'train' extra")
    from piflow_edge.export.to_bundle import export_bundle
    from piflow_edge.policies import DXPolicySpec

    heads = {
        "gm": None,
        "dx": DXPolicySpec(4, segment_size=0.5, shift=2.0),
        "polynomial": DXPolicySpec(3, segment_size=0.5, shift=2.0, mode="polynomial"),
    }
    folder = tmp_path_factory.mktemp("reference") / request.param
    precisions = ("fp32",) if request.param == "polynomial" else ("fp32", "fp16", "int8", "int8-qdq")
    export_bundle(make_student(head=heads[request.param]), folder, precisions=precisions, samplers=[2])
    return Bundle(folder)


@pytest.mark.torch
def test_students_and_samplers_in_every_precision(exported):
    for precision in exported.manifest.precisions:
        for graph in (
            read_graph(exported, "student", precision),
            read_graph(exported, "sampler.nfe2", precision),
        ):
            assert_alike(*both(graph), precision)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_decoders(kind, tmp_path):
    pytest.importorskip("diffusers")
    from piflow_edge.distill.data.autoencoder import load_autoencoder
    from piflow_edge.export.conversions.fp16 import to_fp16
    from piflow_edge.export.onnx_graphs.decoder_graph import export_decoder

    decoder = export_decoder(load_autoencoder(make_autoencoder(kind, tmp_path)), [4, 8, 8]).model
    assert_alike(*both(Graph(decoder)), "fp32")
    half = to_fp16(Graph(decoder), [{"latents": normal(2, 4, 8, 8)}]).graph
    assert_alike(*both(half), "fp16")


@pytest.mark.torch
def test_a_bundle_is_verified_without_onnx_and_onnx_runtime(latent_bundle):
    code = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None; import logging\n"
        "from piflow_edge import load; from piflow_edge.runtime.verification import check, verify\n"
        "generator = load(sys.argv[1]); check(verify(generator), 'it'); print(generator.engine.name)"
    )
    done = subprocess.run([sys.executable, "-c", code, latent_bundle], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr
    # Said, not silent, and with the command that mends it.
    assert "many times slower" in done.stderr and "pip install 'piflow-edge[cpu]'" in done.stderr


def test_weights_may_lie_in_files_beside_the_model(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} takes no weights from memory")
    model, feeds = one_node("Add", [X, normal(4)], {})
    model = onnx.load_from_string(model)
    weights = [
        onnx.numpy_helper.from_array(normal(4), "in1"),
        onnx.numpy_helper.from_array(normal(4), "other"),
    ]
    model.graph.initializer.extend(weights)
    del model.graph.input[1]
    del feeds["in1"]
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    whole = Graph((tmp_path / "m.onnx").read_bytes(), {"w.bin": (tmp_path / "w.bin").read_bytes()})
    expected, found = (
        open_engine(whole, engine=name).run(feeds)["out0"] for name in ("ort-cpu", "reference")
    )
    np.testing.assert_array_equal(found, expected)
    for graph, words in [
        (Graph(whole.model), "'w.bin', which did not come with the network"),
        (Graph(whole.model, {"w.bin": whole.weights["w.bin"][:-1]}), "of 31 bytes"),
        (Graph(whole.model.replace(b"\x02\x31\x36", b"\x02\x2d\x36"), whole.weights), "lies at|no place"),
    ]:
        with pytest.raises(EngineError, match=words):
            open_engine(graph, engine="reference")


# --- what is refused


def test_an_unknown_operator_is_named():
    model, _ = one_node("Celu", [X], {})
    with pytest.raises(EngineError, match=r"Celu, .*'the node' .*Add, "):
        open_engine(Graph(model), engine="reference")


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "words"),
    [
        ("Conv", [IMAGE, KERNEL], {"auto_pad": "SAME_UPPER"}, r"'the node' \(Conv\): .*auto_pad .*'SAME"),
        ("Resize", [IMAGE, None, np.ones(4, np.float32)], {"mode": "linear"}, "mode is 'linear'"),
        ("Gather", [X, ints(7)], {}, r"cannot be computed from float32 \(2, 3, 4\), int64 \(1,\): .*out of bounds"),
        ("Expand", [X, ints(2**40, 2, 3, 4)], {}, "has more than"),
        ("Add", [normal(70000, 1), normal(1, 70000)], {}, "has more than"),
        ("Einsum", [normal(70000), normal(70000)], {"equation": "i,j->ij"}, "has more than"),
        ("Einsum", [X], {"equation": "...i->i..."}, "name every axis"),
        ("Resize", [normal(1, 1), None, np.array([1e9, 1e9], np.float32)], "nearest", "has more than"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_an_error_that_names_the_node(operator, inputs, attributes, words):
    model, feeds = one_node(operator, inputs, attributes)
    with pytest.raises(EngineError, match=words):
        open_engine(Graph(model), engine="reference").run(feeds)


def test_an_attribute_of_a_newer_standard_is_refused():
    model, _ = one_node("Neg", [X], {"loudly": 1})
    with pytest.raises(EngineError, match=r"'the node' .*Neg .*loudly"):
        open_engine(Graph(model), engine="reference")


def test_other_inputs_than_the_networks_are_named():
    with pytest.raises(EngineError, match=r"x; .*y"):
        open_engine(Graph(IDENTITY), engine="reference").run({"y": X})


def message(*fields):
    """Protobuf, by hand: (number, bytes) or (number, whole number)."""

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return b"".join(
        varint(n << 3) + varint(v) if isinstance(v, int) else varint(n << 3 | 2) + varint(len(v)) + v
        for n, v in fields
    )


OPSET = (8, message((1, b""), (2, 18)))


def nest(depth):
    graph = b""
    for _ in range(depth):
        graph = message((1, message((4, b"Scan"), (5, message((1, b"body"), (20, 5), (6, graph))))))
    return graph


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"", "holds no graph"),
        (b"PK\x03\x04" + bytes(100), "ONNX model"),
        (message((7, b"")), "which operators"),
        (b"\xff" * 11, "more than 64 bits"),
        (b"\x3a\xff\xff\xff\xff\x0f", "0 are left"),
        (b"\x3b", "wire type 3"),
        (message((7, 5)), "message"),
        (message(OPSET, (7, nest(9))), "8 deep"),
        (message(OPSET, (7, message((5, message((1, 1 << 40), (2, 1), (9, b"1234")))))), "takes 4398046511104 bytes"),
        (message(OPSET, (7, message((5, message((1, 2**64 - 1), (2, 1), (9, b"")))))), "has the shape"),
        (message(OPSET, (7, message((5, message((2, 16), (9, b"12")))))), "of ONNX type 16"),
        (message(OPSET, (7, message((5, message((1, 1), (2, 2), (5, 999)))))), r"uint8 .*999"),
        (message(OPSET, (7, message((12, message((1, b"\xff")))))), "not UTF-8"),
        (message(OPSET, (7, message((12, message((1, b"y")))))), "makes its output 'y'"),
        (message(OPSET, (7, b""), (25, b"")), "functions of its own"),
        (message((8, message((1, b""), (2, 99))), (7, b"")), r"17 to 20; .*99"),
        (message(OPSET, (7, message((1, message((1, b"x"), (2, b"x"), (4, b"Neg"))), (12, message((1, b"x")))))),
         r"'x', .*no node"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_clear_error(model, words):
    with pytest.raises(EngineError, match=words):
        open_engine(Graph(model), engine="reference").run({})


def test_a_file_of_countless_parts_is_refused(monkeypatch):
    monkeypatch.setattr(protobuf, "MOST_FIELDS", 1000)
    with pytest.raises(EngineError, match="1000 parts"):
        read_model(Graph(message(OPSET, (7, message((1, b"")) * 1001))))


@pytest.mark.parametrize("change", ["cut", "flip", "fill"])
def test_no_damage_does_more_than_raise_one_error(change):
    """Small damage anywhere: the result is another number, or an EngineError; nothing else gets out."""
    model, feeds = one_node("Gemm", [normal(3, 4), normal(5, 4), normal(5)], {"transB": 1})
    refused, draw = 0, np.random.default_rng(5)
    for trial in range(400):
        broken = bytearray(model)
        if change == "cut":
            del broken[trial % len(model) :]
        elif change == "flip":
            broken[draw.integers(len(model))] ^= 1 << draw.integers(8)
        else:
            start = draw.integers(len(model))
            broken[start : start + 5] = draw.integers(0, 256, 5).astype(np.uint8).tobytes()
        try:
            open_engine(Graph(bytes(broken)), engine="reference").run(feeds)
        except EngineError as error:
            refused += 1
            assert re.search(r"\w", str(error))
    assert refused > 40


def test_it_can_be_closed():
    engine = open_engine(Graph(IDENTITY), engine="reference", options=DEFAULT_OPTIONS)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run({"x": X})
