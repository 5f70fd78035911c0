"""How much memory a bundle takes on a CPU at its highest, told before a network is opened."""

import logging
import math
from dataclasses import dataclass

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import STUDENT, sampler_calls
from piflow_edge.system.hardware import free_memory, nvidia_gpus

log = logging.getLogger(__name__)

# What ONNX Runtime 1.32 on a CPU takes for a weight while a network is opened, and from then on, as multiples of its
# size in the file, by the bits of one value. float32 is laid out anew for its products, half precision is widened to
# float32. Fitted to DiTs of 39 to 675 million weights in five precisions (Linux x86-64, `benchmarks/memory_needs.py`).
_OPENING = {16: 3.5, 8: 2.6}
_OPEN = {16: 2.2, 8: 2.2}
_OPENING_WIDE, _OPEN_WIDE = 1.45, 1.25
# Of weights that lie in a file beside the model, at both times: it is mapped, and nothing of it is read twice. With all
# networks open that file is held as bytes besides.
_BESIDE, _BESIDE_WIDE = {16: 2.7, 8: 2.0}, 1.15
# Of a bundle's size: its weights take no more than that.
_MOST_TIMES = 4
# Python with NumPy and ONNX Runtime.
_PROCESS = 80e6
# What the C library's allocator has for values that come and go, beside what they take: so many times that, up to
# this. (Values of 32 MB and more have pages of their own, and all that are not small, until it freed a large one: a
# model with its weights inside.)
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
    alive, is_whole = _live_bytes(bundle)
    opened, highest, highest_alone, values = _PROCESS, _PROCESS, _PROCESS, [0.0]
    for name in bundle.manifest.networks:
        if sampler_calls(name) is None:
            with bundle.view_network(name, precision) as files:
                weights, lent = files.outline.weight_bytes, sum(map(len, files.weights.values()))
            times = (
                [(_BESIDE, _BESIDE_WIDE)] * 2 if lent else [(_OPENING, _OPENING_WIDE), (_OPEN, _OPEN_WIDE)]
            )
            opening, stays = (
                sum(by_bits.get(bits, other) * size for bits, size in weights.items())
                for by_bits, other in times
            )
            live = alive.get(name, 0)
            values.append(live if lent else live + min(_LOOSE * live, _MOST_LOOSE))
            highest = max(highest, opened + lent + opening)
            highest_alone = max(highest_alone, _PROCESS + max(opening, stays + values[-1]))
            opened += lent + stays
    highest = max(highest, opened + max(values))
    return MemoryNeeds(round(highest), round(highest_alone), is_whole)


def advise(bundle: Bundle, free: int) -> str | None:
    """Return the options of a command with which a bundle fits into so many bytes: the least change that will do."""
    precisions = bundle.manifest.precisions
    for name in precisions:
        needs, chosen = estimate_memory(bundle, name), f" --precision {name}" if name != precisions[0] else ""
        for needed, keep in ((needs.all, ""), (needs.one, " --keep one")):
            if needed <= free:
                return f"{chosen}{keep}".strip()
    return None


def is_short_of_memory(engine: str, device: str | None, needed: int, free: int) -> bool:
    """Whether an engine is on the CPU, as far as is known before it is chosen, and does not fit."""
    on_cpu = engine == "ort-cpu" or (engine == "auto" and device in (None, "cpu"))
    return on_cpu and needed > free and (engine != "auto" or device == "cpu" or not nvidia_gpus())


def warn_of_little_memory(
    bundle: Bundle, precision: str | None, keep: str, engine: str, device: str | None
) -> None:
    """Log a warning where opening a bundle takes more than is free; arguments as of `load`."""
    free, size = free_memory(), sum(spec.size for spec in bundle.manifest.files.values())
    values = max(_live_bytes(bundle)[0].values(), default=0)
    if free is None or _MOST_TIMES * size + values + 2 * (_PROCESS + _MOST_LOOSE) < free:
        return  # without a look at the files
    needs = estimate_memory(bundle, precision)
    needed = needs.one if keep == "one" else needs.all
    if is_short_of_memory(engine, device, needed, free):
        advice = advise(bundle, free)
        log.warning(
            "bundle %r takes about %.1f GB on a CPU, and %.1f GB are free here%s",
            bundle.name, needed / 1e9, free / 1e9, f"; it fits with {advice}" if advice else "",
        )  # fmt: skip


def _live_bytes(bundle: Bundle) -> tuple[dict[str, int], bool]:
    """What the values of each network take, and whether the export counted that; else what the student gives.

    Provenance is free text to the runtime, and a bundle may be anybody's.
    """
    manifest, said = bundle.manifest, bundle.manifest.provenance.get("live_bytes")
    names = [name for name in manifest.networks if sampler_calls(name) is None]
    if isinstance(said, dict) and all(
        type(n := said.get(name)) is int and 0 <= n < 1 << 48 for name in names
    ):
        return {name: said[name] for name in names}, True
    return {
        STUDENT: 4 * sum(map(math.prod, manifest.policy.output_shapes(tuple(manifest.latent.shape))))
    }, False
