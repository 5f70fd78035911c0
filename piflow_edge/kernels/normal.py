"""Which kernel makes the starting noise: the compiled one where it is there, or NumPy; the same numbers from both."""

import math
from collections.abc import Sequence

import numpy as np

from piflow_edge import noise
from piflow_edge.errors import EngineError
from piflow_edge.noise import check_streams

from . import cpu


def philox_normal(
    seed: int,
    indices: Sequence[int],
    shape: Sequence[int],
    *,
    draw: int = 0,
    kernel: str = "auto",
    num_threads: int | None = None,
) -> np.ndarray:
    """Standard normal noise for the images `indices` of a seed, the same on every machine and in any batch.

    Args:
        seed: 0 up to 2^64 - 1.
        indices: image numbers, each 0 up to 2^64 - 1.
        shape: shape of one image's noise, for example (C, H, W).
        draw: 0 for the starting noise, i for the re-noising after the i-th student call; below 2^32.
        kernel: "reference" is NumPy, "cpu" is compiled, "auto" the second where it is there.
        num_threads: threads of the compiled kernel, at most; else one for each core this process may use.

    Returns:
        float32, (len(indices), *shape).

    Raises:
        ShapeError: a seed, index or draw outside its range.
        EngineError: no such kernel, or it is not in this installation.
    """
    index = check_streams(seed, indices, draw)
    if kernel not in ("auto", "reference", "cpu"):
        raise EngineError(f"kernel is auto, reference or cpu; got {kernel!r}")
    if kernel == "cpu" and (reason := cpu.missing()) is not None:
        raise EngineError(f"kernel 'cpu' cannot run: {reason}")
    if kernel == "auto" and (reason := cpu.missing()) is not None:
        cpu.warn_once(reason)
        kernel = "reference"
    if kernel == "reference":
        return noise.philox_normal(seed, indices, shape, draw=draw)
    flat = cpu.normal(int(seed), index, math.prod(shape), int(draw), num_threads=num_threads)
    return flat.reshape(len(index), *shape)
