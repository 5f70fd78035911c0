"""Bounds of what a manifest says: of its numbers, of the arrays that they lead to, and of its names.

A manifest may be anybody's. What lies within these bounds takes no more than some memory and time; what lies outside
is no student that anybody made.
"""

import math
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from piflow_edge.system.onnx_messages import ITEM_BYTES

if TYPE_CHECKING:
    from .manifest import Manifest

# Student calls per image.
MOST_CALLS = 256
# Section -> key -> least and greatest value. Usual ones: 1 to 4 calls, 128 substeps, shift 3.2, 8 components, eps 1e-4.
NUMBERS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "schedule": {
        "nfe": (1, MOST_CALLS),
        "shift": (1e-3, 1e3),
        "final_step_size_scale": (1e-3, 1e3),
        "total_substeps": (1, 1 << 14),
        "h": (0, 1e3),
        "temperature": (0, 1e3),
    },
    "policy": {
        "num_components": (1, 1 << 12),
        "num_nodes": (1, 1 << 12),
        "segment_size": (1e-3, 1e3),
        "shift": (1e-3, 1e3),
        "eps": (1e-12, 1),
    },
    "latent": {"scale": (-1e6, 1e6), "shift": (-1e6, 1e6), "packing": (1, 1 << 6)},
    "tolerances": {
        "encodings": (0, 1e6), "outputs": (0, 1e6), "velocities": (0, 1e6), "latents": (0, 1e6),
        "samplers": (0, 1e6), "images": (0, 255), "psnr": (0, 1e3),
    },
}  # fmt: skip
_LONGEST_AXIS = 1 << 20
_MOST_AXES = 8
_OPSETS = (1, 99)
# Bytes of an array for one image. The largest known, of a student for 4 megapixels, takes 34 MB.
_LARGEST_ARRAY = 1 << 28
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "int8", "bool")
_LONGEST_NAME = 255
_MOST_NETWORKS, _MOST_TENSORS, _MOST_FILES, _MOST_MOMENTS = 64, 256, 4096, 1 << 12
_LARGEST_FILE = 1 << 44


def find_excess(manifest: "Manifest") -> Iterator[str]:
    """Yield what lies outside the bounds, as the end of a sentence about the manifest."""
    yield from _numbers_outside(manifest)
    yield from _lists_outside(manifest)
    yield from _arrays_outside(manifest)


def _numbers_outside(manifest: "Manifest") -> Iterator[str]:
    sections: list[tuple[str, str, Any]] = [
        (name, name, getattr(manifest, name)) for name in ("schedule", "policy", "latent")
    ]
    sections += [
        ("tolerances", f"tolerances of {name!r:.80}", spec) for name, spec in manifest.tolerances.items()
    ]
    for kind, place, section in sections:
        for key, (least, most) in NUMBERS[kind].items():
            value = getattr(section, key, None)
            if isinstance(value, (int, float)) and not least <= value <= most:  # NaN fails too
                yield f"has {key} {value!r:.40} in its {place}, which lies from {least:g} to {most:g}"
    if not all(1 <= nfe <= MOST_CALLS for nfe in manifest.schedule.good_nfes):
        yield f"is good for numbers of calls that do not lie from 1 to {MOST_CALLS}"
    moments = (*manifest.latent.mean, *manifest.latent.deviation)
    if not all(abs(number) <= 1e6 for number in moments):
        yield "has a mean or deviation of its latent that is not from -1e+06 to 1e+06"
    for name, spec in manifest.files.items():
        if not 0 <= spec.size <= _LARGEST_FILE:
            yield f"has the file {name!r:.80} of {spec.size} bytes"


def _lists_outside(manifest: "Manifest") -> Iterator[str]:
    counts = {
        "networks": (len(manifest.networks), _MOST_NETWORKS),
        "files": (len(manifest.files), _MOST_FILES),
        "axes": (len(manifest.axes), _MOST_TENSORS),
        "means of the latent": (len(manifest.latent.mean), _MOST_MOMENTS),
        "numbers of calls": (len(manifest.schedule.good_nfes), MOST_CALLS),
    }
    counts["calls of a sampler graph"] = max(manifest.samplers, default=0), MOST_CALLS
    for name, network in manifest.networks.items():
        counts[f"tensors of {name!r:.80}"] = len(network.inputs) + len(network.outputs), _MOST_TENSORS
    for what, (count, most) in counts.items():
        if count > most:
            yield f"has {count} {what}, and {most} may be"


def _arrays_outside(manifest: "Manifest") -> Iterator[str]:
    for name, axis in manifest.axes.items():
        if max(axis.min, axis.max or 0, axis.multiple_of) > _LONGEST_AXIS:
            yield f"has an axis {name!r:.80} longer than {_LONGEST_AXIS}"
    yield from _array_outside("the latent", "float32", manifest.latent.shape)
    for name, network in manifest.networks.items():
        if not _OPSETS[0] <= network.opset <= _OPSETS[1]:
            yield f"has the opset {network.opset} of {name!r:.80}"
        for spec in (*network.inputs, *network.outputs):
            if spec.dtype not in _DTYPES:
                yield f"has {spec.name!r:.80} of the dtype {spec.dtype!r:.40}; known are {', '.join(_DTYPES)}"
                continue
            lengths = [_least(manifest, length) for length in spec.shape]
            yield from _array_outside(repr(spec.name)[:80], spec.dtype, lengths)


def _least(manifest: "Manifest", length: int | str) -> int:
    """The length of an axis, or the least that a named one has; 1 where nothing is said of it."""
    if isinstance(length, int):
        return length
    return manifest.axes[length].min if length in manifest.axes else 1


def _array_outside(what: str, dtype: str, lengths: list[int]) -> Iterator[str]:
    if len(lengths) > _MOST_AXES or not all(1 <= length <= _LONGEST_AXIS for length in lengths):
        shape = _format_lengths(lengths)
        yield f"has {what} of the shape {shape}; up to {_MOST_AXES} axes have 1 to {_LONGEST_AXIS} each"
    elif (size := math.prod(lengths) * ITEM_BYTES[dtype]) > _LARGEST_ARRAY:
        yield f"has {what} of {size} bytes an image; {_LARGEST_ARRAY} is the most"


def _format_lengths(lengths: list[int]) -> str:
    return f"({', '.join(f'{length!r:.24}' for length in lengths[:_MOST_AXES])})"


def find_odd_names(manifest: "Manifest") -> Iterator[str]:
    """Yield names that cannot be shown, or that stand for two things, as the end of a sentence about the manifest."""
    names = [
        manifest.name,
        *manifest.axes,
        *manifest.networks,
        *manifest.assets,
        *manifest.precisions,
        *manifest.files,
    ]
    for network in manifest.networks.values():
        names += [network.kind, *(spec.name for spec in (*network.inputs, *network.outputs))]
    for name in names:
        if len(name) > _LONGEST_NAME or not is_printable(name):
            yield f"has the name {name!r:.80}, which is too long or holds control characters"
    if not is_printable(manifest.license.replace("\n", " ")):
        yield "has a license with control characters"
    for name, network in manifest.networks.items():
        tensors = [spec.name for spec in (*network.inputs, *network.outputs)]
        if len(set(tensors)) < len(tensors) or "" in tensors:
            yield f"has two inputs or outputs of one name, or one without, in {name!r:.80}"
    folded = [name.casefold() for name in manifest.files]
    if len(set(folded)) < len(folded):
        yield "has two files whose names differ in capitals only"


def is_printable(text: str) -> bool:
    """Return True if a text holds no control characters, and none that turn the direction of writing."""
    return not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


def is_deeper_than(most: int, body: Any) -> bool:
    """Return True if lists and objects of a JSON value are nested more than `most` deep. Takes no stack of its own."""
    level = [body]
    for _ in range(most):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, (dict, list)) for value in level)
