"""How much memory a bundle takes on a CPU at its highest, told before a network is opened."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import STUDENT, sampler_calls
from piflow_edge.system.hardware import host_memory

log = logging.getLogger(__name__)

# What ONNX Runtime 1.32 on a CPU takes for a weight while a network is opened, and from then on, as multiples of its
# size in the file, by the bits of one value. float32 is laid out anew for its products, half precision is widened to
# float32. Fitted to DiTs of 39 to 675 million weights in five precisions (Linux x86-64, `benchmarks/memory_needs.py`).
_OPENING = {16: 3.5, 8: 2.6}
_OPEN = {16: 2.2, 8: 2.2}
_OPENING_WIDE, _OPEN_WIDE = 1.45, 1.25
# Weights in float32 that lie in a file beside the model: one copy. With all networks open, that file is held besides.
_BESIDE = 1.1
# Of a bundle's size: it takes no more than that.
_MOST_TIMES = 4
# Python with NumPy and ONNX Runtime.
_PROCESS = 80e6
# What the C library's allocator has for values that come and go, beside what they take: so many times that, up to
# this. (Values of 32 MB and more have pages of their own.)
_LOOSE, _MOST_LOOSE = 20, 100e6


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes at the highest, about. `all`: with all networks open. `one`: with one at a time (`keep="one"`).

    `is_whole`: the bundle says what its networks' values take; else only those that they give are counted.
    """

    all: int
    one: int
    is_whole: bool


def estimate_memory(bundle: Bundle, precision: str | None = None) -> MemoryNeeds:
    """Estimate what drawing one image of the usual size takes on a CPU, this process included.

    Args:
        bundle: an opened bundle.
        precision: one of the bundle's; None is its first.

    Raises:
        BundleError: the bundle has no such precision, or a file was altered.
    """
    said = dict(_live_bytes(bundle))
    given = sum(map(math.prod, bundle.manifest.policy.output_shapes(tuple(bundle.manifest.latent.shape))))
    alive = said or {STUDENT: 4 * given}
    opened, highest, highest_alone = _PROCESS, _PROCESS, _PROCESS
    for name in bundle.manifest.networks:
        if sampler_calls(name) is None:
            with bundle.view_network(name, precision) as files:
                weights, lent = files.outline.weight_bytes, sum(map(len, files.weights.values()))
            wide = (_BESIDE, _BESIDE) if lent else (_OPENING_WIDE, _OPEN_WIDE)
            opening, stays = (
                sum(times.get(bits, other) * size for bits, size in weights.items())
                for times, other in zip((_OPENING, _OPEN), wide, strict=True)
            )
            highest = max(highest, opened + lent + opening)
            highest_alone = max(highest_alone, _PROCESS + max(opening, stays + _values(alive.get(name, 0))))
            opened += lent + stays
    highest = max(highest, opened + _values(max(alive.values())))
    return MemoryNeeds(round(highest), round(highest_alone), bool(said))


def warn_of_little_memory(bundle: Bundle, precision: str | None, keep: str) -> None:
    """Log a warning where opening a bundle takes more than is free. `keep`: as in `EngineOptions`."""
    free, _ = host_memory()
    size = sum(spec.size for spec in bundle.manifest.files.values())
    if (
        free is None or _MOST_TIMES * size + 2 * (_PROCESS + _MOST_LOOSE) < free
    ):  # not worth a look at the files
        return
    needs = estimate_memory(bundle, precision)
    if (needed := needs.one if keep == "one" else needs.all) <= free:
        return
    fits = keep != "one" and needs.one <= free
    log.warning(
        "bundle %r takes about %.1f GB on a CPU, and %.1f GB are free here: %s",
        bundle.name, needed / 1e9, free / 1e9,
        f"with keep='one' it takes {needs.one / 1e9:.1f} GB" if fits else "take a precision of fewer bits",
    )  # fmt: skip


def _values(live: int) -> float:
    """What the values of a network take while it runs, where `live` bytes of them are there at a time."""
    return live + min(_LOOSE * live, _MOST_LOOSE)


def _live_bytes(bundle: Bundle) -> Iterator[tuple[str, int]]:
    """What the export counted, by network. Provenance is free text to the runtime, and a bundle may be anybody's."""
    said = bundle.manifest.provenance.get("live_bytes")
    for name, size in said.items() if isinstance(said, dict) else ():
        if type(size) is int and 0 <= size < 1 << 48:
            yield name, size
