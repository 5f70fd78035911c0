"""A bundle's networks in their engines: all at once, or one at a time."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import DECODER, STUDENT
from piflow_edge.engines import Engine, EngineOptions, Graph, check_engine_options, open_engine
from piflow_edge.runtime.graphs import read_graph, view_graph

from .memory_needs import warn_of_little_memory
from .turns import Turns

# Name of a network -> it, in an engine.
Open = Callable[[str, str, str | None], Engine]


def open_networks(
    bundle: Bundle, engine: str, precision: str | None, device: str | None, options: EngineOptions
) -> dict[str, Engine]:
    """Open the student, and decoder and text encoders where the bundle has some; see `load`.

    "auto" chooses for each of them, all on the student's device: an engine may be built for the student alone.
    """
    check_engine_options(options)
    warn_of_little_memory(bundle, precision, options.keep, engine, device)
    names = [*bundle.manifest.conditioner.networks, DECODER]
    others = [name for name in names if name in bundle.manifest.networks]
    return _KEEPING[options.keep](bundle, others, engine, precision, device, options)


def _open_all(bundle, others, engine, precision, device, options) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    try:
        for name in (STUDENT, *others):
            with _graph_to_keep(bundle, name, precision) as graph:
                engines[name] = open_engine(graph, engine=engine, device=device, options=options)
            if name == STUDENT:
                engine, device = _of_others(engine, engines[name])
    except BaseException:
        for one in engines.values():
            one.close()
        raise
    return engines


def _graph_to_keep(bundle: Bundle, name: str, precision: str | None) -> AbstractContextManager[Graph]:
    """Lend a graph to an engine that stays open, in its place where it is one file.

    Of more files as bytes: engines keep weights beside a graph mapped, and would draw from whatever is written there.
    """
    if len(bundle.manifest.network_files(name, bundle.precision(precision))) == 1:
        return view_graph(bundle, name, precision)
    return nullcontext(read_graph(bundle, name, precision))


def _open_in_turn(bundle, others, engine, precision, device, options) -> dict[str, Engine]:
    chosen: dict[str, tuple[str, str | None]] = {STUDENT: (engine, device)}

    def open_network(name: str) -> Engine:
        wanted, place = chosen[name]
        with view_graph(bundle, name, precision) as graph:
            opened = open_engine(graph, engine=wanted, device=place, options=options)
        chosen[name] = opened.name, opened.device  # it is not chosen anew each time
        return opened

    turns = Turns(open_network)
    try:
        engines: dict[str, Engine] = {STUDENT: turns.take(STUDENT)}
        for name in others:
            chosen[name] = _of_others(engine, engines[STUDENT])
            engines[name] = turns.take(name)
    except BaseException:
        turns.close()
        raise
    return engines


def _of_others(engine: str, student: Engine) -> tuple[str, str]:
    return engine if engine == "auto" else student.name, student.device


_KEEPING: Mapping[str, Callable[..., dict[str, Engine]]] = {"all": _open_all, "one": _open_in_turn}
