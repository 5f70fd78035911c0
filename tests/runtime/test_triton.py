"""What Triton is told of a model is what ONNX Runtime finds in its graph."""

import re

import pytest

from piflow_edge.bundle.folder import Bundle
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import BundleError
from piflow_edge.runtime.triton import write_model
from tests.commands.command_line import run
from tests.conftest import make_student

pytestmark = pytest.mark.torch
KINDS = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_UINT8": "tensor(uint8)"}
TENSOR = re.compile(
    r'name: "(\w+)"\s+data_type: (\w+)\s+dims: \[ ([\d, ]+) \](\s+reshape: { shape: \[ \] })?'
)


def test_names_types_and_shapes_are_those_of_the_graph(latent_bundle, tmp_path):
    onnxruntime = import_onnxruntime()
    folder = write_model(Bundle(latent_bundle), tmp_path / "models", nfe=2, max_batch=8)
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == {
        "models/latent-nfe2/config.pbtxt", "models/latent-nfe2/1/model.onnx",
    }  # fmt: skip
    config = (folder / "config.pbtxt").read_text()
    comment, _, config = config.partition("\n")
    assert comment.startswith("# ") and "ORT_DISABLE_TELEMETRY=1" in comment
    assert config.startswith('name: "latent-nfe2"\n') and "max_batch_size: 8\n" in config
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    graph = {x.name: (x.type, x.shape[1:]) for x in [*session.get_inputs(), *session.get_outputs()]}
    told = {
        name: (KINDS[kind], [] if reshaped else [int(n) for n in dims.split(",")])
        for name, kind, dims, reshaped in TENSOR.findall(config)
    }
    assert told == graph and set(told) == {"noise", "labels", "latents", "images"}


def test_the_config_is_read_by_tritons_own_schema(latent_bundle, tmp_path):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    folder = write_model(Bundle(latent_bundle), tmp_path, nfe=2)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert [tensor.name for tensor in config.input] == ["noise", "labels"]
    assert config.HasField("dynamic_batching") and config.input[1].HasField("reshape")


def test_export_writes_the_models_itself(tmp_path):
    from piflow_edge.distill.loop.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "student", make_student(nfe=1))
    models = tmp_path / "models"
    command = ["export", tmp_path / "student", "--target", "triton", "--name", "mine", "--out", models]
    run(*command, "--sampler-graph", "1,2")
    written = {str(f.relative_to(models)) for f in models.rglob("*") if f.is_file()}
    assert written == {f"mine-nfe{n}/{file}" for n in (1, 2) for file in ("config.pbtxt", "1/model.onnx")}
    again = run(*command, "--sampler-graph", "2,4", code=2)
    assert "mine-nfe2 exists" in again.stderr
    refused = run(*command, "--overwrite", code=2)
    assert "leave them out" in refused.stderr


def test_what_cannot_be_served_is_refused(latent_bundle, shared_bundle, tmp_path):
    with pytest.raises(BundleError, match="sampler graph of 2 "):
        write_model(Bundle(shared_bundle), tmp_path)
    with pytest.raises(BundleError, match="got precision 'fp8'"):
        write_model(Bundle(latent_bundle), tmp_path, nfe=2, precision="fp8")
    with pytest.raises(BundleError, match="1 or more"):
        write_model(Bundle(latent_bundle), tmp_path, nfe=2, max_batch=0)
    assert list(tmp_path.iterdir()) == []
    write_model(Bundle(latent_bundle), tmp_path, nfe=2)
    with pytest.raises(BundleError, match="exists"):
        write_model(Bundle(latent_bundle), tmp_path, nfe=2)
