"""Which of ONNX Runtime's providers runs how many nodes: one that takes none leaves all to the CPU, in silence."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
}
# Nearly all the work of a network: one of them on the CPU costs more than the device saves, and two copies.
_PRODUCTS = (
    "MatMul", "Gemm", "Conv", "ConvTranspose", "FusedMatMul", "FusedGemm", "FusedConv", "Attention",
    "MultiHeadAttention", "MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "MatMulNBits",
)  # fmt: skip


class Placement(Counter):
    """Provider -> number of nodes that it runs. `products`: the same of matrix products and convolutions alone.

    A provider that compiles may count what it compiled as one node, of which nobody knows the operators.
    """

    def __init__(self, nodes: Iterable[tuple[str, str]] = ()):
        """Count nodes, each given as provider and operator."""
        nodes = list(nodes)
        super().__init__(provider for provider, _ in nodes)
        self.products = Counter(provider for provider, kind in nodes if kind in _PRODUCTS)

    def describe_rest(self, provider: str) -> str | None:
        """Return what other providers run that should not; None if that is shapes, sizes and other small work."""
        nodes, products = sum(self.values()), sum(self.products.values())
        left = products - self.products[provider]
        if left:
            return f"{left} of {products} matrix products and {nodes - self[provider]} of {nodes} nodes"
        # Without a product elsewhere; but so many nodes are more than the sizes of a batch.
        if self[provider] and self.products[provider] and nodes - self[provider] > nodes / 2:
            return f"{nodes - self[provider]} of {nodes} nodes"
        return None


@contextmanager
def watch_placement(
    ort, settings, batch: int = 1, run_options: Any = None
) -> Iterator[Callable[[Any], Placement]]:
    """Counts the nodes of each provider, of a session that is opened with `settings` meanwhile.

    From 1.24 on ONNX Runtime tells. Before, its profile of a call does: the first, on zeros, which is made here. Its
    option `session.disable_cpu_ep_fallback` would not do: it also refuses shapes and sizes, which belong on the CPU.

    Args:
        ort: the onnxruntime module.
        settings: session options, which are added to.
        batch: samples in that call.
        run_options: of that call.

    Returns:
        As a context: session -> its `Placement`.
    """
    if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        yield _read_placement
        return
    import tempfile  # late: newer ones need none

    # Windows keeps the file of a session that could not be opened until the session is collected.
    with tempfile.TemporaryDirectory(prefix="piflow-edge-", ignore_cleanup_errors=True) as folder:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "nodes")
        yield lambda session: _read_profile(session, batch, run_options)


def dtype_of(value) -> str:
    """NumPy's name of the number format of an input or output of a session, or of an array of ONNX Runtime's."""
    kind = value.type if hasattr(value, "type") else value.data_type()
    return _DTYPES[kind]


def _read_placement(session) -> Placement:
    parts = session.get_provider_graph_assignment_info()
    return Placement((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def _read_profile(session, batch: int, run_options: Any) -> Placement:
    zeros = {
        value.name: np.zeros(
            [size if isinstance(size, int) else batch for size in value.shape], dtype_of(value)
        )
        for value in session.get_inputs()
    }
    session.run(None, zeros, run_options)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # A node in a loop has several events.
    ran = {
        (event["name"], event["args"].get("provider"), event["args"].get("op_name", ""))
        for event in events
        if event.get("cat") == "Node"
    }
    return Placement((provider, kind) for _, provider, kind in ran if provider)
