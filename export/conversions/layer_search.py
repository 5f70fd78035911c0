"""Which layers a conversion must leave in float32, found by trying: as few as will do."""

import logging
from collections.abc import Callable, Sequence

from piflow_edge.engines import Graph
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.conversions.calibration import Conversion

log = logging.getLogger(__name__)


def convert_within(
    name: str,
    layers: Sequence[str],
    convert: Callable[[Sequence[str]], Graph],
    accepts: Callable[[Graph], float],
) -> Conversion:
    """Convert all layers of a graph; should that be too far off, leave those that cost most in float32.

    Args:
        name: of the precision, for messages.
        layers: that can be converted.
        convert: the layers to leave out -> the graph without them converted.
        accepts: how far a graph is off, in units of what is allowed: 1 or less will do.

    Raises:
        CheckFailedError: even one converted layer is too much.
    """
    result = convert([])
    off = accepts(result)
    if off <= 1:
        return Conversion(result)
    log.info("%s is off by %.2f times what is allowed; measuring %d layers", name, off, len(layers))
    alone = {layer: accepts(convert([other for other in layers if other != layer])) for layer in layers}
    worst_first = sorted(layers, key=lambda layer: alone[layer], reverse=True)
    # By halves: `result` leaves out `enough` layers, and one fewer than `too_few` + 1 would not do.
    too_few, enough, result = 0, len(layers), None
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        tried = convert(worst_first[:count])
        if accepts(tried) <= 1:
            enough, result = count, tried
        else:
            too_few = count
    if result is None:
        raise CheckFailedError(
            f"no layer of the network can be quantised within tolerance: alone, {worst_first[-1]} costs "
            f"{alone[worst_first[-1]]:.2f} times what is allowed; export without {name}, or train it longer"
        )
    left_out = worst_first[:enough]
    return Conversion(
        result, {layer: f"alone costs {alone[layer]:.2f} of what is allowed" for layer in left_out}
    )
