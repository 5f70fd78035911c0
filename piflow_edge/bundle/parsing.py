"""Bytes of a `bundle.json` -> manifest, of every format that this release reads, if it holds together.

What is checked: files, networks and what flows between them, numbers in range.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from piflow_edge.conditioning import TensorSpec
from piflow_edge.errors import BundleError, PiFlowError
from piflow_edge.schedule import is_temperature
from piflow_edge.system.files import sha256

from .bounds import find_excess, find_odd_names, is_deeper_than
from .manifest import (
    DECODER,
    FORMAT_VERSION,
    GOLDEN,
    LICENSE,
    MANIFEST,
    MANIFEST_LIMIT,
    PREVIEW,
    SIGNATURE,
    STUDENT,
    Manifest,
    manifest_bytes,
    sampler_calls,
)
from .sections import NetworkSpec
from .sizes import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH
from .typed_json import read_typed, write_json

# Values in values: a manifest has some ten.
_DEEPEST = 32
# What the list of a bundle's files, and of what a precision leaves as it is, may take of its manifest.
_ROOM_FOR_FILES = MANIFEST_LIMIT // 8

Shape = tuple[int | str, ...]

_ENCODER = re.compile(r"encoder\.[A-Za-z0-9_-]{1,64}", re.ASCII)


def _read_format_5(body: dict, place: str) -> Manifest:
    return read_typed(Manifest, body, place)


def _read_format_4(body: dict, place: str) -> Manifest:
    from .format4 import read_format_4  # late: few bundles are that old

    return read_format_4(body, place)


_READERS = {FORMAT_VERSION: _read_format_5, 4: _read_format_4}


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """The manifest that the bytes of a `bundle.json` hold; `folder` is named in errors.

    Raises:
        BundleError: it is none of a format that this release reads, does not match its own checksum, or does not hold
            together.
    """
    place = folder / MANIFEST
    if len(data) > MANIFEST_LIMIT:
        raise BundleError(
            f"{place} is larger than {MANIFEST_LIMIT} bytes, as no manifest is; copy the bundle again"
        )
    try:
        body = json.loads(data)
        if is_deeper_than(_DEEPEST, body):
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        # Back again right here: JSON that cannot be written (NaN, half a surrogate pair) was never written by us.
        rewritten = write_json(body)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}; copy the bundle again") from error
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int or version not in _READERS:
        raise BundleError(
            f"{place} has format version {version!r}, this release reads {FORMAT_VERSION} and 4; "
            "use the release that made it, or export again"
        )
    digest = body.pop("sha256", None)
    manifest = _READERS[version](body, str(place))
    # Byte for byte: a changed space is an altered file too.
    if data != rewritten or digest != sha256(write_json(body)):
        raise BundleError(f"{place} does not match its own checksum; copy the bundle again or re-export")
    _check_manifest(manifest, place)
    return manifest


def _check_manifest(manifest: Manifest, place: Path) -> None:
    """Raise BundleError for the first thing that does not hold; `place` is named in it."""
    for problem in _problems(manifest):
        raise BundleError(f"{place} {problem}")


def _problems(manifest: Manifest) -> Iterator[str]:
    yield from (f"{problem}; export again" for problem in find_odd_names(manifest))  # the others quote names
    yield from _problems_of_files(manifest)
    yield from (f"{problem}; export again" for problem in _problems_of_content(manifest))


def check_draft(manifest: Manifest) -> None:
    """Raise BundleError unless a manifest without files would be read once its files are there."""
    for problem in (*find_odd_names(manifest), *_problems_of_content(manifest)):
        raise BundleError(f"the bundle of such a student would not be read: it {problem}; train another one")
    most = MANIFEST_LIMIT - _ROOM_FOR_FILES
    if (size := len(manifest_bytes(manifest))) > most:
        raise BundleError(
            f"what the bundle of such a student says of itself takes {size} bytes, and may take {most}; "
            "fewer or shorter names of classes make it smaller"
        )


def _problems_of_content(manifest: Manifest) -> Iterator[str]:
    """Yield what does not hold in all but files, as the end of a sentence about the manifest."""
    yield from _problems_of_axes(manifest)
    yield from _problems_of_feeds(manifest)
    if problem := _problem_of_sizes(manifest):
        yield f"has sizes that do not fit each other: {problem}"
        return
    if problem := _problem_of_images(manifest):
        yield f"has latents and a decoder that do not fit each other: {problem}"
    yield from _problems_of_student(manifest)
    yield from _problems_of_numbers(manifest)
    yield from find_excess(manifest)


def _problems_of_files(manifest: Manifest) -> Iterator[str]:
    for name in manifest.files:
        if Path(name).name != name or name in (MANIFEST, SIGNATURE, ".", ".."):
            yield f"lists a file outside its folder: {name!r}"
    if STUDENT not in manifest.networks:
        yield "has no student; export again"
    for name, network in manifest.networks.items():
        if name not in (STUDENT, DECODER) and sampler_calls(name) is None and not _ENCODER.fullmatch(name):
            yield f"has a network of an unknown kind: {name!r}; it was altered or made by another release"
        if list(network.files) != manifest.precisions or not all(network.files.values()):
            yield f"must name files of {name} for each of its precisions, in their order; export again"
    if not manifest.precisions or len(set(manifest.precisions)) < len(manifest.precisions):
        yield "lacks a precision, or has one twice; export again"
    if sorted(manifest.tolerances) != sorted(manifest.precisions):
        yield "must state tolerances for each of its precisions; export again"
    named = {
        file for network in manifest.networks.values() for files in network.files.values() for file in files
    }
    named |= {*manifest.assets.values(), GOLDEN}
    if lacking := sorted(named - manifest.files.keys()):
        yield f"lacks {', '.join(lacking)}; copy the bundle again"
    if unnamed := sorted(manifest.files.keys() - named - {LICENSE, PREVIEW}):
        yield f"has the file {unnamed[0]}, but nothing that it belongs to; copy the bundle again"


def _problems_of_axes(manifest: Manifest) -> Iterator[str]:
    for name, axis in manifest.axes.items():
        whole = axis.min >= 1 and axis.multiple_of >= 1
        if not whole or (axis.longest is not None and axis.longest < axis.shortest):
            yield f"has an axis {name!r} without a length"
    for name, network in manifest.networks.items():
        for spec in (*network.inputs, *network.outputs):
            for length in spec.shape:
                if isinstance(length, str) and length not in manifest.axes:
                    yield f"has an axis {length!r} in {spec.name} of {name}, and no range of it"
                if isinstance(length, int) and length < 1:
                    yield f"has {spec.name} of {name} with an axis of {length}"


def _problems_of_feeds(manifest: Manifest) -> Iterator[str]:
    for name, network in manifest.networks.items():
        for output, targets in network.feeds.items():
            for target in targets:
                source, target_tensor = _tensor(network.outputs, output), _input(manifest, target)
                if source is None or target_tensor is None or not _fit(source.shape, target_tensor.shape):
                    yield f"feeds {output} of {name} to {target!r}, which does not take it"


def _fit(source: Shape, target_tensor: Shape) -> bool:
    """Return True if an array of the one shape may be one of the other: where both have a number, it is the same."""
    return len(source) == len(target_tensor) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(source, target_tensor, strict=True)
    )


def _input(manifest: Manifest, target: str) -> TensorSpec | None:
    name, _, tensor = target.partition("/")
    return _tensor(manifest.networks[name].inputs, tensor) if name in manifest.networks else None


def _tensor(specs: list[TensorSpec], name: str) -> TensorSpec | None:
    return next((spec for spec in specs if spec.name == name), None)


def _problem_of_images(manifest: Manifest) -> str | None:
    latent, decoder = manifest.latent, manifest.decoder
    if len(latent.shape) != 3 or min(latent.shape) < 1:
        return f"states of the shape {latent.shape}"
    if latent.packing < 1 or latent.shape[0] % latent.packing**2:
        return f"a packing of {latent.packing} in {latent.shape[0]} channels"
    if len(latent.mean) != len(latent.deviation) or len(latent.mean) not in (0, latent.shape[0]):
        return (
            f"{len(latent.mean)} means and {len(latent.deviation)} deviations of {latent.shape[0]} channels"
        )
    if latent.kind == "pixels" and (decoder or latent.mean or latent.packing > 1):
        return "pixels, and a decoder or what latents have"
    if latent.kind == "pixels":
        return _problem_of_channels(latent.shape[0])
    return None if decoder is None else _problem_of_decoder(manifest, decoder)


def _problem_of_decoder(manifest: Manifest, decoder: NetworkSpec) -> str | None:
    inputs, outputs = ([spec.shape for spec in specs] for specs in (decoder.inputs, decoder.outputs))
    _, *sides = manifest.state_axes
    restored = (
        manifest.latent.restored_shape if manifest.sizes is None else [manifest.latent.shape[0], *sides]
    )
    if inputs != [("batch", *restored)]:
        return f"a decoder of {inputs}, and latents of {restored}"
    if len(outputs) != 1 or len(outputs[0]) != 4 or not isinstance(outputs[0][1], int):
        return f"a decoder that makes {outputs}"
    named = None if manifest.sizes is None else (IMAGE_HEIGHT, IMAGE_WIDTH)
    if not (outputs[0][2:] == named if named else all(isinstance(n, int) for n in outputs[0][2:])):
        return f"a decoder that makes {outputs}"
    return _problem_of_channels(outputs[0][1])


def _problem_of_sizes(manifest: Manifest) -> str | None:
    """Why the axes of height and width are none that images can have; None where they are, or there are none."""
    axes, sides = manifest.axes, (HEIGHT, WIDTH)
    if not {*sides, IMAGE_HEIGHT, IMAGE_WIDTH} & axes.keys():
        return None
    if not set(sides) <= axes.keys() or manifest.latent.packing > 1:
        return "height without width, or packed latents of several sizes"
    if any(not axes[side].has(length) for side, length in zip(sides, manifest.latent.shape[1:], strict=True)):
        return f"latents of {manifest.latent.shape}, and sides that these are none of"
    factor = manifest.pixels_per_state
    if factor is None:
        return None
    images = (axes.get(IMAGE_HEIGHT), axes.get(IMAGE_WIDTH))
    if factor < 1 or images != tuple(axes[side].scaled(factor) for side in sides):
        return "images whose sides are no whole number of times those of the latents"
    return None


def _problem_of_channels(channels: int | str) -> str | None:
    return None if channels in (1, 3) else f"images of {channels} channels"


def _problems_of_student(manifest: Manifest) -> Iterator[str]:
    try:
        steering = manifest.conditioner.inputs
    except PiFlowError as error:
        yield f"has unusable conditioning: {error}"
        return
    student, policy = manifest.student, manifest.policy
    state = ("batch", *manifest.state_axes)
    expected = [TensorSpec("x_t", "float32", state), TensorSpec("t", "float32", ("batch",)), *steering]
    if student.inputs != expected:
        yield "has conditioning and network inputs that do not fit"
    if {spec.name for spec in student.outputs} != set(policy.outputs):
        outputs = ", ".join(policy.outputs)
        yield f"has a {policy.kind.upper()} policy, whose student returns {outputs}, and another student"


def _problems_of_numbers(manifest: Manifest) -> Iterator[str]:
    try:
        for nfe in (manifest.schedule.nfe, *manifest.samplers):
            manifest.schedule.schedule(nfe=nfe)
    except PiFlowError as error:
        yield f"has an unusable schedule: {error}"
    latent = manifest.latent
    numbers = (latent.scale, latent.shift, *latent.mean, *latent.deviation)
    finite = all(map(math.isfinite, numbers)) and latent.scale != 0 and 0 not in latent.deviation
    if not (manifest.policy.eps > 0 and finite and is_temperature(manifest.schedule.temperature)):
        yield "has an eps, temperature or latent scale out of range"
