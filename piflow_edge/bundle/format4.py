"""Manifests of format 4, which releases up to 0.1.0 wrote, read as ones of format 5."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from piflow_edge.conditioning import ClassLabels, TensorSpec, Unconditional
from piflow_edge.errors import BundleError, PiFlowError
from piflow_edge.policies import DXPolicySpec, GMPolicySpec

from .bounds import MOST_CALLS
from .manifest import DECODER, STUDENT, Manifest, sampler_name, sampler_tensors
from .sections import AxisSpec, FileSpec, LatentSpec, NetworkSpec, ScheduleSpec, ToleranceSpec
from .typed_json import read_typed

# What its graphs call the class ids; its golden samples call them "labels".
_LABELS = "class_labels"


@dataclass(frozen=True)
class _Network:
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    num_timesteps: float
    opset: int


@dataclass(frozen=True)
class _Conditioning:
    kind: Literal["class", "none"]
    class_names: list[str]


@dataclass(frozen=True)
class _Latent:
    kind: Literal["pixels", "latents"]
    shape: list[int]
    scale: float
    shift: float


@dataclass(frozen=True)
class _Decoder:
    kind: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    opset: int


@dataclass(frozen=True)
class _Tolerance:
    outputs: float
    velocities: float
    latents: float
    samplers: float
    images: int
    psnr: float


@dataclass(frozen=True)
class _Manifest:
    format_version: int
    name: str
    policy: GMPolicySpec | DXPolicySpec
    schedule: ScheduleSpec
    network: _Network
    conditioning: _Conditioning
    latent: _Latent
    decoder: _Decoder | None
    precisions: list[str]
    samplers: list[int]
    files: dict[str, FileSpec]
    license: str
    provenance: dict[str, Any]
    tolerances: dict[str, _Tolerance]


def read_format_4(body: dict, place: str) -> Manifest:
    """Return the manifest that a `bundle.json` of format 4 stands for.

    Raises:
        BundleError: keys or values that format 4 does not have.
    """
    old = read_typed(_Manifest, body, place)
    if old.network.num_timesteps != 1:
        raise BundleError(f"{place} has a network whose time is not the noise level; export again")
    if bool(old.conditioning.class_names) != (old.conditioning.kind == "class"):
        raise BundleError(f"{place} has conditioning and network inputs that do not fit; export again")
    names = tuple(old.conditioning.class_names)
    conditioner = ClassLabels(names, _LABELS) if names else Unconditional()
    return Manifest(
        format_version=old.format_version,
        name=old.name,
        policy=old.policy,
        schedule=old.schedule,
        conditioning=conditioner.to_json(),
        latent=LatentSpec(**vars(old.latent)),
        axes={"batch": AxisSpec(1, None, 1)},
        networks=_networks(old, conditioner.inputs, place),
        assets={},
        precisions=old.precisions,
        # No bundle of format 4 reads prompts.
        tolerances={n: ToleranceSpec(spec.outputs, **vars(spec)) for n, spec in old.tolerances.items()},
        license=old.license,
        provenance=old.provenance,
        files=old.files,
    )


def name_golden_as_format_5(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return golden samples of format 4 under the names they have in format 5."""
    return {f"conditioning.{_LABELS}" if name == "labels" else name: array for name, array in golden.items()}


def _networks(old: _Manifest, steering: Sequence[TensorSpec], place: str) -> dict[str, NetworkSpec]:
    student, decoder = old.network, old.decoder
    networks = {STUDENT: _network(old, STUDENT, "", student.inputs, student.outputs)}
    image_shape = old.latent.shape if old.latent.kind == "pixels" else None
    if decoder is not None:
        networks[DECODER] = _network(old, DECODER, decoder.kind, decoder.inputs, decoder.outputs)
        image_shape = [int(n) for n in decoder.outputs[0].shape[1:]] if decoder.outputs else None
    for nfe in old.samplers:
        if not MOST_CALLS >= nfe >= 1:
            raise BundleError(f"{place} has a sampler graph of {nfe!r:.40} calls; up to {MOST_CALLS} may be")
        try:
            schedule = old.schedule.schedule(nfe=nfe)
        except PiFlowError as error:
            raise BundleError(f"{place} has an unusable schedule: {error}") from error
        tensors = sampler_tensors(schedule, old.latent.shape, image_shape, steering)
        networks[sampler_name(nfe)] = _network(old, sampler_name(nfe), "", *tensors)
    return networks


def _network(
    old: _Manifest, name: str, kind: str, inputs: list[TensorSpec], outputs: list[TensorSpec]
) -> NetworkSpec:
    opset = old.decoder.opset if name == DECODER and old.decoder is not None else old.network.opset
    files = {}
    for precision in old.precisions:
        file = f"{name}.{precision}.onnx"
        files[precision] = [file, *(other for other in (f"{file}.data",) if other in old.files)]
    return NetworkSpec(kind, inputs, outputs, {}, opset, files)
