"""What `inspect` says of runtimes: never a yes that no document gives."""

import dataclasses
from types import SimpleNamespace

import pytest

from piflow_edge.bundle.compatibility import RUNTIMES, compatibility, gpu_names
from piflow_edge.bundle.folder import Bundle

QUANTIZED_AS_IT_COMES = ("", "DynamicQuantizeLinear")


def bundle_of(opset, precision="fp32", operators=(), decoder=None):
    """A bundle as far as compatibility asks."""
    manifest = SimpleNamespace(
        networks={name: SimpleNamespace(opset=n) for name, n in (("student", opset), ("decoder", decoder)) if n},
        precisions=[precision],
    )  # fmt: skip
    return SimpleNamespace(
        manifest=manifest,
        read_network=lambda name, precision: SimpleNamespace(
            outline=SimpleNamespace(operators={"student": set(operators), "decoder": set()}[name])
        ),
    )


def answers(*arguments, **settings):
    return {row.runtime: row for row in compatibility(bundle_of(*arguments, **settings))}


@pytest.mark.parametrize(
    ("opset", "release"), [(7, "1.12"), (17, "1.12"), (18, "1.14"), (19, "1.15"), (20, "1.17"), (21, "1.18")]
)
def test_onnx_runtime_must_implement_the_opset(opset, release):
    row = answers(opset)["ONNX Runtime"]
    assert row.answer == "yes" and row.reason.startswith(f"{release} or newer")


def test_an_opset_beyond_the_tables_is_not_promised():
    rows = answers(99)
    assert rows["ONNX Runtime"].answer == "unverified"
    assert all(rows[runtime.name].answer != "yes" for runtime in RUNTIMES)


def test_a_parser_promises_no_more_than_its_opset():
    for name in ("TensorRT 8.5", "TensorRT 8.6"):
        assert answers(17)[name].answer == "yes"
        row = answers(18)[name]
        assert row.answer == "unverified" and "promises opset 17 and the bundle has 18" in row.reason
        assert "--opset 17" in row.reason


def test_the_decoder_counts_too():
    assert answers(17, decoder=18)["TensorRT 8.6"].answer == "unverified"


def test_what_no_document_says_is_unverified():
    assert (
        answers(20)["TensorRT 10.3"].answer == "yes" and answers(21)["TensorRT 10.3"].answer == "unverified"
    )
    for runtime in RUNTIMES:
        row = answers(17)[runtime.name]
        if row.answer == "yes" and runtime.unverified:
            assert f"not verified: {runtime.unverified}" in row.reason


def test_int8_whose_activations_are_quantized_as_they_come_is_not_for_tensorrt():
    dynamic = answers(17, "int8", [QUANTIZED_AS_IT_COMES])
    assert dynamic["ONNX Runtime"].answer == "yes"
    for runtime in RUNTIMES:
        assert dynamic[runtime.name].answer == "no"
        assert "DynamicQuantizeLinear" in dynamic[runtime.name].reason
        assert "int8-qdq" in dynamic[runtime.name].reason
    assert answers(17, "int8-qdq")["TensorRT 10.15"].answer == "yes"


def test_int8_on_tensorrt_rtx_leaves_out_turing():
    assert "7.5" in answers(17, "fp16")["TensorRT-RTX 1"].gpus
    row = answers(17, "int8-qdq")["TensorRT-RTX 1"]
    assert row.answer == "unverified" and row.gpus and "7.5" not in row.gpus


def test_the_kinds_of_nodes_are_found_in_a_real_file():
    onnx = pytest.importorskip("onnx")
    from piflow_edge.system.onnx_outline import read_outline

    def kinds(op_type):
        node = onnx.helper.make_node(op_type, ["DynamicQuantizeLinear"], ["y"], name="DynamicQuantizeLinear")
        model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
        return read_outline(model.SerializeToString()).operators

    assert kinds("DynamicQuantizeLinear") == {QUANTIZED_AS_IT_COMES}
    # The name of a tensor or a node is not its kind.
    assert kinds("Identity") == {("", "Identity")}


@pytest.mark.torch
def test_inspect_tells_of_a_real_bundle(shared_bundle):
    rows = compatibility(Bundle(shared_bundle))
    assert [row.runtime for row in rows] == ["ONNX Runtime", *(runtime.name for runtime in RUNTIMES)]
    assert {row.answer for row in rows} <= {"yes", "no", "unverified"}
    assert all(row.reason for row in rows)
    assert all(dataclasses.asdict(row)["precision"] == "fp32" for row in rows)


def test_every_gpu_has_a_name():
    for runtime in RUNTIMES:
        assert gpu_names(runtime.gpus).count(",") == len(runtime.gpus) - 1
