"""What there is to build of a bundle: its graphs, and the batch sizes an engine is made for."""

import math
import re
from dataclasses import dataclass

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import TensorSpec, decoder_file, sampler_file
from piflow_edge.engines import Graph
from piflow_edge.errors import BundleError, EngineError

GRAPHS = ("student", "decoder", "sampler")

_ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Batch:
    """Batch sizes an engine is made for: from `least` to `most`, fastest at `best`.

    Raises:
        EngineError: they do not rise, or are not 1 or more.
    """

    least: int = 1
    best: int = 1
    most: int = 8

    def __post_init__(self):
        if not 1 <= self.least <= self.best <= self.most:
            raise EngineError(f"batch sizes rise from 1 or more: MIN <= OPT <= MAX; got {self}")

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """From "MIN:OPT:MAX", or one number for all three.

        Raises:
            EngineError: the text is neither, or the numbers do not rise.
        """
        if not re.fullmatch(r"\d{1,6}(:\d{1,6}:\d{1,6})?", text):
            raise EngineError(f"batch sizes are MIN:OPT:MAX, such as 1:1:8, or one number; got {text!r}")
        numbers = [int(number) for number in text.split(":")]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))


@dataclass(frozen=True)
class Target:
    """One graph of a bundle. `inputs`, `outputs`: as far as the manifest tells."""

    name: str
    file: str
    graph: Graph
    precision: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of the inputs, at a batch size."""
        return {spec.name: _sized(spec, batch) for spec in self.inputs}

    def buffers(self, batch: int) -> int:
        """Bytes of the inputs and outputs, at a batch size."""
        specs = (*self.inputs, *self.outputs)
        return sum(math.prod(_sized(spec, batch)) * _ITEM_BYTES[spec.dtype] for spec in specs)

    def profile(self, batch: Batch) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Least, best and greatest shape of each input."""
        sizes = [self.shapes(size) for size in (batch.least, batch.best, batch.most)]
        return {name: tuple(shapes[name] for shapes in sizes) for name in sizes[0]}


def targets(
    bundle: Bundle, *, graph: str | None = None, nfe: int | None = None, precision: str | None = None
) -> list[Target]:
    """The graphs to build: student and decoder, or the one that is named.

    Args:
        bundle: an exported folder.
        graph: one of `GRAPHS`; None is the student, and the decoder where there is one.
        nfe: calls of the sampler graph; None is the only one there is.
        precision: one of the bundle's; None is its first.

    Raises:
        BundleError: the bundle has no such graph or precision.
        EngineError: `graph`, `nfe` or `precision` that make no sense.
    """
    precision, manifest = bundle.precision(precision), bundle.manifest
    if graph not in (None, *GRAPHS):
        raise EngineError(f"graph is one of {', '.join(GRAPHS)}; got {graph!r}")
    if nfe is not None and graph != "sampler":
        raise EngineError("nfe chooses among sampler graphs; give it with graph 'sampler'")
    if precision == "int8":
        raise EngineError(
            "TensorRT has no int8 whose activations are scaled as they come; export with --precision int8-qdq"
        )
    if graph == "sampler":
        if nfe is None and not manifest.samplers:
            raise BundleError(
                f"bundle {bundle.name!r} has no sampler graph; export it with --sampler-graph NFE"
            )
        if nfe is None and len(manifest.samplers) > 1:
            has = ", ".join(map(str, manifest.samplers))
            raise EngineError(
                f"bundle {bundle.name!r} has sampler graphs of these calls: {has}; choose with nfe"
            )
        nfe = nfe or manifest.samplers[0]
        model = bundle.sampler(nfe, precision)
        state = ["batch", *manifest.latent.shape]
        inputs = [TensorSpec("noise", "float32", state)]
        inputs += [spec for spec in manifest.network.inputs if spec.name == "class_labels"]
        if any(segment.renoises for segment in manifest.schedule.schedule(nfe=nfe).segments):
            inputs.append(TensorSpec("renoise", "float32", [nfe - 1, *state]))
        outputs = [TensorSpec("latents", "float32", state)]
        return [
            Target(f"sampler of {nfe} calls", sampler_file(nfe, precision), model, precision, inputs, outputs)
        ]
    found = []
    if graph in (None, "student"):
        network = manifest.network
        found.append(Target("student", f"student.{precision}.onnx", bundle.graph(precision), precision,
                            network.inputs, network.outputs))  # fmt: skip
    if graph == "decoder" or (graph is None and manifest.decoder is not None):
        model, spec = bundle.decoder(precision), manifest.decoder
        found.append(Target("decoder", decoder_file(precision), model, precision, spec.inputs, spec.outputs))
    return found


def _sized(spec: TensorSpec, batch: int) -> tuple[int, ...]:
    return tuple(batch if size == "batch" else int(size) for size in spec.shape)
