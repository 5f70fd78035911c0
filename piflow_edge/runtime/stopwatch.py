"""How long each stage of a generator's call takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# In the order in which they come; "total" is of the call.
STAGES = ("noise", "network", "policy", "decode", "transfer")


class Stopwatch:
    """Adds up milliseconds per stage.

    `wait`: lets a GPU finish what it was told. It is called at the end of every stage, whose time it then is; without
    it a stage takes as long as it takes to queue, and the GPU is waited for where something is copied from it.
    """

    def __init__(self, wait: Callable[[], None] | None = None):
        self.ms, self._wait = dict.fromkeys((*STAGES, "total"), 0.0), wait

    def __call__(self, stage: str, seconds: float) -> None:
        """Add a stage that has just ended."""
        if self._wait is not None:
            began = time.perf_counter()
            self._wait()
            seconds += time.perf_counter() - began
        self.ms[stage] += 1000 * seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done in the block is a stage."""
        began = time.perf_counter()
        yield
        self(name, time.perf_counter() - began)
