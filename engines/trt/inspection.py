"""What a builder made of a network: in which precision its layers compute, told by TensorRT's own inspector."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from piflow_edge.engines import Graph
from piflow_edge.engines.onnx_file import Model, read_model
from piflow_edge.errors import EngineError

# Above this share of its weights in float32, an engine for half precision holds them in float32.
_MOST_OF_FLOAT32 = 0.65
# Below, kernels and tables outweigh the weights.
_LEAST_WEIGHTS = 4 << 20
_PRODUCTS = re.compile(r"gemm|mat_?mul|matrix_?multiply|conv|fully_?connected|fused_?mha", re.I)
_FORMATS = (
    ("bfloat16", re.compile(r"bf16|bfloat", re.I)),  # whose name holds the next one's
    ("float16", re.compile(r"fp16|half|float16", re.I)),
    ("float32", re.compile(r"fp32|float32|\bfloat\b", re.I)),
    ("int8", re.compile(r"\bint8\b", re.I)),
    ("float8", re.compile(r"fp8|float8", re.I)),
)
_HALF = {"float16", "bfloat16", "int8", "float8"}


@dataclass(frozen=True)
class Inspection:
    """An engine's layers.

    `layers`, `products`: number of layers by precision, of all and of the matrix products alone (convolutions too);
    empty where TensorRT does not tell. `engine_bytes`: its size. `float32_bytes`: what the network's weights take in
    float32. `quantised`: matrix products that the graph quantises.
    """

    layers: dict[str, int]
    products: dict[str, int]
    engine_bytes: int
    float32_bytes: int
    quantised: int = 0
    complaints: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for people."""
        total = sum(self.layers.values())
        shares = ", ".join(f"{count / total:.0%} {name}" for name, count in self.layers.items())
        size = f"{self.engine_bytes / 2**20:.1f} MiB"
        if self.float32_bytes:
            size += f", weights in float32 take {self.float32_bytes / 2**20:.1f}"
        return f"{size}; {total} layers: {shares or 'TensorRT does not tell their precision'}"


def inspect_engine(trt, engine, engine_bytes: int, graph: Graph, computes_in: str) -> Inspection:
    """Ask TensorRT's inspector about an engine built of `graph`, and say where its numbers are wider than that."""
    try:
        model = read_model(graph)
    except EngineError:  # no network of ours: judged by its layers alone
        model = None
    layers, products = _count(_layer_facts(trt, engine))
    weights = _float32_bytes(model) if model else 0
    quantised = _count_quantised(model) if model else 0
    found = Inspection(layers, products, engine_bytes, weights, quantised)
    found.complaints.extend(_find_complaints(found, computes_in))
    return found


def _find_complaints(found: Inspection, computes_in: str) -> list[str]:
    return list(_COMPLAINTS[computes_in](found)) if computes_in in _COMPLAINTS else []


def _complain_of_half(found: Inspection) -> Iterator[str]:
    share = found.engine_bytes / max(1, found.float32_bytes)
    if found.float32_bytes >= _LEAST_WEIGHTS and share > _MOST_OF_FLOAT32:
        yield (
            f"the engine is {found.engine_bytes / 2**20:.1f} MiB, {share:.0%} of what the weights take in float32; "
            f"in half precision it is about half: it computes mostly in float32"
        )
    products = sum(found.products.values())
    half = sum(count for name, count in found.products.items() if name in _HALF)
    if half < products / 2:
        yield f"{half} of {products} matrix products are in half precision: it is a float32 engine"


def _complain_of_int8(found: Inspection) -> Iterator[str]:
    products, narrow = sum(found.products.values()), found.products.get("int8", 0)
    if products and narrow < found.quantised / 2:
        yield f"{narrow} of {products} matrix products are in int8, and the network quantises {found.quantised}"


# Narrowest number format of a graph's matrix products -> what an engine of it has to answer for.
_COMPLAINTS = {"float16": _complain_of_half, "int8": _complain_of_int8}


def _layer_facts(trt, engine) -> list[dict]:
    try:
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        layers = json.loads(text)["Layers"]
    except (
        AttributeError,
        ValueError,
        KeyError,
        TypeError,
    ):  # a release that tells in another way, or nothing
        return []
    return [layer for layer in layers if isinstance(layer, dict)]  # else names alone


def _count(layers: list[dict]) -> tuple[dict[str, int], dict[str, int]]:
    every, products = Counter(), Counter()
    for layer in layers:
        kind = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"
        if "reformat" in kind.lower() or "constant" in kind.lower():
            continue
        writes, reads = (_format_of(layer.get(key) or []) for key in ("Outputs", "Inputs"))
        every[writes] += 1
        if _PRODUCTS.search(kind):  # by what it multiplies: it may write another type
            products[reads] += 1
    return dict(every), dict(products)


def _format_of(tensors: list[dict]) -> str:
    text = str(tensors[0].get("Format/Datatype", "")) if tensors else ""
    return next((name for name, pattern in _FORMATS if pattern.search(text)), "other")


def _float32_bytes(model: Model) -> int:
    floats = (tensor for tensor in model.graph.constants.values() if tensor.dtype.kind == "f")
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) * 4 for tensor in floats)


def _count_quantised(model: Model) -> int:
    dequantised = {
        name for node in model.graph.nodes if node.operator == "DequantizeLinear" for name in node.outputs
    }
    products = [
        node for node in model.graph.nodes if node.operator in ("MatMul", "Gemm", "Conv", "ConvTranspose")
    ]
    return sum(all(name in dequantised for name in node.inputs[:2]) for node in products)
