"""What a caller asks a generator for, checked."""

import numbers
import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from piflow_edge.bundle.manifest import LatentSpec, ScheduleSpec
from piflow_edge.errors import LabelError, ScheduleError, ShapeError
from piflow_edge.kernels.normal import philox_normal
from piflow_edge.schedule import Schedule, check_temperature

from .images import drawn_mask, encode

Seeds = list[tuple[int, int]]


def label_ids(labels, count, class_names: Sequence[str], name: str) -> np.ndarray:
    """Class ids, int64 (B,), of `labels`; zeros for a bundle without classes.

    Args:
        labels: ids or names, or one of either; None for a bundle without classes.
        count: images in all without classes; of each label with them, where None is one.
        class_names: of the bundle, in order; empty without classes.
        name: of the bundle, for errors.
    """
    if not class_names and (labels is not None or count in (None, 0)):
        raise LabelError(
            f"bundle {name!r} has no classes: it wants count, 1 or more, and no labels; got {count=}, {labels=}"
        )
    if count is not None and (
        isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1
    ):
        raise LabelError(f"count is a whole number, 1 or more; got {count!r}")
    if not class_names:
        return np.zeros(count, np.int64)  # which nothing reads

    def refused(what: str) -> LabelError:
        known = f"{len(class_names)} classes, 0 to {len(class_names) - 1}: {', '.join(class_names)}"
        return LabelError(f"{what}; bundle {name!r} has {known}")

    if labels is None:
        raise refused("give labels, one per image")
    if isinstance(labels, (numbers.Number, str)):
        labels = [labels]
    ids = []
    for label in np.atleast_1d(np.asarray(labels, object)).tolist():
        is_id = isinstance(label, numbers.Integral) and not isinstance(label, bool)
        if isinstance(label, str) and label in class_names:
            ids.append(class_names.index(label))
        elif is_id and 0 <= label < len(class_names):
            ids.append(int(label))
        else:
            raise refused(f"got label {label!r}")
    if not ids:
        raise refused("give one label or more")
    return np.repeat(np.array(ids, np.int64), count or 1)


def image_seeds(seed, count: int) -> Seeds:
    """(seed, index) of each of `count` images: of one seed, of a seed each, or as given."""
    given = [(seed, i) for i in range(count)] if isinstance(seed, numbers.Integral) else seed
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


def drawn_noise(seeds: Seeds, shape: Sequence[int], draw: int, num_threads: int | None) -> np.ndarray:
    """The noise of images, float32 (len(seeds), *shape); see `philox_normal`."""
    how = {"draw": draw, "num_threads": num_threads}
    if len({s for s, _ in seeds}) == 1:
        return philox_normal(seeds[0][0], [i for _, i in seeds], shape, **how)
    return np.concatenate([philox_normal(s, [i], shape, **how) for s, i in seeds])


def checked_floats(what: str, given, shape: Sequence[int], count: int | None = None) -> np.ndarray:
    """Noise or latents that a caller gives, as float32 (`count`, *shape), all of it finite.

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


def start_and_mask(
    image, mask, count: int, spec: LatentSpec, name: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Latents (B, C, H, W) of a given image, and bool (B, 1, H, W) of a mask; None for what is not given."""
    if mask is not None and image is None:
        raise ShapeError("a mask says what to draw into an image; give the image too")
    if image is None:
        return None, None
    start = _for_every_image("image", encode(image, spec, name), count)
    if mask is None:
        return start, None
    height, width = spec.shape[-2:]
    return start, _for_every_image("mask", drawn_mask(mask, (height, width)), count)


def asked_temperature(spec: ScheduleSpec, temperature, nfe: int) -> float:
    """The bundle's temperature for None; see `Generator`."""
    if temperature is not None:
        check_temperature(temperature)
        spec = replace(spec, temperature=temperature)
    return float(spec.temperature_of(nfe))


def check_whole(name: str, value, least: int) -> None:
    """ScheduleError unless the setting is a whole number of `least` or more, or None."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if value is not None and not (whole and value >= least):
        raise ScheduleError(f"{name} is a whole number, {least} or more; got {value!r}")


def check_watchers(callback, callback_every, cancel) -> None:
    """ScheduleError for what cannot watch a call; see `Generator`."""
    if callback is not None and not callable(callback):
        raise ScheduleError(f"callback is a function that takes a Progress; got {callback!r}")
    check_whole("callback_every", callback_every, 1)
    if callback_every is not None and callback is None:
        raise ScheduleError("callback_every says when to tell a callback; give the callback too")
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise ScheduleError(f"cancel is a threading.Event, or what has its is_set(); got {cancel!r}")


def asked_schedule(spec: ScheduleSpec, nfe, substeps, h) -> Schedule:
    """The bundle's schedule with what is not None instead of its own."""
    try:
        return _kept_schedule(spec, nfe, substeps, h)
    except TypeError:  # a list cannot be looked up; what it says is for Schedule to judge
        return _kept_schedule.__wrapped__(spec, nfe, substeps, h)


@lru_cache(maxsize=64, typed=True)
def _kept_schedule(spec, nfe, substeps, h):
    changes = {"nfe": nfe, "total_substeps": substeps, "h": h}
    return spec.schedule(**{name: value for name, value in changes.items() if value is not None})


def start_level(image, strength, mask, resamples: int, schedule: Schedule) -> float:
    """The noise level to start at, in (0, 1]; see `Generator`."""
    if image is None and strength is not None:
        raise ScheduleError("strength says at which noise level to start from an image; give the image too")
    if image is not None and strength is None and mask is None:
        raise ScheduleError(
            "to start from an image, give the strength: the noise level to start at, above 0 and up to 1, where "
            "nothing is left of it"
        )
    if resamples and mask is None:
        raise ScheduleError("resamples are for inpainting; give a mask, or leave them out")
    strength = 1.0 if strength is None else strength
    if not (isinstance(strength, numbers.Real) and 0 < strength <= 1):
        raise ScheduleError(f"strength lies above 0 and up to 1; got {strength!r}")
    if mask is not None and strength == 1 and schedule.nfe == 1:
        raise ScheduleError(
            "with one call at noise level 1 the student sees nothing of what a mask keeps; give nfe of 2 or more, or a "
            "strength below 1"
        )
    return float(strength)


def _for_every_image(what: str, array: np.ndarray, count: int) -> np.ndarray:
    """`array` (B, ...) with B = `count`, or one that all images share."""
    if len(array) not in (1, count):
        raise ShapeError(f"give one {what} for all images, or one for each of {count}; got {len(array)}")
    return np.broadcast_to(array, (count, *array.shape[1:]))
