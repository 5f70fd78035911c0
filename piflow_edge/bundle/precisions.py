"""What a graph can be exported in: the one registry of precisions.

A bundle's precision is what its student is in. Its other networks are in the same, unless an export says otherwise. To
add one, write an entry here, and the function that converts a graph where the entry says; see docs/extending.md.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any

from .sections import ToleranceSpec


@dataclass(frozen=True)
class Precision:
    """All that a precision must say of itself.

    `name`: in options and file names. `tolerances`: what `verify` allows, where a bundle is exported.
    `computes_in`: the narrowest number format of its matrix products, which an engine that does not take types from the
    graph must be allowed to use. `operators_tensorrt_lacks`: those that its graphs are made of and TensorRT has not.
    `converter`: "module:function" in the room that exports. It is called with a network's name, its fp32 graph, a
    `Calibration` and the `converter_options`, and returns a `Conversion`. A text, because it needs packages that a
    runtime does not.
    """

    name: str
    tolerances: ToleranceSpec
    converter: str
    computes_in: str = "float32"
    operators_tensorrt_lacks: tuple[str, ...] = ()
    converter_options: Mapping[str, Any] = field(default_factory=dict)

    def load_converter(self, room: str) -> Callable[..., Any]:
        """Import the function that `converter` names from the package `room`; its options are filled in."""
        module, _, function = self.converter.partition(":")
        return partial(getattr(import_module(f"{room}.{module}"), function), **self.converter_options)


# Relative to the largest golden value: an engine sums in another order than PyTorch, which costs some 1e-6 on a
# network of a few blocks; the policy divides by noise levels down to 1/128; one grey level may round the other way.
# A sampler graph is held to the runtime, which runs the same network.
_FP32 = ToleranceSpec(
    encodings=1e-4, outputs=1e-4, velocities=1e-4, latents=1e-3, samplers=1e-4, images=1, psnr=50.0
)
# What is promised of fp16 and int8 is the PSNR of whole images. The largest single errors are bounded loosely: rounding
# of 11 or 7 bits adds up over the layers, and calls feed each other. Policies are float32 in every precision. Where a
# rounding falls the other way, a sampler graph and the runtime part by as much.
_FP16 = ToleranceSpec(
    encodings=0.02, outputs=0.02, velocities=1e-4, latents=0.05, samplers=0.05, images=4, psnr=40.0
)
_INT8 = ToleranceSpec(
    encodings=0.2, outputs=0.2, velocities=1e-4, latents=0.5, samplers=0.1, images=1, psnr=30.0
)
# Weights alone: what is lost is a fifth of int8's on the digits and a quarter on emoji.
_INT8_WEIGHTS = replace(_INT8, outputs=0.1, psnr=35.0)
# Of a small text encoder four bits leave the direction of a prompt: a cosine of 0.96 goes with an error of 0.3.
_INT4 = replace(_INT8, encodings=0.5, outputs=0.3, psnr=25.0)


def _int4(name: str, block: int) -> Precision:
    """Weights alone, in blocks: 5.1 bits each in blocks of 32, 4.3 in blocks of 128. Its operator is ONNX Runtime's."""
    options = {"name": name, "block": block}
    converter = "conversions.int4:convert_network"
    return Precision(
        name, _INT4, converter, operators_tensorrt_lacks=("MatMulNBits",), converter_options=options
    )


# What every export begins with, and where a graph goes back to that is not converted.
EXACT = "fp32"
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(EXACT, _FP32, "conversions.calibration:keep_fp32"),
        Precision("fp16", _FP16, "conversions.fp16:convert_network", "float16"),
        # Scales activations as they come. Its operators are ONNX's, not TensorRT's: "N" in the operator tables of
        # onnx-tensorrt (docs/operators.md of 8.4 and of 10.15; those of TensorRT-RTX and 11 were not at hand, and are
        # taken to be the same).
        Precision(
            "int8",
            _INT8,
            "conversions.int8:convert_network",
            "int8",
            operators_tensorrt_lacks=("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"),
        ),
        # Scales activations by calibration.
        Precision(
            "int8-qdq",
            _INT8,
            "conversions.int8:convert_network",
            "int8",
            converter_options={"static": True},
        ),
        # Weights alone, one scale per output.
        Precision("int8-weights", _INT8_WEIGHTS, "conversions.weights_only:convert_network"),
        *(_int4(name, block) for name, block in (("int4", 32), ("int4-64", 64), ("int4-128", 128))),
    )
}


def name_precisions_of_tensorrt() -> str:
    """Name the precisions of fewer bits whose operators TensorRT has, for a message: "fp16 or int8-qdq"."""
    return " or ".join(
        name
        for name, precision in PRECISIONS.items()
        if precision.computes_in != "float32" and not precision.operators_tensorrt_lacks
    )


def join_tolerances(student: str, decoder: str | None, encoders: Iterable[str]) -> ToleranceSpec:
    """Return what `verify` allows where networks of a bundle are in these precisions; None for no decoder."""
    tolerances = PRECISIONS[student].tolerances
    encodings = [PRECISIONS[name].tolerances.encodings for name in encoders]
    if decoder is not None:
        made = PRECISIONS[decoder].tolerances
        tolerances = replace(tolerances, images=made.images, psnr=min(tolerances.psnr, made.psnr))
    return replace(tolerances, encodings=max(encodings, default=tolerances.encodings))
