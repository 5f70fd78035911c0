"""The networks of a bundle: exported in float32, then converted to every precision, and named as files."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import onnx

from piflow_edge.bundle.manifest import DECODER, STUDENT, Manifest, sampler_calls
from piflow_edge.bundle.precisions import EXACT, PRECISIONS
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.distill.networks.text_encoders import TextEncoder
from piflow_edge.distill.sources import StudentModel
from piflow_edge.engines import Graph
from piflow_edge.errors import BundleError
from piflow_edge.export.conversions.calibration import Calibration, Conversion
from piflow_edge.export.export_settings import ExportSettings
from piflow_edge.export.kept_work import KeptWork
from piflow_edge.export.onnx_graphs.decoder_graph import export_decoder
from piflow_edge.export.onnx_graphs.encoder_graph import export_encoder
from piflow_edge.export.onnx_graphs.large import Workpiece, is_on_demand, measure_lowered_share, name_files
from piflow_edge.export.onnx_graphs.live_values import count_live_bytes
from piflow_edge.export.onnx_graphs.opset import lower_opset
from piflow_edge.export.onnx_graphs.sampler_graph import export_sampler
from piflow_edge.export.onnx_graphs.to_onnx import OPSET, network_graph

log = logging.getLogger(__name__)

# Share of a network's weights below which a precision is warned of: most of it is float32 still.
_LEAST_SHARE = 0.5
# Name of a network -> its graph.
Graphs = dict[str, Graph]


def export_networks(
    student: StudentModel,
    manifest: Manifest,
    autoencoder: Autoencoder | None,
    encoders: Sequence[TextEncoder] = (),
) -> Graphs:
    """Return the networks that PyTorch has, in float32; a sampler graph is made of them.

    Raises:
        BundleError: a sampler graph is wanted of a network that is too large for one.
        CheckFailedError: an exported graph is not valid ONNX.
    """
    graphs = {STUDENT: network_graph(student.network, manifest.conditioner.inputs, manifest.axes)}
    if graphs[STUDENT].weights and manifest.samplers:
        raise BundleError(
            "a sampler graph is one file of less than 2 GiB, and the network alone is larger; leave --sampler-graph out"
        )
    if autoencoder is not None:
        graphs[DECODER] = export_decoder(autoencoder, manifest.latent.restored_shape, manifest.axes)
    for encoder in encoders:
        graphs[encoder.spec.network] = export_encoder(encoder)
    return graphs


def count_live(graphs: Graphs, manifest: Manifest) -> dict[str, int]:
    """Return the bytes that one image of the usual size takes in each network while it runs, weights aside.

    Axes without a usual length are as long as they may be, or as short as they may be where they have no end.
    """
    lengths = {name: axis.longest or axis.shortest for name, axis in manifest.axes.items()}
    lengths |= {**manifest.usual_sides, "batch": 1}
    found = {}
    for name, graph in graphs.items():
        shapes = {spec.name: spec.size(lengths) for spec in manifest.networks[name].inputs}
        found[name] = count_live_bytes(onnx.load_from_string(graph.model), shapes)
    return found


def convert_networks(
    exact: Graphs,
    manifest: Manifest,
    calibration: Calibration | None,
    settings: ExportSettings,
    work: KeptWork,
) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest with the files of every network in every precision, and those files.

    What a precision leaves in float32, and how far single layers are off, is recorded in the provenance. A network
    that is the same in two precisions has one file for both.

    Args:
        exact: the fp32 networks, but for sampler graphs.
        manifest: a draft, whose `networks` have no files.
        calibration: what converters measure with; None where there is fp32 only.
        settings: say which network is in which precision.
        work: of this export. Weights that memory may not hold are in its folder, and stand among the files as
            `WeightFile`.
    """
    files: dict[str, Any] = {}
    made: dict[tuple[str, str], Graph] = {}
    recorded: dict[str, dict[str, dict]] = {"kept_in_fp32": {}, "layer_errors": {}}
    listed: dict[str, dict[str, list[str]]] = {name: {} for name in manifest.networks}

    @cache  # a network may be in the same in several of the bundle's precisions
    def convert(name: str, precision: str) -> Conversion:
        converter = PRECISIONS[precision].load_converter("piflow_edge.export")
        converted = work.conversion(f"{name}.{precision}", lambda: converter(name, exact[name], calibration))
        if converted.graph is not exact[name] or converted.float32_nodes:
            _tell_share(name, precision, converted.graph, converted.float32_nodes)
        return converted

    for precision in manifest.precisions:
        inside = {name: settings.precision_of(name, precision) for name in exact}
        converted = {name: convert(name, one) for name, one in inside.items()}
        changed = {name: c for name, c in converted.items() if c.graph is not exact[name] or c.float32_nodes}
        recorded["kept_in_fp32"][precision] = {name: one.float32_nodes for name, one in changed.items()}
        recorded["layer_errors"][precision] = {
            name: _round_errors(c.layer_errors) for name, c in changed.items() if c.layer_errors
        }
        for name in manifest.networks:
            graph, tag = _graph_of(name, converted, exact, manifest, inside.get(name, precision))
            tag = next((t for (n, t), other in made.items() if n == name and other == graph), tag)
            if (name, tag) not in made:
                made[name, tag] = graph
                if is_on_demand(graph):
                    graph = Workpiece.open(graph, work.folder).finish()
                files |= _name_files(graph, f"{name}.{tag}.onnx", manifest.networks[name].opset)
            listed[name][precision] = [file for file in files if file.startswith(f"{name}.{tag}.onnx")]
    networks = {name: replace(spec, files=listed[name]) for name, spec in manifest.networks.items()}
    provenance = {**manifest.provenance, **recorded}
    return replace(manifest, networks=networks, provenance=provenance), files


def _round_errors(errors: dict[str, float]) -> dict[str, float | str]:
    """Two digits are enough, and JSON has no infinity."""
    return {
        layer: float(f"{error:.2g}") if math.isfinite(error) else "not finite"
        for layer, error in errors.items()
    }


def _tell_share(network: str, precision: str, graph: Graph, reasons: dict[str, str] | str) -> None:
    """Log how much of a network a precision covers; with a warning where it is less than its name promises."""
    share = measure_lowered_share(graph)
    level = logging.INFO if share >= _LEAST_SHARE or reasons == "all" else logging.WARNING
    log.log(
        level, "%s holds %.0f %% of the weights of %r; bundle.json says why the others stay in float32",
        precision, 100 * share, network,
    )  # fmt: skip


def _graph_of(
    name: str, converted: dict[str, Conversion], exact: Graphs, manifest: Manifest, precision: str
) -> tuple[Graph, str]:
    """A network in a precision, and the precision that its file is named for."""
    calls = sampler_calls(name)
    if calls is None:
        return converted[name].graph, EXACT if converted[name].graph is exact[name] else precision
    decoder = converted[DECODER].graph.model if DECODER in converted else None
    return Graph(export_sampler(converted[STUDENT].graph.model, manifest, calls, decoder)), precision


def _name_files(graph: Graph, file: str, opset: int) -> dict[str, Any]:
    files = name_files(graph, file)
    return files if opset == OPSET else files | {file: lower_opset(files[file])}
