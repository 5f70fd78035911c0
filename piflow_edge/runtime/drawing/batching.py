"""Many samples in as many calls of an engine as they take."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from piflow_edge.engines import OpenNetwork


def cut_batches(count: int, size: int, engine: OpenNetwork) -> Iterator[slice]:
    """Cuts for as few calls of up to `size` samples as the engine allows, all of about one size: of 10 for an engine of
    4 to 8 it takes 5 and 5, where 8 would leave 2."""
    most = max(engine.min_batch, min(size, engine.max_batch or size))
    if count <= most:
        return iter((slice(0, count),))
    calls = max(1, -(-count // most))
    starts = (-(-count * call // calls) for call in range(calls + 1))
    return (slice(start, stop) for start, stop in pairwise(starts))


def join_arrays(arrays: list[np.ndarray]) -> np.ndarray:
    """Them as one; one alone is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
