"""Which of ONNX Runtime's providers runs how many nodes: one that takes none leaves all to the CPU, in silence."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
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


@contextmanager
def watched(ort, settings, batch: int = 1) -> Iterator[Callable[[Any], Counter]]:
    """Counts the nodes of each provider, of a session that is opened with `settings` meanwhile.

    From 1.24 on ONNX Runtime tells. Before, its profile of a call does: the first, on zeros, which is made here. Its
    option `session.disable_cpu_ep_fallback` would not do: it also refuses shapes and sizes, which belong on the CPU.

    Args:
        ort: the onnxruntime module.
        settings: session options, which are added to.
        batch: samples in that call.

    Returns:
        As a context: session -> {provider: number of nodes}.
    """
    if hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        yield _told
        return
    import tempfile  # late: newer ones need none

    # Windows keeps the file of a session that could not be opened until the session is collected.
    with tempfile.TemporaryDirectory(prefix="piflow-edge-", ignore_cleanup_errors=True) as folder:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "nodes")
        yield lambda session: _profiled(session, batch)


def dtype_of(value) -> str:
    """NumPy's name of the number format of an input or output of a session, or of an array of ONNX Runtime's."""
    kind = value.type if hasattr(value, "type") else value.data_type()
    return _DTYPES[kind]


def _told(session) -> Counter:
    counts: Counter = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return counts


def _profiled(session, batch: int) -> Counter:
    zeros = {
        value.name: np.zeros(
            [size if isinstance(size, int) else batch for size in value.shape], dtype_of(value)
        )
        for value in session.get_inputs()
    }
    session.run(None, zeros)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # A node in a loop has several events.
    ran = {(event["name"], event["args"].get("provider")) for event in events if event.get("cat") == "Node"}
    return Counter(provider for _, provider in ran if provider)
