"""A bundle's networks as engines take them: to open, or to build for a GPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import DECODER, STUDENT, sampler_calls, sampler_name
from piflow_edge.bundle.precisions import PRECISIONS, name_precisions_of_tensorrt
from piflow_edge.bundle.sections import AxisSpec
from piflow_edge.engines import Graph
from piflow_edge.engines.building.targets import Target
from piflow_edge.errors import BundleError, EngineError
from piflow_edge.option import option

GRAPHS = (STUDENT, DECODER, "sampler")


def read_graph(bundle: Bundle, network: str = STUDENT, precision: str | None = None) -> Graph:
    """One network of a bundle, its files checked; see `Bundle.read_network`."""
    files = bundle.read_network(network, precision)
    return Graph(files.model, files.weights, source=files.source, outline=files.outline)


@contextmanager
def view_graph(bundle: Bundle, network: str, precision: str | None = None) -> Iterator[Graph]:
    """As `read_graph`, for a block in which an engine may read the files itself; see `Bundle.view_network`."""
    with bundle.view_network(network, precision) as files:
        yield Graph(files.model, files.weights, source=files.source, outline=files.outline, file=files.file)


@dataclass(frozen=True)
class GraphChoice:
    """Which graphs of a bundle are built, and for what lengths.

    Args:
        graph: a network of the bundle, or "sampler" for a sampler graph; None is all that `load` opens.
        nfe: calls of the sampler graph; None is the only one there is.
        precision: one of the bundle's; None is its first.
        lengths: least, best and greatest of named axes; None is all that the bundle allows, best at the greatest.
    """

    graph: str | None = option(
        None, "Build this one of the bundle's networks, or sampler; else all but sampler graphs."
    )
    nfe: int | None = option(None, "Calls of the sampler graph, with --graph sampler.", minimum=1)
    precision: str | None = option(None, "One of the bundle's; else its first.")
    lengths: Mapping[str, tuple[int, int, int]] | None = option(
        None,
        "Lengths of a named axis, such as tokens=1:77:512; else all that the bundle allows.",
    )


def find_targets(bundle: Bundle, choice: GraphChoice = GraphChoice(), **changes: Any) -> list[Target]:
    """The graphs to build: all but sampler graphs, or the one that is named.

    Args:
        bundle: an exported folder.
        choice: see `GraphChoice`; `changes` are fields of it by name.

    Raises:
        BundleError: the bundle has no such graph or precision.
        EngineError: `graph`, `nfe`, `precision` or `lengths` that make no sense, or an axis without a greatest length.
    """
    choice = replace(choice, **changes)
    graph, nfe, lengths = choice.graph, choice.nfe, choice.lengths or {}
    precision, networks = bundle.precision(choice.precision), bundle.manifest.networks
    if graph not in (None, *GRAPHS, *networks):
        raise EngineError(f"graph is one of {', '.join(dict.fromkeys((*GRAPHS, *networks)))}; got {graph!r}")
    if nfe is not None and graph != "sampler":
        raise EngineError("nfe chooses among sampler graphs; give it with graph 'sampler'")
    if graph == "sampler":
        graph = sampler_name(_find_calls(bundle, nfe))
    names = [graph] if graph else [name for name in networks if sampler_calls(name) is None]
    if unknown := lengths.keys() - (bundle.manifest.axes.keys() - {"batch"}):
        has = ", ".join(name for name in bundle.manifest.axes if name != "batch") or "none"
        raise EngineError(f"bundle {bundle.name!r} has no axis {min(unknown)!r}; its axes are: {has}")
    return [_describe_target(bundle, name, precision, lengths) for name in names]


def _check_operators(network: str, precision: str, graph: Graph) -> None:
    """Refuse a graph that TensorRT has no operators for."""
    assert graph.outline is not None, "a bundle's graphs are outlined when they are read"
    used = {name for _, name in graph.outline.operators}
    missing = [name for one in PRECISIONS.values() for name in one.operators_tensorrt_lacks if name in used]
    if missing:
        raise EngineError(
            f"TensorRT has no {' and no '.join(missing)}, which the {network} in {precision} is made of; export with "
            f"--precision {name_precisions_of_tensorrt()}"
        )


def _find_calls(bundle: Bundle, nfe: int | None) -> int:
    samplers = bundle.manifest.samplers
    if nfe is None and not samplers:
        raise BundleError(f"bundle {bundle.name!r} has no sampler graph; export it with --sampler-graph NFE")
    if nfe is None and len(samplers) > 1:
        has = ", ".join(map(str, samplers))
        raise EngineError(f"bundle {bundle.name!r} has sampler graphs of these calls: {has}; choose with nfe")
    return nfe or samplers[0]


def _describe_target(
    bundle: Bundle, network: str, precision: str, lengths: Mapping[str, tuple[int, int, int]]
) -> Target:
    graph, calls = read_graph(bundle, network, precision), sampler_calls(network)
    _check_operators(network, precision, graph)
    spec, file = bundle.manifest.networks[network], bundle.manifest.network_files(network, precision)[0]
    name = network if calls is None else f"sampler of {calls} calls"
    named = {n for tensor in spec.inputs for n in tensor.shape if isinstance(n, str) and n != "batch"}
    axes, usual = bundle.manifest.axes, bundle.manifest.usual_sides
    sizes = {
        name: _lengths_of(name, axes[name], lengths.get(name), usual.get(name)) for name in sorted(named)
    }
    return Target(
        name, file, graph, precision, PRECISIONS[precision].computes_in, spec.inputs, spec.outputs, sizes
    )


def _lengths_of(
    name: str, axis: AxisSpec, wanted: tuple[int, int, int] | None, usual: int | None
) -> tuple[int, int, int]:
    """Least, best and greatest length of an axis; the best is the `usual` one, else the greatest."""
    if wanted is not None:
        least, best, most = wanted
    elif axis.longest is not None:
        least, best, most = axis.shortest, usual or axis.longest, axis.longest
    else:
        raise EngineError(
            f"an engine needs a greatest length of the axis {name!r}, which the bundle does not say; give --axis "
            f"{name}=MIN:OPT:MAX"
        )
    if not least <= best <= most or any(axis.nearest(length) != length for length in (least, best, most)):
        raise EngineError(f"lengths of {name!r} rise, and are {axis}; got {least}:{best}:{most}")
    return least, best, most
