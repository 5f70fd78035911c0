"""How long each stage of a generator's call takes."""

import time
from collections.abc import Callable
from typing import Any

# In the order in which they come; "total" is of the call.
STAGES = ("noise", "network", "policy", "decode", "transfer")


class Stopwatch:
    """Adds up milliseconds per stage.

    `wait`: lets a GPU finish what was queued. It is called at the end of every stage, whose time it then is; without
    it a stage takes as long as it takes to queue, and the GPU is waited for where something is copied from it.
    """

    def __init__(self, wait: Callable[[], None] | None = None):
        self.ms: dict[str, float] = dict.fromkeys((*STAGES, "total"), 0.0)
        self._wait = wait

    @property
    def waits(self) -> bool:
        """Whether a GPU is waited for after each stage."""
        return self._wait is not None

    def add(self, stage: str, began: float) -> None:
        """Add a stage that has just ended. `began`: `time.perf_counter()` at its start."""
        if self._wait is not None:
            self._wait()
        self.ms[stage] += 1000 * (time.perf_counter() - began)

    def run(self, stage: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Call the function, and return what it returns; the call is a stage."""
        began = time.perf_counter()
        result = function(*arguments, **more)
        self.add(stage, began)
        return result

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function; each of its calls is a stage."""

        def call_timed(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **more)
            self.add(stage, began)
            return result

        return call_timed
