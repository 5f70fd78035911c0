"""Networks that take turns in memory: one is open at a time, for models that do not fit together."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from piflow_edge.engines import Choice, Engine
from piflow_edge.errors import EngineError

log = logging.getLogger(__name__)


class Turns:
    """Opens the network that is asked for, and frees the one before it. Threads may share it; their calls take turns.

    `open_network`: opens an engine by the network's name.
    """

    def __init__(self, open_network: Callable[[str], Engine]):
        self._open, self._lock = open_network, threading.RLock()
        self._name = ""
        self._engine: Engine | None = None
        self._is_closed = False

    def take(self, name: str) -> "TurnEngine":
        """Open a network now, and return it as an engine that is opened again whenever it is run."""
        with self._lock:
            return TurnEngine(self, name, self._turn_to(name))

    def run(self, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs of one call of a network."""
        with self._lock:
            return self._turn_to(name).run(inputs)

    def close(self) -> None:
        """Free the network that is open, and open none any more."""
        with self._lock:
            self._is_closed = True
            self._free()

    def _turn_to(self, name: str) -> Engine:
        if self._is_closed:
            raise EngineError(f"the {name} is closed; load the bundle again")
        if self._engine is None or self._name != name:
            self._free()  # first: both together may not fit
            log.info("opening the %s", name)
            began = time.perf_counter()
            self._engine, self._name = self._open(name), name
            log.info("the %s is open, after %.1f s", name, time.perf_counter() - began)
        return self._engine

    def _free(self) -> None:
        engine, self._engine, self._name = self._engine, None, ""
        if engine is not None:
            engine.close()


class TurnEngine:
    """One of the networks of `Turns`, opened. What it says of itself stays known while it is not open."""

    def __init__(self, turns: Turns, network: str, opened: Engine):
        self._turns, self._network = turns, network
        self.name, self.device = opened.name, opened.device
        self.min_batch, self.max_batch = opened.min_batch, opened.max_batch
        self.choice: Choice = opened.choice

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One network call, for which the network may have to be opened first; see `Engine`."""
        return self._turns.run(self._network, inputs)

    def close(self) -> None:
        """Free the memory of all networks that take turns."""
        self._turns.close()
