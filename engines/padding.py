"""Calls of fewer samples than an engine was built for: the last one is repeated, and what comes of it dropped."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from piflow_edge.kernels.device_arrays import is_on_gpu

Arrays = dict[str, Any]


def run_padded(
    run: Callable[[Arrays], Arrays], inputs: Arrays, axes: Mapping[str, int], least: int
) -> Arrays:
    """What `run` makes of `inputs`, of which it takes `least` samples or more.

    A sample's results do not depend on the others of its call, so that they are those of a larger batch.

    Args:
        run: one network call. Outputs have the batch first.
        inputs: NumPy arrays, or arrays in a GPU's memory, which are copied there.
        axes: of those inputs that have a batch, where it is.
        least: samples that `run` takes.
    """
    given = {name: axis for name, axis in axes.items() if name in inputs}
    count = min((inputs[name].shape[axis] for name, axis in given.items()), default=least)
    # A call of none, or without one of its inputs, is the engine's to refuse.
    if given != axes or not 0 < count < least:
        return run(inputs)
    grown = {name: _grown(name, array, axes[name], least - count) if name in axes else array
             for name, array in inputs.items()}  # fmt: skip
    return {name: value[:count] for name, value in run(grown).items()}


def _grown(name: str, array: Any, axis: int, missing: int) -> Any:
    if is_on_gpu(array):
        from piflow_edge.kernels import gpu_arrays  # there is a GPU, or no input could lie on one

        return gpu_arrays.with_last_repeated(name, array, axis, missing)
    widths = [(0, missing if place == axis else 0) for place in range(np.ndim(array))]
    return np.pad(array, widths, mode="edge")
