"""What a network takes and gives, as a bundle describes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from piflow_edge.errors import ShapeError


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a network. `dtype`: as NumPy names it, such as "float32".

    `shape`: the first axis is "batch"; a text names an axis of any length, such as "tokens".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON has lists

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"

    def size(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape in numbers. `axes`: the length of every named axis, "batch" among them."""
        return tuple(axes[length] if isinstance(length, str) else length for length in self.shape)


def convert_array(given: Any, spec: TensorSpec, axes: dict[str, int]) -> np.ndarray:
    """Return what a caller gives for `spec` as an array of its dtype, C-contiguous.

    Args:
        given: an array, or nested lists, with the batch as its first axis.
        spec: the input that it is for.
        axes: lengths of named axes that are known, from other inputs of the same call; those of this one are added.

    Raises:
        ShapeError: another shape or kind of number, or values that are not finite or do not fit the dtype.
    """
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ShapeError(f"{spec.name!r} must be one array, {spec}: {error}") from error
    fits = array.ndim == len(spec.shape) and all(
        length == (axes.setdefault(expected, length) if isinstance(expected, str) else expected)
        for length, expected in zip(array.shape, spec.shape, strict=True)
    )
    dtype = np.dtype(spec.dtype)
    if not fits or not _same_kind(array.dtype, dtype):
        lengths = ", ".join(f"{name}={length}" for name, length in axes.items() if name in spec.shape)
        where = f" with {lengths}" if lengths else ""
        raise ShapeError(f"give {spec}{where}; got {array.dtype} {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):  # what the dtype cannot hold is refused below
        converted = np.ascontiguousarray(array, dtype)
    if dtype.kind == "f" and not np.isfinite(converted).all():
        raise ShapeError(f"{spec.name!r} must be finite in {spec.dtype}; got NaN or infinity")
    if dtype.kind in "iu" and not np.array_equal(converted, array):
        raise ShapeError(f"{spec.name!r} must fit into {spec.dtype}; got {array.min()} to {array.max()}")
    return converted.reshape(array.shape)  # ascontiguousarray makes one axis of none


def _same_kind(given: np.dtype, wanted: np.dtype) -> bool:
    kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}
    return given.kind in kinds.get(wanted.kind, "")
