"""A policy's rollout as an ONNX function: many substeps on a mixture, one weighted sum on a DX grid.

The kind of the policy says what it computes (`PolicyKind.write_rollout`). Time is worked out before, in float64; the
graph is handed float32 tables of it and computes in float32, of which every execution provider is capable. Functions
belong in a model's `functions`; `inline` turns their calls into plain nodes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxscript
from onnx.inliner import inline_local_functions
from onnxscript import ir

from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.policies import PolicySpec

DOMAIN = "piflow_edge"
ROLLOUT = "Rollout"


class RolloutOps:
    """Writes nodes: every operator of onnxscript's builder, and loops.

    Constants are given as Python numbers and lists. Values must be float32 where a number stands beside them.
    """

    def __init__(self, op: onnxscript.OpBuilder):
        self._op = op

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        return getattr(self._op, operator)

    def scan(self, body: Callable[..., Any], state: Any, *rows: Any) -> Any:
        """Carry `state` through `body(op, state, *row) -> state`, once for each row of `rows`, and return the last.

        `body` may use values from outside; all are float32.
        """
        builder = self._op.builder
        names = ["state", *(f"row_{i}" for i in range(len(rows)))]
        builder.push_module("substep")  # names inside a loop must not be those outside
        graph = builder.subgraph(
            lambda op, *values: body(RolloutOps(op), *values),
            inputs=[_float32(f"substep.{name}") for name in names],
            outputs=[_float32("substep.next")],
            name="substep",
        )
        builder.pop_module()
        return self._op.Scan(state, *rows, body=graph, num_scan_inputs=len(rows))


def build_rollout(kind: PolicySpec, tables: Mapping[str, np.ndarray]) -> onnx.FunctionProto:
    """Return the function `Rollout`: the state at the end of a segment that begins at its policy's source.

    Its inputs are the network's outputs, the state, and one row of each of the tables.

    Args:
        kind: of the policy.
        tables: from `kind.rollout_tables`; their types count, not their values.
    """

    def write(op: onnxscript.OpBuilder, *values: ir.Value) -> Any:
        outputs = dict(zip(kind.outputs, values, strict=False))
        x_src, *rows = values[len(kind.outputs) :]
        return kind.write_rollout(RolloutOps(op), outputs, x_src, dict(zip(tables, rows, strict=True)))

    inputs = [_float32(name) for name in (*kind.outputs, "x_src")]
    inputs += [_value(name, ir.DataType.from_numpy(table.dtype)) for name, table in tables.items()]
    function = onnxscript.build_function(
        write, inputs, domain=DOMAIN, name=ROLLOUT, opset_imports={"": OPSET}
    )
    for node in ir.traversal.RecursiveGraphIterator(function):
        node.name = None
        node.metadata_props.clear()  # the builder's notes on where a node was written, three times its size
    return ir.to_proto(function)


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without functions of its own, for runtimes that know none; checked."""
    # Of ONNX Runtime's own operators too, such as products of weights in four bits.
    known = {entry.domain for entry in model.opset_import}
    others = {entry.domain: entry for function in model.functions for entry in function.opset_import}
    model.opset_import.extend(entry for domain, entry in others.items() if domain not in known)
    model = inline_local_functions(model)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


def _float32(name: str) -> ir.Value:
    return _value(name, ir.DataType.FLOAT)


def _value(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype))
