"""How much memory an image takes that is recorded as a CUDA graph, told from the manifest alone."""

import math
from typing import NamedTuple

import numpy as np

from piflow_edge.bundle.manifest import Manifest

# Graphs that a generator keeps, those used longest ago go first: each has its own memory for states and images.
MOST_GRAPHS = 4


class RecordedMemory(NamedTuple):
    """Bytes. `device`: on the GPU, besides the engines' own. `pinned`: of the host, where the GPU reads and writes."""

    device: int
    pinned: int


def estimate_recorded_memory(manifest: Manifest, batch: int = 1) -> RecordedMemory | None:
    """Return what one recorded call for so many images takes, made as pictures and with the bundle's own settings.

    Every array has its place for good: what is computed in between is not given back. None where there are no pictures,
    or for a policy without a kernel, whose substeps are computed array by array.
    """
    if manifest.image_shape is None or not _has_kernel(manifest):
        return None
    state, image = (4 * batch * math.prod(shape) for shape in (manifest.latent.shape, manifest.image_shape))
    steers = sum(array.nbytes for array in manifest.conditioner.example(batch).values())
    # From floats to bytes: moved, scaled, cut off twice, rounded, turned; then a byte each.
    pixels = 6 * image + image // 4
    finite, sums = 0, 0
    if manifest.decoder is not None:
        channels, _, width = manifest.image_shape
        finite, sums = image + 4 * batch * channels * (width + 1), 4 * batch * channels
    device = state + steers + manifest.schedule.nfe * state + _restored(manifest, state) + finite + pixels
    return RecordedMemory(device, state + steers + state + image // 4 + sums)


def _restored(manifest: Manifest, state: int) -> int:
    """Bytes of what `LatentSpec.restore` makes in between."""
    latent = manifest.latent
    if latent.is_plain:
        return 0
    return state * (2 + 2 * bool(latent.mean) + (latent.packing > 1))


def _has_kernel(manifest: Manifest) -> bool:
    """Whether a kernel integrates the bundle's policy: asked of one that says nothing, at a single position."""
    pixel = (manifest.latent.shape[0], *(1 for _ in manifest.latent.shape[1:]))
    shapes = manifest.policy.output_shapes(pixel)
    names = manifest.policy.outputs
    nothing = np.zeros((), np.float32)  # however large a manifest says an output is, it takes no memory
    outputs = {name: np.broadcast_to(nothing, (1, *shape)) for name, shape in zip(names, shapes, strict=True)}
    return manifest.policy.policy(outputs, np.zeros((1, *pixel), np.float32), 1.0).for_kernel() is not None
