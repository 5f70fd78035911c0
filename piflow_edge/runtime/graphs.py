"""A bundle's networks as engines take them: to open, or to build for a GPU."""

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import decoder_file, sampler_file
from piflow_edge.conditioning import TensorSpec
from piflow_edge.engines import Graph
from piflow_edge.engines.build_targets import Target
from piflow_edge.errors import BundleError, EngineError

GRAPHS = ("student", "decoder", "sampler")


def read_graph(bundle: Bundle, network: str = "student", precision: str | None = None) -> Graph:
    """One network of a bundle, its files checked; see `Bundle.read_network`."""
    files = bundle.read_network(network, precision)
    return Graph(files.model, files.weights, source=files.source, outline=files.outline)


def find_targets(
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
        model = read_graph(bundle, f"sampler.nfe{nfe}", precision)
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
        found.append(Target("student", f"student.{precision}.onnx", read_graph(bundle, "student", precision), precision,
                            network.inputs, network.outputs))  # fmt: skip
    if graph == "decoder" or (graph is None and manifest.decoder is not None):
        model, spec = read_graph(bundle, "decoder", precision), manifest.decoder
        found.append(Target("decoder", decoder_file(precision), model, precision, spec.inputs, spec.outputs))
    return found
