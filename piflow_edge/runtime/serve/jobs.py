"""A request to a generator that waits for its turn, and what its caller hears of it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from piflow_edge.errors import PiFlowError
from piflow_edge.runtime.drawing.observer import Progress
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.request import Request
from piflow_edge.runtime.result import Result


class BusyError(PiFlowError):
    """Too many images wait. `retry_after`: whole seconds after which there should be room."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} images wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class StoppedError(PiFlowError):
    """The server is stopping."""


@dataclass(frozen=True)
class JobProgress:
    """How far images of one job are: those from number `first` on, `piece` of the images that `progress` is of."""

    progress: Progress
    first: int
    piece: slice
    generator: Generator

    @cached_property
    def preview(self) -> np.ndarray:
        """Images, uint8 (B, H, W, C), as the policy now sees them: worked out when asked for."""
        return self.generator.decode(self.progress.x_0[self.piece])


@dataclass(eq=False)
class Job:
    """One request of one caller.

    `request`: of a generator's `prepare`. `on_progress`: called in the batcher's thread. `future`: gets the result, or
    the error. `is_abandoned`: its caller is gone, so that nobody waits for its images.
    """

    request: Request
    on_progress: Callable[[JobProgress], None] | None = None
    future: "Future[Result]" = field(default_factory=Future)
    is_abandoned: bool = False

    def __len__(self) -> int:
        return len(self.request)
