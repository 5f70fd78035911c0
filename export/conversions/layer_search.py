"""Which layers a conversion must leave in float32, found by trying: as few as will do."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence

import onnx

from piflow_edge.bundle.manifest import STUDENT
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.engines import Graph
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.conversions.layer_errors import measure_layers, report_layers
from piflow_edge.export.conversions.weights_of_layers import quantisable
from piflow_edge.export.onnx_graphs.large import count_bytes, drop_weights, is_on_demand

log = logging.getLogger(__name__)

# Share of the tolerances that may be used on the calibration images. The largest error of the golden images, which are
# others, was up to 1.6 times as large on the digits.
_SHARE = 0.5
# Blocks that are alike, at least, in a network of blocks; and the share of the weights that may lie outside of them.
_FEWEST_BLOCKS, _MOST_SINGLE = 4, 0.1


def convert_layers(
    name: str,
    network: str,
    graph: Graph,
    calibration: Calibration,
    convert: Callable[[Sequence[str]], Graph],
) -> Conversion:
    """Convert the matrix products of a network, but for those that cost too much, and report each layer's error.

    Args:
        name: of the precision.
        network, graph, calibration: as of every conversion.
        convert: the layers to leave out -> the graph with the others converted.

    Raises:
        CheckFailedError: even one converted layer is too much.
    """
    layers, batches = quantisable(onnx.load_from_string(graph.model)), calibration.inputs_of(network)
    tolerances = PRECISIONS[name].tolerances
    if is_on_demand(graph):
        allowed = tolerances.outputs if network == STUDENT else tolerances.encodings
        return _convert_by_layer(name, graph, layers, convert, batches, allowed * _SHARE)

    def accepts(converted: Graph) -> float:
        return calibration.share(converted, tolerances, network, graph) / _SHARE

    return report_layers(convert_within(name, layers, convert, accepts), graph, batches)


def _convert_by_layer(name, graph, layers, convert, batches, allowed: float) -> Conversion:
    """The conversion of a network that memory may not hold, and that takes too long to be tried without each layer.

    Left out are those that stand alone, such as embeddings and output layers, whose errors no others make up for,
    and those that are off by more than `allowed` by themselves. `verify` looks at the whole.
    """
    left_out = dict.fromkeys(_find_single(graph, layers), "it stands alone")
    converted = convert(list(left_out))
    errors = {
        layer: e for layer, e in measure_layers(graph, converted, batches).items() if layer not in left_out
    }
    far_off = {
        layer: f"off by {error:.2g} by itself" for layer, error in errors.items() if not error <= allowed
    }
    log.info("%s: %d of %d layers are off by more than %.2g", name, len(far_off), len(errors), allowed)
    if errors.keys() == far_off.keys():
        raise CheckFailedError(
            "no layer of the network can be quantised within tolerance: by itself each is off by more than "
            f"{allowed:.2g} of its output; export without {name}"
        )
    if far_off:
        drop_weights(converted)
        left_out |= far_off
        converted = convert(list(left_out))
    return Conversion(converted, left_out, {layer: e for layer, e in errors.items() if layer not in far_off})


def _find_single(graph: Graph, layers: Sequence[str]) -> list[str]:
    """Layers that are not one of several in blocks alike, by their names; none where these hold many of the weights."""
    kinds = {layer: re.sub(r"\d+", "*", layer) for layer in layers}
    counts = Counter(kinds.values())
    single = [layer for layer, kind in kinds.items() if counts[kind] < _FEWEST_BLOCKS]
    model = onnx.load_from_string(graph.model)
    sizes = {tensor.name: count_bytes(tensor) for tensor in model.graph.initializer}
    held = {node.name: sizes[node.input[1]] for node in model.graph.node if node.name in kinds}
    share = sum(held[layer] for layer in single) / sum(held.values())
    return single if share <= _MOST_SINGLE else []


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
