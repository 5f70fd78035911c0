"""A bundle's sampler graph as a model of NVIDIA Triton Inference Server: a folder of its model repository.

The graph holds the whole few-step sampler, so that Triton's ONNX Runtime backend makes images with no code of ours.
Source of the layout and the fields: docs.nvidia.com/deeplearning/triton-inference-server, "Model Repository" and "Model
Configuration"; `model_config.proto` of triton-inference-server/common.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import Manifest, sampler_name
from piflow_edge.conditioning import TensorSpec
from piflow_edge.errors import BundleError
from piflow_edge.system.files import new_folder, write_atomic

_TENSOR = '{{\n    name: "{name}"\n    data_type: {kind}\n    dims: [ {dims} ]{more}\n  }}'
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "bool": "TYPE_BOOL",
}
# Triton's shapes have one number or more beside the batch; the graph takes labels (batch,).
_ONE_NUMBER = "\n    reshape: { shape: [ ] }"


def write_model(
    bundle: Bundle,
    repository: Path,
    *,
    nfe: int | None = None,
    precision: str | None = None,
    max_batch: int = 64,
) -> Path:
    """Write `<name>-nfe<N>/config.pbtxt` and `<name>-nfe<N>/1/model.onnx` into a model repository.

    Args:
        bundle: with the sampler graph.
        repository: the folder Triton is started with; made if it is not there.
        nfe: student calls per image; None is what the student was trained for.
        precision: one of the bundle's; None is its first.
        max_batch: images in one run, 1 or more; requests are put together up to it.

    Returns:
        The model's folder.

    Raises:
        BundleError: no such graph or precision, or one that re-noises; the model's folder exists.
    """
    if max_batch < 1:
        raise BundleError(f"max_batch is 1 or more; got {max_batch}")
    nfe = bundle.manifest.schedule.nfe if nfe is None else nfe
    graph = bundle.read_network(sampler_name(nfe), precision).model
    if any(segment.renoises for segment in bundle.manifest.schedule.schedule(nfe=nfe).segments):
        raise BundleError(
            f"bundle {bundle.name!r} re-noises between calls: the graph takes that noise with the batch as its second "
            "axis, which Triton cannot put together; use one with h = 0"
        )
    folder = model_folder(repository, bundle.name, nfe)
    name = folder.name
    with new_folder(folder) as work:
        (work / "1").mkdir()
        write_atomic(work / "1" / "model.onnx", graph)
        write_atomic(work / "config.pbtxt", model_config(bundle.manifest, name, max_batch).encode())
    return folder


def model_folder(repository: str | Path, name: str, nfe: int) -> Path:
    """Where the model of a bundle of that name goes; BundleError if it exists."""
    folder = Path(repository) / f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-nfe{nfe}"
    if folder.exists():
        raise BundleError(f"{folder} exists; give another repository, or remove the model first")
    return folder


def model_config(manifest: Manifest, name: str, max_batch: int) -> str:
    """The content of `config.pbtxt`: protobuf text of Triton's ModelConfig."""
    shape = manifest.latent.shape
    outputs = [_tensor("latents", "TYPE_FP32", shape)]
    if manifest.image_shape is not None:
        channels, height, width = manifest.image_shape
        outputs.append(_tensor("images", "TYPE_UINT8", (height, width, channels)))
    inputs = [_tensor("noise", "TYPE_FP32", shape)]
    inputs += [_steering(spec) for spec in manifest.conditioner.inputs]
    return (
        "# Start the server with ORT_DISABLE_TELEMETRY=1 in its environment, or ONNX Runtime may send usage data.\n"
        f'name: "{name}"\nbackend: "onnxruntime"\ndefault_model_filename: "model.onnx"\nmax_batch_size: {max_batch}\n'
        f"input [\n  {', '.join(inputs)}\n]\noutput [\n  {', '.join(outputs)}\n]\ndynamic_batching {{ }}\n"
    )


def _steering(spec: TensorSpec) -> str:
    """An input that steers; named axes may have any length."""
    dims = [-1 if isinstance(length, str) else length for length in spec.shape[1:]]
    return _tensor(spec.name, _TYPES[spec.dtype], dims or (1,), "" if dims else _ONE_NUMBER)


def _tensor(name: str, kind: str, dims: Sequence[int | str], more: str = "") -> str:
    return _TENSOR.format(name=name, kind=kind, dims=", ".join(map(str, dims)), more=more)
