"""Conditioning: what steers a batch of images, as the arrays that the network takes for it.

A mapping from the name of a network's input to an array (B, ...), of NumPy or of torch. Empty where nothing steers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from piflow_edge.arrays import SameArray, array_namespace
from piflow_edge.errors import ShapeError

Conditioning = Mapping[str, SameArray]


def take(conditioning: Conditioning, indices: Any) -> dict[str, SameArray]:
    """Return the conditioning of some of the images. `indices`: a slice, or whole numbers in an array."""
    return {name: array[indices] for name, array in conditioning.items()}


def count_of(conditioning: Conditioning, default: int | None = None) -> int | None:
    """Return how many images it steers; `default` for an empty conditioning, which does not know."""
    counts = {name: len(array) for name, array in conditioning.items()}
    if len(set(counts.values())) > 1:
        listing = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise ShapeError(f"every input must hold one entry per image; they hold: {listing}")
    return next(iter(counts.values()), default)


def concatenate(parts: Sequence[Conditioning]) -> dict[str, SameArray]:
    """Join the conditioning of several batches, which have the same inputs and differ in no axis but the first."""
    first, *others = parts
    if not others:
        return dict(first)
    joined = {}
    for name in first:
        arrays = [part[name] for part in parts]
        if len({tuple(array.shape[1:]) for array in arrays}) > 1:
            shapes = " and ".join(str(tuple(array.shape)) for array in arrays)
            raise ShapeError(
                f"{name!r} differs in more than the batch: {shapes}; call the network once for each"
            )
        joined[name] = array_namespace(*arrays).concat(arrays)
    return joined
