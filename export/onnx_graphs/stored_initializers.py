"""Weights that a module leaves in its files, taken out of the graph that torch makes of it."""

import onnx_ir as ir
from torch import nn

from piflow_edge.distill.stored_weights import StoredWeight, find_stored
from piflow_edge.export.onnx_graphs.weight_files import STORED, WeightsOnDemand

_FLOAT_BYTES = 4


def take_out_weights(model, module: nn.Module) -> WeightsOnDemand:
    """Let a graph read its module's stored weights from a file; return what would be in it.

    A product reads its weight transposed. That is done when the weight is read, not now as the exporter would.

    Args:
        model: `onnx_ir.Model` of the module, not optimised; it is changed.
        module: what was traced.
    """
    weights = WeightsOnDemand()
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored, value = find_stored(parameter), model.graph.initializers.get(name)
        if stored is None or value is None:
            continue
        for node in [use.node for use in value.uses() if _is_transposing(use.node)]:
            _replace_node(
                model.graph, node, _make_initializer(node.outputs[0].name, stored, weights, turned=True)
            )
        if value.uses():
            value.const_value = _make_tensor(name, stored, weights, turned=False)
        else:
            del model.graph.initializers[name]
    return weights


def _is_transposing(node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]


def _replace_node(graph, node, initializer) -> None:
    (old,) = node.outputs
    ir.convenience.replace_all_uses_with(old, initializer)
    old.name = None
    graph.remove(node, safe=True)
    graph.register_initializer(initializer)


def _make_initializer(name: str, stored: StoredWeight, weights: WeightsOnDemand, *, turned: bool):
    tensor = _make_tensor(name, stored, weights, turned=turned)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def _make_tensor(name: str, stored: StoredWeight, weights: WeightsOnDemand, *, turned: bool):
    def make():
        wide = stored.widen()
        return (wide.T if turned else wide).contiguous().numpy()

    shape = tuple(stored.tensor.shape)
    length = _FLOAT_BYTES * stored.tensor.numel()
    return ir.ExternalTensor(
        STORED, weights.append(length, make), length, ir.DataType.FLOAT,
        shape=ir.Shape(shape[::-1] if turned else shape), name=name,
    )  # fmt: skip
