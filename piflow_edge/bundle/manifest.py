"""`bundle.json`: what a bundle says of itself, typed, and refused where it does not hold together.

Unknown versions, unknown keys and values of the wrong kind are errors; so are files that the rest asks for and that are
not listed, and the other way round. The published schema, `bundle.schema.json`, is made from these classes. This is
format 5; a manifest of format 4 is read as one of format 5 (see `format4`).
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from piflow_edge.arrays import Array, SameArray
from piflow_edge.conditioning import Conditioner, Conditioning, TensorSpec, conditioner_from_json
from piflow_edge.errors import BundleError, ShapeError
from piflow_edge.policies import PolicySpec
from piflow_edge.schedule import Schedule
from piflow_edge.system.files import sha256

from .sections import AxisSpec, FileSpec, LatentSpec, NetworkSpec, ScheduleSpec, ToleranceSpec
from .sizes import HEIGHT, IMAGE_HEIGHT, WIDTH, ImageSizes, OneSize, read_sizes
from .typed_json import write_json

FORMAT_VERSION = 5
MANIFEST = "bundle.json"
# Beside it; see signature.py.
SIGNATURE = "bundle.sig"
# Files that are in every bundle, or may be, and belong to no network.
GOLDEN, LICENSE, PREVIEW = "golden.npz", "LICENSE", "preview.png"
# A manifest is a few kilobytes; anything this large is no manifest.
MANIFEST_LIMIT = 1 << 20

STUDENT, DECODER, _SAMPLER = "student", "decoder", "sampler.nfe"
# Where names of text encoders begin.
ENCODER = "encoder."


@dataclass(frozen=True)
class Manifest:
    """All of `bundle.json`, in order, but for its own checksum.

    `conditioning`: the conditioner's own JSON. `axes`: the named axes of all networks, "batch" among them. `networks`:
    "student", "decoder" where there is one, and "sampler.nfeN", the whole sampler of N student calls as one graph.
    `assets`: name -> file, such as a tokenizer. `precisions`: the first is the default; each network is there in all of
    them. `tolerances`: of each precision. `files`: all others, but for the signature.
    """

    format_version: int
    name: str
    policy: PolicySpec
    schedule: ScheduleSpec
    conditioning: dict[str, Any]
    latent: LatentSpec
    axes: dict[str, AxisSpec]
    networks: dict[str, NetworkSpec]
    assets: dict[str, str]
    precisions: list[str]
    tolerances: dict[str, ToleranceSpec]
    license: str
    provenance: dict[str, Any]
    files: dict[str, FileSpec]

    @property
    def student(self) -> NetworkSpec:
        return self.networks[STUDENT]

    @property
    def decoder(self) -> NetworkSpec | None:
        """What makes images of latents, if it is in the bundle."""
        return self.networks.get(DECODER)

    @property
    def samplers(self) -> list[int]:
        """Student calls per image of the sampler graphs, rising."""
        calls = (sampler_calls(name) for name in self.networks)
        return sorted(nfe for nfe in calls if nfe is not None)

    @cached_property
    def makes_images(self) -> bool:
        """False for latents without a decoder."""
        return self.latent.kind == "pixels" or self.decoder is not None

    @property
    def image_shape(self) -> list[int] | None:
        """(C, H, W) of the images, of several sizes the usual one; None where the bundle makes none."""
        if self.sizes is not None and self.decoder is not None:
            return [int(self.decoder.outputs[0].shape[1]), *self.sizes.usual]
        if self.decoder is not None:
            return [int(n) for n in self.decoder.outputs[0].shape[1:]]
        return self.latent.restored_shape if self.latent.kind == "pixels" else None

    @cached_property
    def sizes(self) -> ImageSizes | None:
        """The sizes of image that it makes; None where there is one."""
        return read_sizes(self.axes, (self.latent.shape[1], self.latent.shape[2]), self.pixels_per_state)

    @cached_property
    def image_sizes(self) -> ImageSizes | OneSize | None:
        """The sizes of image that it makes, also where there is one; None where it makes none."""
        if self.sizes is not None or self.image_shape is None:
            return self.sizes
        _, height, width = self.image_shape
        return OneSize(height, width)

    @property
    def pixels_per_state(self) -> int | None:
        """Pixels of an image per place of a state along each side, where there are several sizes and a decoder."""
        if self.decoder is None or IMAGE_HEIGHT not in self.axes or HEIGHT not in self.axes:
            return None
        return self.axes[IMAGE_HEIGHT].multiple_of // self.axes[HEIGHT].multiple_of

    @property
    def usual_sides(self) -> dict[str, int]:
        """Named sides of the states -> their usual lengths."""
        return {} if self.sizes is None else dict(zip((HEIGHT, WIDTH), self.latent.shape[1:], strict=True))

    @property
    def state_axes(self) -> tuple[int | str, ...]:
        """(C, H, W) of the states as graphs have them: sides that may differ by their names."""
        channels, height, width = self.latent.shape
        return (
            channels,
            *((HEIGHT, WIDTH) if HEIGHT in self.axes and WIDTH in self.axes else (height, width)),
        )

    def state_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return (C, H, W) of the states of an image of so many pixels; None is the usual number.

        Raises:
            ShapeError: the bundle makes no images of that size.
        """
        if self.sizes is None:
            return tuple(self.latent.shape)
        return (self.latent.shape[0], *self.sizes.state_size(self.name, height, width))

    @cached_property
    def conditioner(self) -> Conditioner:
        """What steers the images."""
        return conditioner_from_json(self.conditioning)

    @property
    def steering_axes(self) -> dict[str, AxisSpec]:
        """Named axes of what steers the student, but for the batch."""
        names = {n for spec in self.conditioner.inputs for n in spec.shape[1:] if isinstance(n, str)}
        return {name: axis for name, axis in self.axes.items() if name in names}

    @property
    def has_several_lengths(self) -> bool:
        """Return True if a named axis of the student's inputs, but for the batch, may have several lengths."""
        return bool(self.steering_axes) or self.sizes is not None

    @property
    def resized_shape(self) -> tuple[int, ...]:
        """(C, H, W) of states of another size than the usual one, where there are several."""
        channels, *sides = self.latent.shape
        if self.sizes is None:
            return (channels, *sides)
        return (
            channels,
            *(self._other_length(name, side) for name, side in zip((HEIGHT, WIDTH), sides, strict=True)),
        )

    def example(
        self, count: int, *, resized: bool = False, conditioner: Conditioner | None = None
    ) -> dict[str, np.ndarray]:
        """Return a valid conditioning of `count` images, always the same; `resized` has named axes of other lengths.

        `conditioner`: the bundle's, opened, where its examples are to be real ones.
        """
        given = (conditioner or self.conditioner).example(count)
        for spec in self.conditioner.inputs:
            for place, name in enumerate(spec.shape):
                if place and isinstance(name, str):
                    length = given[spec.name].shape[place]
                    wanted = self._other_length(name, length) if resized else self.axes[name].nearest(length)
                    given[spec.name] = np.take(given[spec.name], np.arange(wanted) % length, place)
        return given

    def _other_length(self, name: str, length: int) -> int:
        axis = self.axes[name]
        first = axis.nearest(length)
        longer = axis.nearest(first + 3 * axis.multiple_of)
        return longer if longer != first else axis.shortest

    def check_lengths(self, conditioning: Conditioning) -> None:
        """Raise ShapeError unless the named axes of what steers are as long as the bundle allows."""
        for given, place, name, axis in self._bounded_axes:
            length = conditioning[given].shape[place]
            if length != axis.nearest(length):
                raise ShapeError(f"{name!r} of {given!r} is {axis} in bundle {self.name!r}; got {length}")

    @cached_property
    def _bounded_axes(self) -> list[tuple[str, int, str, AxisSpec]]:
        """Input, place, name and lengths of those named axes of what steers that may not have every length."""
        named = [
            (spec.name, place, name, self.axes[name])
            for spec in self.conditioner.inputs
            for place, name in enumerate(spec.shape)
            if isinstance(name, str)
        ]
        return [found for found in named if found[-1] != AxisSpec(1, None, 1)]

    def network_inputs(self, x_t: Array, sigma_t: float, conditioning: Conditioning) -> dict[str, SameArray]:
        """Return what the student is fed at states `x_t` (B, C, H, W), steered by `conditioning`."""
        t = np.empty(len(x_t), np.float32)
        t.fill(sigma_t)
        return {"x_t": x_t, "t": t, **conditioning}

    def network_files(self, name: str, precision: str) -> list[str]:
        """Files of one network in one of the bundle's precisions, the .onnx file first.

        Raises:
            BundleError: there is no such network; the message says how to get it.
        """
        if name not in self.networks:
            raise BundleError(f"bundle {self.name!r} has no {_absent(name, self)}")
        return self.networks[name].files[precision]


def sampler_name(nfe: int) -> str:
    """Name of the network that is the whole sampler of `nfe` student calls."""
    return f"{_SAMPLER}{nfe}"


def sampler_calls(name: str) -> int | None:
    """Student calls per image of the sampler graph of that name; None for other networks."""
    found = re.fullmatch(r"sampler\.nfe([1-9]\d{0,3})", name, re.ASCII)
    return int(found[1]) if found else None


def sampler_tensors(
    schedule: Schedule,
    state_shape: Sequence[int],
    image_shape: Sequence[int] | None,
    conditioning: Sequence[TensorSpec],
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of the sampler graph for a schedule.

    Args:
        schedule: with the graph's number of calls.
        state_shape: (C, H, W) of the states.
        image_shape: (C, H, W) of the images; None where none are made.
        conditioning: inputs of the student's that steer it.
    """
    state = ("batch", *state_shape)
    inputs = [TensorSpec("noise", "float32", state), *conditioning]
    if any(segment.renoises for segment in schedule.segments):
        inputs.append(TensorSpec("renoise", "float32", (schedule.nfe - 1, *state)))
    outputs = [TensorSpec("latents", "float32", state)]
    if image_shape is not None:
        channels, height, width = image_shape
        outputs.append(TensorSpec("images", "uint8", ("batch", height, width, channels)))
    return inputs, outputs


def _absent(name: str, manifest: Manifest) -> str:
    """What to say of a network that is not there, after "has no"."""
    calls = sampler_calls(name)
    if calls is not None:
        has = ", ".join(map(str, manifest.samplers)) or "none"
        return (
            f"sampler graph of {calls} calls, its graphs are: {has}; export it with --sampler-graph {calls}"
        )
    if name == DECODER:
        return "decoder; export it with --autoencoder"
    return f"network {name!r}; it holds {', '.join(manifest.networks)}"


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


def manifest_bytes(manifest: Manifest) -> bytes:
    """`bundle.json` for a manifest, its own checksum included."""
    return seal_manifest(asdict(manifest))


def seal_manifest(body: dict) -> bytes:
    """The bytes of a `bundle.json` that holds `body` and its checksum."""
    return write_json({**body, "sha256": sha256(write_json(body))})
