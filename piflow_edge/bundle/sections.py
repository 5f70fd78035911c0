"""The sections of `bundle.json`: plain data, each of which says what its numbers mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
from array_api_compat import device

from piflow_edge.arrays import Array, SameArray, array_namespace
from piflow_edge.conditioning import TensorSpec
from piflow_edge.schedule import Schedule, ShiftBySize, published_temperature
from piflow_edge.system.onnx_outline import GraphTensor, Outline

from .typed_json import ADDED_LATER

_OF_SCHEDULE = tuple(field.name for field in fields(Schedule))


@dataclass(frozen=True)
class ScheduleSpec:
    """The schedule the student was trained for; see `Schedule`.

    `temperature`: of a GM policy at every call but the last; 1 leaves it as it was trained, "auto" is the published
    rule, which depends on the number of calls. `good_nfes`: numbers of calls that the student is good for, none where
    that is not known; with `or_more`, all above the last too. `shift_by_size`: the shift of each size of image, where
    there are several; `shift` is then the usual size's. None is one for all.
    """

    nfe: int
    shift: float
    final_step_size_scale: float
    total_substeps: int
    h: float | str
    temperature: float | str
    substep_rule: Literal["round", "ceil"] = field(default="round", metadata=ADDED_LATER)
    # Left out of the hash, which a list has not: schedules are looked up in every call.
    good_nfes: list[int] = field(default_factory=list, hash=False, metadata=ADDED_LATER)
    or_more: bool = field(default=False, metadata=ADDED_LATER)
    shift_by_size: ShiftBySize | None = field(default=None, metadata=ADDED_LATER)

    def schedule(self, **changes) -> Schedule:
        """The schedule itself, with `changes` such as `nfe=2`."""
        settings = {name: getattr(self, name) for name in _OF_SCHEDULE}
        return Schedule(**settings | changes)

    def at_size(self, positions: int | None) -> "ScheduleSpec":
        """Return the schedule for states of so many positions, H * W; None is the usual number."""
        if positions is None or self.shift_by_size is None:
            return self
        return replace(self, shift=self.shift_by_size.shift(positions))

    def describe_good_nfes(self) -> str:
        """The numbers of calls that it is good for, in words."""
        numbers = " or ".join(map(str, self.good_nfes)) or "not stated"
        return f"{numbers} or more" if self.or_more else numbers

    def temperature_of(self, nfe: int) -> float:
        """The temperature, a number, for `nfe` calls per image."""
        return published_temperature(nfe) if self.temperature == "auto" else float(self.temperature)


@dataclass(frozen=True)
class AxisSpec:
    """How long a named axis may be: from `min` to `max`, a multiple of `multiple_of`. No `max` is any length."""

    min: int
    max: int | None
    multiple_of: int

    @property
    def only_length(self) -> int | None:
        """The one length that the axis may have; None where there are several."""
        return self.min if self.min == self.max else None

    def __str__(self) -> str:
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        if self.min == self.max:
            return str(self.min)
        return f"{self.min} {f'to {self.max}' if self.max else 'or more'}{multiple}"

    def nearest(self, length: int) -> int:
        """Return an allowed length near `length`: not longer, unless all are."""
        longest = length if self.max is None else min(length, self.max)
        return max(longest // self.multiple_of * self.multiple_of, self.shortest)

    def has(self, length: int, factor: int = 1) -> bool:
        """Return True if the axis, `factor` times as long, may have the length."""
        return length % factor == 0 and self.nearest(length // factor) == length // factor

    def next_above(self, length: int, factor: int = 1) -> int:
        """Return the least allowed length of the axis, `factor` times as long, that is not below `length`.

        The greatest there is, where all are.
        """
        units = -(-length // (factor * self.multiple_of)) * self.multiple_of
        return max(self.shortest, units if self.longest is None else min(units, self.longest)) * factor

    def scaled(self, factor: int) -> "AxisSpec":
        """Return the axis `factor` times as long."""
        most = None if self.max is None else self.max * factor
        return AxisSpec(self.min * factor, most, self.multiple_of * factor)

    @property
    def shortest(self) -> int:
        return -(-self.min // self.multiple_of) * self.multiple_of

    @property
    def longest(self) -> int | None:
        return None if self.max is None else self.max // self.multiple_of * self.multiple_of


@dataclass(frozen=True)
class NetworkSpec:
    """One graph. `kind`: class of the module it was exported from, for people.

    `feeds`: output -> inputs of other networks that it goes to, each as "network/input". `opset`: ONNX's. `files`: of
    every precision of the bundle: the .onnx file, and after it those that it keeps weights in. Networks, and
    precisions, may share a file.
    """

    kind: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    feeds: dict[str, list[str]]
    opset: int
    files: dict[str, list[str]]

    def find_mismatch(self, graph: Outline, axes: Mapping[str, AxisSpec]) -> str | None:
        """Return the first input or output of a graph that is not as it is here; None if all are.

        A length that the graph leaves open fits any number: the engine finds out. One that it fixes must be the one
        here.
        """
        return _find_mismatch("input", graph.inputs, self.inputs, axes) or _find_mismatch(
            "output", graph.outputs, self.outputs, axes
        )


def _find_mismatch(
    kind: str, found: Sequence[GraphTensor], wanted: Sequence[TensorSpec], axes: Mapping[str, AxisSpec]
) -> str | None:
    by_name = {tensor.name: tensor for tensor in found}
    names = [spec.name for spec in wanted]
    if len(by_name) < len(found) or sorted(by_name) != sorted(names):
        return f"its {kind}s are {', '.join(by_name) or 'none'}; the manifest says {', '.join(names)}"
    for spec in wanted:
        tensor = by_name[spec.name]
        if tensor.dtype != spec.dtype or not _fits(tensor.shape, spec.shape, axes):
            shape = "of any shape" if tensor.shape is None else tuple(n or "any" for n in tensor.shape)
            return f"its {kind} {tensor.name} is {tensor.dtype} {shape}; the manifest says {spec}"
    return None


def _fits(
    found: tuple[int | None, ...] | None, wanted: tuple[int | str, ...], axes: Mapping[str, AxisSpec]
) -> bool:
    if found is None:
        return True
    return len(found) == len(wanted) and all(
        length is None or length == (axes[expected].only_length if isinstance(expected, str) else expected)
        for length, expected in zip(found, wanted, strict=True)
    )


@dataclass(frozen=True)
class LatentSpec:
    """The state that is sampled: `shape` (C, H, W), as the student sees it.

    `kind`: "pixels" are images, -1 black to 1 white; of "latents" a decoder makes images. `restore` says what `scale`,
    `shift`, `mean`, `deviation` and `packing` are. `mean` and `deviation` have a number for every channel, or none.
    """

    kind: Literal["pixels", "latents"]
    shape: list[int]
    scale: float
    shift: float
    mean: list[float] = field(default_factory=list)
    deviation: list[float] = field(default_factory=list)
    packing: int = 1

    @property
    def is_plain(self) -> bool:
        """True if `restore` changes nothing."""
        return self.scale == 1 and self.shift == 0 and not self.mean and self.packing == 1

    @property
    def restored_shape(self) -> list[int]:
        """(C, H, W) of what `restore` returns."""
        channels, height, width = self.shape
        return [channels // self.packing**2, height * self.packing, width * self.packing]

    def restore(self, states: SameArray) -> SameArray:
        """Return the pixels, or what the decoder takes, of states (B, C, H, W).

        That is `states / scale + shift`, then times `deviation` plus `mean` of each channel. Last, each `packing` ** 2
        channels become a square of one channel.
        """
        if self.is_plain:
            return states
        states = states / self.scale + self.shift
        if self.mean:
            deviation, mean = (self._of_channels(numbers, states) for numbers in (self.deviation, self.mean))
            states = states * deviation + mean
        return states if self.packing == 1 else self._unpack(states)

    def _of_channels(self, numbers: list[float], like: Array) -> Array:
        shaped = np.array(numbers, np.float32).reshape(1, -1, 1, 1)
        return array_namespace(like).asarray(shaped, device=device(like))

    def _unpack(self, states: Array) -> Array:
        xp, side, (height, width) = array_namespace(states), self.packing, self.shape[1:]
        squares = xp.reshape(states, (-1, side, side, height, width))
        rows = xp.permute_dims(squares, (0, 3, 1, 4, 2))
        return xp.reshape(rows, (len(states), *self.restored_shape))


@dataclass(frozen=True)
class FileSpec:
    """Checksum and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ToleranceSpec:
    """Largest error `verify` accepts, relative to the golden array's largest value; images in levels of 255.

    `encodings`: of what text encoders make of prompts. `samplers`: of the latents that the sampler graphs make. `psnr`:
    least agreement in dB of whole images, or of latents where there are none, with those drawn from the same noise in
    PyTorch.
    """

    encodings: float
    outputs: float
    velocities: float
    latents: float
    samplers: float
    images: int
    psnr: float
