"""What a caller gives a generator, checked: seeds, noise, an image and a mask."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.kernels.normal import philox_normal

from .images import read_image, read_mask

Seeds = list[tuple[int, int]]


def read_seeds(seed: Any, count: int) -> Seeds:
    """Return (seed, index) of each of `count` images: of one seed, of a seed each, or as given."""
    if type(seed) is int and 0 <= seed < 2**64:
        return [(seed, i) for i in range(count)]
    given: Any = [(seed, i) for i in range(count)] if isinstance(seed, numbers.Integral) else seed
    try:
        if isinstance(seed, bool):
            raise TypeError
        seeds = [(s, 0) if isinstance(s, numbers.Integral) else tuple(s) for s in given]
        # Python's own numbers, which JSON can hold: NumPy's are no `int`.
        seeds = [(operator.index(s), operator.index(i)) for s, i in seeds]
    except (TypeError, ValueError):
        raise ShapeError(
            f"seed is a whole number, or for every image one or a (seed, index); got {seed!r}"
        ) from None
    if len(seeds) != count:
        raise ShapeError(f"give one (seed, index) per image: {count} images, {len(seeds)} pairs")
    if not all(0 <= number < 2**64 for pair in seeds for number in pair):
        raise ShapeError(f"seed is a whole number from 0 to 2^64 - 1, and so is an index; got {seed!r}")
    return seeds


def draw_noise(seeds: Seeds, shape: Sequence[int], draw: int, num_threads: int | None) -> np.ndarray:
    """Return the noise of images, float32 (len(seeds), *shape); see `philox_normal`."""
    how = {"draw": draw, "num_threads": num_threads}
    if len({s for s, _ in seeds}) == 1:
        return philox_normal(seeds[0][0], [i for _, i in seeds], shape, **how)
    return np.concatenate([philox_normal(s, [i], shape, **how) for s, i in seeds])


def convert_floats(what: str, given: Any, shape: Sequence[int], count: int | None = None) -> np.ndarray:
    """Return noise or latents that a caller gives as float32 (`count`, *shape), all of it finite.

    `count`: None is any number, 1 or more. `what`: it is, for errors.
    """
    expected = f"({', '.join(map(str, ('B' if count is None else count, *shape)))})"
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ShapeError(f"{what} must be one array {expected}: {error}") from error
    fits = array.ndim and array.shape == (count or max(1, len(array)), *shape)
    if not fits or not np.issubdtype(array.dtype, np.floating):
        raise ShapeError(f"{what} must be floating point {expected}; got {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused in the next line
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ShapeError(f"{what} must be finite in float32; got NaN or infinity")
    return array


def read_start_and_mask(
    image: Any, mask: Any, count: int, spec: LatentSpec, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return latents (B, C, H, W) of a given image, and (B, 1, H, W) of a mask; None for what is not given."""
    if mask is not None and image is None:
        raise ShapeError("a mask says what to draw into an image; give the image too")
    if image is None:
        return None, None
    start = _for_every_image("image", read_image(image, spec, name), count)
    if mask is None:
        return start, None
    height, width = spec.shape[-2:]
    return start, _for_every_image("mask", read_mask(mask, (height, width)), count)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ScheduleError unless the setting is a whole number of `least` or more, or None."""
    if value is None:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (whole and int(value) >= least):
        raise ScheduleError(f"{name} is a whole number, {least} or more; got {value!r}")


def _for_every_image(what: str, array: np.ndarray, count: int) -> np.ndarray:
    """`array` (B, ...) with B = `count`, or one that all images share."""
    if len(array) not in (1, count):
        raise ShapeError(f"give one {what} for all images, or one for each of {count}; got {len(array)}")
    return np.broadcast_to(array, (count, *array.shape[1:]))
