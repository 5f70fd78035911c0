"""Text encoders in fewer bits: near enough, smaller, and what half precision would spoil stays in float32."""

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import piflow_edge as pf
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import BundleError
from piflow_edge.export.conversions.fp16 import to_fp16
from piflow_edge.export.conversions.int4 import quantise_blocks
from piflow_edge.export.conversions.weights_only import quantise_encoder
from piflow_edge.export.half_graph import convert_to_half
from piflow_edge.export.onnx_graphs.encoder_graph import example_inputs, export_encoder
from piflow_edge.export.onnx_graphs.large import types
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.kernels.rollout import integrate
from piflow_edge.runtime import verification
from tests.commands.command_line import run
from tests.export.test_text_bundle import EXAMPLES, make_text_student
from tests.helpers.text_encoders import tiny_text_encoder

pytestmark = pytest.mark.torch
CONVERSIONS = {
    "fp16": lambda graph, inputs: to_fp16(graph, inputs).graph,
    "int8": lambda graph, inputs: quantise_encoder(graph),
    "int4": lambda graph, inputs: quantise_blocks(graph, [], 32),
}
# Which operator shows that the weights are in fewer bits.
OPERATORS = {"fp16": "Cast", "int8": "DequantizeLinear", "int4": "MatMulNBits"}


class Examples:
    """A conditioner, as far as `example_inputs` needs one."""

    @staticmethod
    def example_prompts(count):
        return list(EXAMPLES)


@pytest.fixture(scope="module", params=["bert", "t5"])
def exported(request):
    encoder = tiny_text_encoder(request.param)
    return export_encoder(encoder), example_inputs(encoder, Examples())


def encode(graph, inputs):
    engine = open_engine(graph, engine="ort-cpu")
    return [engine.run(one) for one in inputs]


def worst_error(graph, exact, inputs):
    pairs = zip(encode(graph, inputs), encode(exact, inputs), strict=True)
    return max(verification.relative_error(found[n], wanted[n]) for found, wanted in pairs for n in wanted)


@pytest.mark.parametrize("precision", CONVERSIONS)
def test_fewer_bits_are_near_enough(exported, precision):
    graph, inputs = exported
    converted = CONVERSIONS[precision](graph, inputs)
    assert 1e-5 < worst_error(converted, graph, inputs) <= PRECISIONS[precision].tolerances.encodings
    model = onnx.load_from_string(converted.model)
    assert OPERATORS[precision] in {node.op_type for node in model.graph.node}
    wide = [t for t in model.graph.initializer if len(t.dims) > 1 and t.data_type == onnx.TensorProto.FLOAT]
    total = sum(np.prod(t.dims) for t in onnx.load_from_string(graph.model).graph.initializer)
    # Scales of blocks, and tables: here they are too small to be worth a cast.
    assert sum(np.prod(t.dims) for t in wide) < 0.5 * total


@pytest.fixture(scope="module")
def hot_t5():
    """T5 whose feed-forward layers give what fp16 cannot hold, as the published ones do."""
    import copy

    encoder = copy.deepcopy(tiny_text_encoder("t5"))
    for block in encoder.module.model.encoder.block:
        block.layer[-1].DenseReluDense.wo.weight.data *= 3e6
    return export_encoder(encoder), example_inputs(encoder, Examples())


def test_what_overflows_fp16_in_t5_stays_in_float32(hot_t5):
    graph, inputs = hot_t5
    model = onnx.load_from_string(graph.model)
    floats = {name for name, kind in types(model).items() if kind == onnx.TensorProto.FLOAT}
    naive = Graph(convert_to_half(model, {}, (), floats).SerializeToString())
    assert not all(np.isfinite(one["hidden_states"]).all() for one in encode(naive, inputs))
    converted = to_fp16(graph, inputs)
    assert any("overflow" in reason for reason in converted.float32_nodes.values())
    assert worst_error(converted.graph, graph, inputs) <= PRECISIONS["fp16"].tolerances.encodings
    in_half = [t for t in onnx.load_from_string(converted.graph.model).graph.initializer
              if t.data_type == onnx.TensorProto.FLOAT16]  # fmt: skip
    assert len(in_half) > 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "mixed"
    settings = {"precisions": ("fp32", "fp16"), "network_precisions": {"encoder": "int4"}}
    export_bundle(make_text_student(), folder, encoders=[tiny_text_encoder("bert")], **settings)
    return folder


def test_a_network_may_be_in_another_precision_than_the_bundle(folder):
    assert {file.name for file in folder.glob("*.onnx")} == {
        "student.fp32.onnx", "student.fp16.onnx", "encoder.bert.int4.onnx",
    }  # fmt: skip
    for precision in ("fp32", "fp16"):
        with pf.load(folder, precision=precision) as generator:
            rows = {row.layer: row for row in verification.verify(generator)}
            assert all(row.passed for row in rows.values()), rows
            assert rows["encodings"].tolerance == PRECISIONS["int4"].tolerances.encodings
            assert rows["network outputs"].tolerance == PRECISIONS[precision].tolerances.outputs
            assert generator("a red apple", output="numpy").images.shape == (1, 16, 16, 3)


def test_a_network_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no network 'encoder'; it has student"):
        export_bundle(make_text_student(), tmp_path / "out", network_precisions={"encoder": "int8"})
    for wrong in ("encoder", "encoder=", "encoder=int9"):
        done = run("export", "nowhere", "--network-precision", wrong, "--out", tmp_path / "out", code=2)
        assert "int8" in done.output


@pytest.mark.parametrize(
    ("array", "layer"),
    [
        ("ids.bert", "tokens"),
        ("conditioning.pooled_projections", "encodings"),
        ("means.0", "network outputs"),
        ("velocities.0", "policy velocities"),
        ("latents", "trajectories"),
        ("images", "images"),
    ],
)
def test_verify_names_the_first_stage_that_is_wrong(folder, monkeypatch, array, layer):
    with pf.load(folder) as generator:
        golden = verification.read_golden(generator.bundle)
        golden[array] = golden[array] + np.array(60, golden[array].dtype)
        monkeypatch.setattr(verification, "read_golden", lambda bundle: golden)
        rows = verification.verify(generator)
    assert next(row.layer for row in rows if not row.passed) == layer


def test_verify_names_the_trajectory_where_policies_are_integrated_otherwise(folder, monkeypatch):
    def integrate_too_far(policy, x_t, sigmas, **how):
        return integrate(policy, x_t, [*sigmas[:-1], sigmas[-1] / 2], **how)

    monkeypatch.setattr(verification, "integrate", integrate_too_far)
    with pf.load(folder) as generator:
        rows = verification.verify(generator)
    failed = next(row for row in rows if not row.passed)
    assert (failed.layer, failed.where) == ("trajectories", "x_t.1")
