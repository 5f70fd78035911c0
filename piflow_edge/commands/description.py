"""A manifest in words, for people."""

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.filesize import decimal

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import Manifest
from piflow_edge.conditioning import TensorSpec
from piflow_edge.runtime.drawing.recorded_memory import MOST_GRAPHS, estimate_recorded_memory
from piflow_edge.runtime.residence.memory_needs import estimate_memory
from piflow_edge.system.hardware import free_memory


def describe_manifest(manifest: Manifest) -> dict[str, str]:
    """Return what a bundle is, topic by topic."""
    schedule, latent = manifest.schedule, manifest.latent
    # Provenance is free text, and a bundle may be anybody's.
    parameters, versions = map(manifest.provenance.get, ("parameters", "versions"))
    policy = {key: value for key, value in vars(manifest.policy).items() if key != "kind"}
    scaled = f", scale {latent.scale}, shift {latent.shift}" if latent.kind == "latents" else ""
    scaled += f", packed {latent.packing} x {latent.packing}" if latent.packing > 1 else ""
    return {
        "network calls per image": str(schedule.nfe),
        "good for": schedule.describe_good_nfes(),
        "policy": f"{manifest.policy.kind}: {', '.join(f'{key} {value}' for key, value in policy.items())}",
        "schedule": f"shift {schedule.shift}, {schedule.total_substeps} substeps, h {schedule.h}, "
        f"temperature {schedule.temperature}, substeps rounded by {schedule.substep_rule!r}",
        latent.kind: _shape(latent.shape) + scaled,
        "images": _shape(manifest.image_shape) if manifest.image_shape else "none, without a decoder",
        "conditioning": manifest.conditioner.summarize(),
        "axes": "\n".join(f"{name}: {axis}" for name, axis in manifest.axes.items()),
        "assets": "\n".join(f"{name}: {file}" for name, file in manifest.assets.items()) or "none",
        "precisions": ", ".join(manifest.precisions),
        "kept in fp32": "\n".join(_describe_float32_nodes(manifest)) or "nothing",
        "error of single layers": "\n".join(_describe_layers(manifest)) or "not measured",
        "parameters": f"{parameters:,}" if type(parameters) is int else "not said",
        "files": "\n".join(f"{name}  {spec.size:,} bytes" for name, spec in manifest.files.items()),
        "licence": manifest.license,
        "made with": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
    }


def describe_memory(bundle: Bundle) -> str:
    """Return what drawing takes in each precision, and what is free here."""
    lines = []
    for precision in bundle.manifest.precisions:
        needs = estimate_memory(bundle, precision)
        alone = f", {decimal(needs.one)} with keep='one'" if needs.one < 0.9 * needs.all else ""
        least = "" if needs.is_whole else "at least "
        lines.append(f"{precision}: {least}about {decimal(needs.all)}{alone}")
    free = free_memory()
    return "\n".join([*lines, *([f"{decimal(free)} are free here"] if free is not None else [])])


def describe_recorded_memory(manifest: Manifest) -> str:
    """Return what the CUDA graphs of whole images take, with engine `tensorrt`."""
    found = estimate_recorded_memory(manifest)
    if found is None:
        return "depends on what is drawn"
    device, pinned = map(decimal, found)
    kinds = f"up to {MOST_GRAPHS} kinds of calls"
    return f"{device} of the GPU, {pinned} of the host, for one image a call, besides the engine; {kinds}"


def describe_networks(manifest: Manifest) -> list[tuple[str, str, str, str, str]]:
    """Return for each network its name, inputs, outputs and what they feed, opset, and files of every precision."""
    rows = []
    for name, network in manifest.networks.items():
        outputs = [
            f"{spec} -> {', '.join(fed)}" if (fed := network.feeds.get(spec.name)) else str(spec)
            for spec in network.outputs
        ]
        files = [f"{precision}: {', '.join(names)}" for precision, names in network.files.items()]
        kind = f"{name}\n({network.kind})" if network.kind else name
        rows.append((kind, _lines(network.inputs), "\n".join(outputs), str(network.opset), "\n".join(files)))
    return rows


def _lines(specs: list[TensorSpec]) -> str:
    return "\n".join(map(str, specs))


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _describe_layers(manifest: Manifest) -> Iterator[str]:
    """One line for each graph with layers in fewer bits; the manifest has the error of every layer."""
    for precision, graph, layers in _by_graph(manifest, "layer_errors"):
        said = layers.items() if isinstance(layers, dict) else ()
        errors = {n: math.inf if e == "not finite" else e for n, e in said}
        if errors and all(type(error) is float for error in errors.values()):
            worst = max(errors, key=errors.__getitem__)
            yield (
                f"{precision}, {graph}: {median(errors.values()):.2g} of the output in the middle, "
                f"{errors[worst]:.2g} at most ({worst})"
            )


def _describe_float32_nodes(manifest: Manifest) -> Iterator[str]:
    """One line for each graph of which nodes stay in float32; the manifest names them all."""
    for precision, graph, nodes in _by_graph(manifest, "kept_in_fp32"):
        if nodes == "all":
            yield f"{precision}, {graph}: everything"
        elif nodes and isinstance(nodes, dict):
            node, reason = next(iter(nodes.items()))
            count = f"{len(nodes)} nodes, such as" if len(nodes) > 1 else "one node:"
            yield f"{precision}, {graph}: {count} {node} ({reason})"


def _by_graph(manifest: Manifest, name: str) -> Iterator[tuple[str, str, Any]]:
    """What the provenance says under `name`, by precision and graph, as far as it says that."""
    said = manifest.provenance.get(name)
    for precision, graphs in said.items() if isinstance(said, dict) else ():
        for graph, value in graphs.items() if isinstance(graphs, dict) else ():
            yield precision, graph, value
