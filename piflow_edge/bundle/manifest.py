"""`bundle.json`: what a bundle says of itself, typed, and refused where it does not hold together.

Unknown versions, unknown keys and values of the wrong kind are errors; so are files that the rest asks for and that are
not listed, and the other way round. The published schema, `bundle.schema.json`, is made from these classes.
"""

import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from piflow_edge.arrays import Array
from piflow_edge.conditioning import ClassLabels, Conditioner, Conditioning, TensorSpec, Unconditional
from piflow_edge.errors import BundleError, PiFlowError
from piflow_edge.policies import DXPolicySpec, GMPolicySpec
from piflow_edge.schedule import Schedule, is_temperature, published_temperature
from piflow_edge.system.files import sha256

FORMAT_VERSION = 4
MANIFEST = "bundle.json"
# Beside it; see signature.py.
SIGNATURE = "bundle.sig"
# What a graph can be exported in. "int8" scales activations as they come, "int8-qdq" by calibration.
PRECISIONS = ("fp32", "fp16", "int8", "int8-qdq")
# A manifest is a few kilobytes; anything this large is no manifest.
MANIFEST_LIMIT = 1 << 20


@dataclass(frozen=True)
class ScheduleSpec:
    """The schedule the student was trained for; see `Schedule`.

    `temperature`: of a GM policy at every call but the last; 1 leaves it as it was trained, "auto" is the published
    rule, which depends on the number of calls.
    """

    nfe: int
    shift: float
    final_step_size_scale: float
    total_substeps: int
    h: float | str
    temperature: float | str

    def schedule(self, **changes) -> Schedule:
        """The schedule itself, with `changes` such as `nfe=2`."""
        settings = asdict(self) | changes
        del settings["temperature"]
        return Schedule(**settings)

    def temperature_of(self, nfe: int) -> float:
        """The temperature, a number, for `nfe` calls per image."""
        return published_temperature(nfe) if self.temperature == "auto" else self.temperature


@dataclass(frozen=True)
class NetworkSpec:
    """The student network. Its time input is `sigma_t * num_timesteps`."""

    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    num_timesteps: float
    opset: int


@dataclass(frozen=True)
class ConditioningSpec:
    """What steers the image. `kind`: "class", one label per image; "none", nothing.

    `class_names`: name of every label, in order; empty without classes.
    """

    kind: Literal["class", "none"]
    class_names: list[str]


@dataclass(frozen=True)
class LatentSpec:
    """The state that is sampled: `shape` (C, H, W). The network sees `(latent - shift) * scale`.

    `kind`: "pixels" are images, -1 black to 1 white; of "latents" a decoder makes images.
    """

    kind: Literal["pixels", "latents"]
    shape: list[int]
    scale: float
    shift: float


@dataclass(frozen=True)
class DecoderSpec:
    """The network that makes images, -1 black to 1 white, of latents that are scaled back. `kind`: its class."""

    kind: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    opset: int


@dataclass(frozen=True)
class FileSpec:
    """Checksum and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ToleranceSpec:
    """Largest error `verify` accepts, relative to the golden array's largest value; images in levels of 255.

    `samplers`: of the latents that the sampler graphs make. `psnr`: least agreement in dB of whole images, or of
    latents where there are none, with those drawn from the same noise in PyTorch.
    """

    outputs: float
    velocities: float
    latents: float
    samplers: float
    images: int
    psnr: float


@dataclass(frozen=True)
class Manifest:
    """All of `bundle.json`, in order, but for its own checksum.

    `decoder`: there in every precision, or None. `samplers`: calls per image of the sampler graphs, each there in every
    precision; see `sampler_file`. `precisions`: the first is the default. `tolerances`: of each precision. `files`: a
    student's graph above 2 GiB keeps its weights in a second one, `student.<precision>.onnx.data`.
    """

    format_version: int
    name: str
    policy: GMPolicySpec | DXPolicySpec
    schedule: ScheduleSpec
    network: NetworkSpec
    conditioning: ConditioningSpec
    latent: LatentSpec
    decoder: DecoderSpec | None
    precisions: list[str]
    samplers: list[int]
    files: dict[str, FileSpec]
    license: str
    provenance: dict[str, Any]
    tolerances: dict[str, ToleranceSpec]

    def network_inputs(self, x_t: Array, sigma_t: float, conditioning: Conditioning) -> dict[str, Array]:
        """Return what the student is fed at states `x_t` (B, C, H, W), steered by `conditioning`."""
        t = np.full(len(x_t), sigma_t * self.network.num_timesteps, np.float32)
        return {"x_t": x_t, "t": t, **conditioning}

    @cached_property
    def conditioner(self) -> Conditioner:
        """What steers the images."""
        names = self.conditioning.class_names
        return ClassLabels(tuple(names), "class_labels") if names else Unconditional()

    @property
    def makes_images(self) -> bool:
        """False for latents without a decoder."""
        return self.latent.kind == "pixels" or self.decoder is not None


def trained_with(manifest: Manifest, *names: str) -> Any:
    """A setting of the student's training, such as "guidance", "scale"; None where the bundle does not say.

    Provenance is free text to the runtime, and a bundle may be anybody's: of what is found, check the kind.
    """
    found: Any = manifest.provenance
    for name in ("settings", *names):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def guidance_trained_with(manifest: Manifest) -> float | None:
    """Guidance scale of the teacher that a student was distilled from; None where the bundle does not say."""
    scale = trained_with(manifest, "guidance", "scale")
    return scale if type(scale) in (int, float) else None


def decoder_file(precision: str) -> str:
    """Name of the file that holds the decoder."""
    return f"decoder.{precision}.onnx"


def sampler_file(nfe: int, precision: str) -> str:
    """Name of the file that holds the whole sampler of `nfe` student calls as one graph."""
    return f"sampler.nfe{nfe}.{precision}.onnx"


def manifest_bytes(manifest: Manifest) -> bytes:
    """`bundle.json` for a manifest, its own checksum included."""
    body = asdict(manifest)
    digest = sha256(_canonical(body))
    return _canonical({**body, "sha256": digest})


def _canonical(body: dict) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """The manifest that the bytes of a `bundle.json` hold; `folder` is named in errors."""
    place = folder / MANIFEST
    try:
        body = json.loads(data)
        # Back again right here: JSON that cannot be written (NaN, half a surrogate pair) was never written by us.
        rewritten = _canonical(body)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}; copy the bundle again") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{place} has format version {version!r}, this release reads {FORMAT_VERSION}; "
            "use the release that made it, or export again"
        )
    digest = body.pop("sha256", None)
    manifest = _typed(Manifest, body, str(place))
    # Byte for byte: a changed space is an altered file too.
    if data != rewritten or digest != sha256(_canonical(body)):
        raise BundleError(f"{place} does not match its own checksum; copy the bundle again or re-export")
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, SIGNATURE, ".", ".."):
            raise BundleError(f"{place} lists a file outside its folder: {name!r}")
    wanted = {f"student.{precision}.onnx" for precision in manifest.precisions} | {"golden.npz"}
    wanted |= {sampler_file(nfe, precision) for nfe in manifest.samplers for precision in manifest.precisions}
    if manifest.decoder is not None:
        wanted |= {decoder_file(precision) for precision in manifest.precisions}
    if not manifest.precisions or not wanted <= manifest.files.keys():
        raise BundleError(
            f"{place} lacks {', '.join(sorted(wanted - manifest.files.keys())) or 'a precision'}"
        )
    if sorted(manifest.tolerances) != sorted(manifest.precisions):
        raise BundleError(f"{place} must state tolerances for each of its precisions; export again")
    wanted |= {f"{name}.data" for name in wanted if name.startswith("student.")}
    unlisted = [
        name
        for name in manifest.files
        if name.startswith(("student.", "sampler.", "decoder.")) and name not in wanted
    ]
    if unlisted:
        kind = unlisted[0].partition(".")[0]
        raise BundleError(f"{place} has the file {unlisted[0]}, but no such {kind}; copy the bundle again")
    _check_images(manifest, place)
    steered = manifest.conditioning.kind == "class"
    inputs = ["x_t", "t", *(["class_labels"] if steered else [])]
    if bool(manifest.conditioning.class_names) != steered or inputs != [
        spec.name for spec in manifest.network.inputs
    ]:
        raise BundleError(f"{place} has conditioning and network inputs that do not fit; export again")
    try:
        for nfe in (manifest.schedule.nfe, *manifest.samplers):
            manifest.schedule.schedule(nfe=nfe)
    except PiFlowError as error:
        raise BundleError(f"{place} has an unusable schedule: {error}") from error
    if not (
        manifest.policy.eps > 0
        and manifest.latent.scale != 0
        and is_temperature(manifest.schedule.temperature)
    ):
        raise BundleError(f"{place} has an eps, temperature or latent scale out of range; export again")
    return manifest


def _check_images(manifest: Manifest, place: Path) -> None:
    latent, decoder = manifest.latent, manifest.decoder
    if latent.kind == "pixels":
        fits = decoder is None and len(latent.shape) == 3 and latent.shape[0] in (1, 3)
    elif decoder is not None:
        inputs, outputs = ([spec.shape for spec in specs] for specs in (decoder.inputs, decoder.outputs))
        fits = inputs == [("batch", *latent.shape)] and len(outputs) == 1
        fits = fits and len(outputs[0]) == 4 and outputs[0][1] in (1, 3)
    else:
        fits = len(latent.shape) > 1
    if not fits:
        raise BundleError(f"{place} has latents and a decoder that do not fit each other; export again")


def _typed(kind, value, where: str):
    """`value` as an instance of the annotated type `kind`, or a BundleError that names the place."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        names = [f.name for f in fields(kind)]
        if not isinstance(value, dict) or list(value) != names:
            got = list(value) if isinstance(value, dict) else value
            unknown = [n for n in got if n not in names] if isinstance(value, dict) else []
            problem = (
                f"has the unknown key {unknown[0]!r}" if unknown else f"must hold {', '.join(names)} in order"
            )
            raise BundleError(f"{where} {problem}; it was altered or made by another release")
        hints = get_type_hints(kind)
        return kind(**{n: _typed(hints[n], value[n], f"{where}: {n}") for n in names})
    if origin is list and isinstance(value, list):
        return [_typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin in (Union, types.UnionType) and all(map(is_dataclass, args)):
        named = value.get("kind") if isinstance(value, dict) else None
        for option in args:
            if named in get_args(get_type_hints(option)["kind"]):
                return _typed(option, value, where)
    elif origin in (Union, types.UnionType):
        if type(value) in args or (float in args and type(value) is int):
            return value
        described = [option for option in args if is_dataclass(option)]
        if described:
            return _typed(described[0], value, where)
    elif origin is Literal:
        if value in args:
            return value
    elif kind is Any or type(value) is kind or (kind is float and type(value) is int):
        return value
    raise BundleError(f"{where} has a value of the wrong kind: {value!r}")
