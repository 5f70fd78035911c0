"""Where a bundle's networks can be loaded, precision by precision, and why not elsewhere.

The answers come from what the makers of the runtimes publish, not from a try on the device: they speak of opset, typing
and operators, not of memory or speed. `verify` on the device is the proof. What no document says is "unverified", never
a yes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .folder import Bundle
from .manifest import sampler_calls
from .precisions import PRECISIONS, name_precisions_of_tensorrt

# Lowest release of ONNX Runtime that implements an opset; every release reads all opsets back to 7.
# Source: onnxruntime.ai/docs/reference/compatibility.html, "ONNX opset support", which ends at 1.20.
_ONNXRUNTIME = {17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18"}

_TENSORRT_LACKS = tuple(
    dict.fromkeys(name for precision in PRECISIONS.values() for name in precision.operators_tensorrt_lacks)
)

# GPUs by CUDA compute capability.
_XAVIER, _TURING, _ORIN, _AMPERE, _ADA, _THOR, _BLACKWELL = "7.2", "7.5", "8.7", "8.6", "8.9", "11.0", "12.0"
_NAMES = {
    _XAVIER: "Jetson Xavier",
    _TURING: "Turing (RTX 20)",
    _AMPERE: "Ampere (RTX 30)",
    _ORIN: "Jetson Orin",
    _ADA: "Ada (RTX 40)",
    _THOR: "Jetson Thor",
    _BLACKWELL: "Blackwell (RTX 50)",
}


@dataclass(frozen=True)
class Runtime:
    """A runtime that reads ONNX.

    `jetpacks`: those that bring it, or that it is made for. `gpus`: compute capabilities. `max_opset`: the highest its
    parser is stated to read. `strongly_typed`: it takes every precision from the graph and has no switch
    for fp16 or int8. `int8`: how it runs int8 graphs, "QDQ" or "weights only". `unverified`: what of this was not found
    in its maker's documents, or "".
    """

    name: str
    jetpacks: tuple[str, ...]
    gpus: tuple[str, ...]
    max_opset: int
    strongly_typed: bool
    int8: str
    unverified: str = ""


@dataclass(frozen=True)
class Answer:
    """Whether one precision loads on one runtime.

    `answer`: "yes" and "no" where documents say so, else "unverified". `reason`: what it takes, or why not. `gpus`: on
    which of the runtime's GPUs.
    """

    precision: str
    runtime: str
    jetpacks: tuple[str, ...]
    gpus: tuple[str, ...]
    answer: str
    reason: str


RUNTIMES = (
    # Opset: docs/operators.md of onnx-tensorrt, release/8.5-GA: "up to Opset 17". JetPack 5.1 packages TensorRT 8.5.2
    # and supports Orin and Xavier: developer.nvidia.com/embedded/jetpack-sdk-51. fp16 and int8 on 7.2 and 8.7: the
    # support matrix of TensorRT 8.4, whose successors repeat it.
    Runtime("TensorRT 8.5", ("5.1",), (_XAVIER, _ORIN), 17, False, "QDQ"),
    # Opset: docs/operators.md of onnx-tensorrt, 8.6: "up to Opset 17". In JetPack 6.0: pytorch/TensorRT#3049, and what
    # users list of devices with Jetson Linux 36.3 (8.6.2.3, CUDA 12.2); NVIDIA's own page was not at hand.
    Runtime(
        "TensorRT 8.6", ("6.0",), (_ORIN,), 17, False, "QDQ", "that JetPack 6.0 brings it; its users say so"
    ),
    # TensorRT 10.3 in JetPack 6.1 and 6.2: docs.pytorch.org/TensorRT, getting_started/jetpack. Opset: docs/operators.md
    # of onnx-tensorrt, 10.0: "opset 9 to opset 20"; that of 10.3 was not at hand, and a parser's range only grows.
    Runtime("TensorRT 10.3", ("6.1", "6.2"), (_ORIN,), 20, False, "QDQ"),
    # What users list of devices: 10.13 with JetPack 7.0 (Jetson Linux 38.2), 10.16.2 with 7.2 (39.2). Opset: that of
    # 10.0 and of 10.15, see there.
    Runtime(
        "TensorRT 10.13", ("7.0",), (_THOR,), 20, False, "QDQ", "that JetPack 7.0 brings it; its users say so"
    ),
    # Opset: docs/operators.md of onnx-tensorrt, 10.15: "opset 9 to opset 24". SM 7.0 and up since 10.0: support matrix
    # of 10.1, which ends at 9.0.
    Runtime("TensorRT 10.15", (), (_TURING, _AMPERE, _ADA, _BLACKWELL), 24, False, "QDQ", "the list of GPUs"),
    Runtime(
        "TensorRT 10.16",
        ("7.2",),
        (_ORIN, _THOR),
        24,
        False,
        "QDQ",
        "that JetPack 7.2 brings it; its users say so",
    ),
    # Opset: docs.nvidia.com/deeplearning/tensorrt, reference/onnx-opset-guide: 9 to 25. An example table of 11.2 says
    # 24, so the lower holds here. Only strong typing: "Migrating from TensorRT 10.x to 11.x". JetPack 7.2.2 or later on
    # AGX Orin and Thor since 11.4.1, no JetPack before: the migration guide's page on Jetson (11.4.1, api/migration).
    Runtime(
        "TensorRT 11",
        ("7.2.2",),
        (_ORIN, _THOR, _TURING, _AMPERE, _ADA, _BLACKWELL),
        24,
        True,
        "QDQ",
        "the list of GPUs",
    ),
    # Opset 9 to 22: docs.nvidia.com/deeplearning/tensorrt-rtx, onnx-conversion-deployment. GPUs, and int8 for weights
    # of matrix products on Ampere and later ("INT8 WoQ GEMM"): its support matrices 1.0 to 1.5. Only strong typing:
    # "Strongly Typed Networks and Explicit Quantization" in work-with-quantized-types.
    Runtime("TensorRT-RTX 1", (), (_TURING, _AMPERE, _ADA, _BLACKWELL), 22, True, "weights only"),
)


def compatibility(bundle: Bundle) -> list[Answer]:
    """For every precision of the bundle and every runtime we know of: does the network load there, and why not?"""
    names = [name for name in bundle.manifest.networks if sampler_calls(name) is None]
    opset = max(bundle.manifest.networks[name].opset for name in names)
    answers = []
    for precision in bundle.manifest.precisions:
        outlines = [bundle.read_network(name, precision).outline for name in names]
        operators = {operator for outline in outlines for _, operator in outline.operators}
        dynamic = [name for name in _TENSORRT_LACKS if name in operators]
        answers.append(_onnxruntime(precision, opset))
        answers += [_tensorrt(runtime, precision, opset, dynamic) for runtime in RUNTIMES]
    return answers


def gpu_names(gpus: Iterable[str]) -> str:
    """Compute capabilities as a reader knows them: "Jetson Orin 8.7"."""
    return ", ".join(f"{_NAMES[gpu]} {gpu}" for gpu in gpus)


def _onnxruntime(precision: str, opset: int) -> Answer:
    known = [since for since in _ONNXRUNTIME if since >= opset]
    if not known:
        reason = f"opset {opset} is above {max(_ONNXRUNTIME)}, the last in the table that was at hand"
        return Answer(precision, "ONNX Runtime", (), (), "unverified", reason)
    release = _ONNXRUNTIME[min(known)]
    # Its CPU kernels cover all three; how fast fp16 is there, or on which GPU, is another matter.
    return Answer(
        precision, "ONNX Runtime", (), (), "yes", f"{release} or newer, for opset {opset}, on any CPU"
    )


def _tensorrt(runtime: Runtime, precision: str, opset: int, dynamic: list[str]) -> Answer:
    gpus, computes_in = runtime.gpus, PRECISIONS[precision].computes_in
    answer, reason = "yes", "as the graph is typed" if runtime.strongly_typed else "weakly or strongly typed"
    if runtime.name.startswith("TensorRT 8"):
        reason = (
            "no flag needed"
            if computes_in == "float32"
            else f"the builder's flag for {computes_in} must allow it"
        )
    if dynamic:
        answer = "no"
        reason = f"it has no {' and no '.join(dynamic)}; export --precision {name_precisions_of_tensorrt()} instead"
    elif opset > runtime.max_opset:
        # Not a no: a parser may read what it does not promise, and most operators stay as they were.
        answer = "unverified"
        reason = (
            f"its parser promises opset {runtime.max_opset} and the bundle has {opset}: export with --opset 17, or try "
            "it on the device"
        )
    elif computes_in == "int8" and runtime.int8 == "weights only":
        gpus = tuple(gpu for gpu in gpus if gpu != _TURING)
        answer, reason = (
            "unverified",
            "it runs int8 weights of matrix products; whether with int8 activations is not said",
        )
    elif runtime.unverified:
        reason = f"{reason}; not verified: {runtime.unverified}"
    return Answer(precision, runtime.name, runtime.jetpacks, gpus if answer != "no" else (), answer, reason)
