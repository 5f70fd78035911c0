"""Requests that wait for one bundle, drawn together: whatever waits when the engine is free goes into its next batch.

No time is spent on waiting for more. Under load requests gather while a batch is drawn, and the next one is full.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

from piflow_edge.errors import Cancelled
from piflow_edge.runtime.drawing.observer import Progress
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.result import Result

from .counters import Counters
from .jobs import BusyError, Job, JobProgress, StoppedError

log = logging.getLogger(__name__)

# Weight of the last batch in the mean time per image, by which callers are told when to come again.
_NEWEST = 0.2


class Batcher:
    """A queue of jobs with an end, and the thread that draws them. Any thread may call its methods.

    `max_batch`: images of one batch. `max_waiting`: images that wait.
    """

    def __init__(self, generator: Generator, counters: Counters, *, max_batch: int, max_waiting: int):
        self._generator, self._counters, self._name = generator, counters, generator.bundle.name
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed, self._is_closed, self._seconds_per_image = threading.Condition(), False, 0.0
        counters.watch_waiting(self._name, self.count_waiting)
        self._thread = threading.Thread(target=self._work, name=f"batcher of {self._name}", daemon=True)
        self._thread.start()

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive() and not self._is_closed

    def count_waiting(self) -> int:
        """Return how many images wait."""
        with self._changed:
            return sum(map(len, self._waiting))

    def check_room(self, count: int = 1) -> None:
        """Raise BusyError unless so many images more may wait."""
        if self.count_waiting() + count > self._max_waiting:
            raise self.refuse()

    def refuse(self) -> BusyError:
        """Count a request that is refused, and return the error that says when there should be room."""
        self._counters.refused.labels(self._name).inc()
        waiting = self.count_waiting()
        return BusyError(waiting, max(1, math.ceil(waiting * self._seconds_per_image)))

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            BusyError: too many images wait.
            StoppedError: the batcher was closed.
        """
        with self._changed:
            if self._is_closed:
                raise StoppedError(f"bundle {self._name!r} is not served any more")
            waiting = sum(map(len, self._waiting))
            if waiting + len(job) <= self._max_waiting:
                self._waiting.append(job)
                self._changed.notify()
                return
        raise self.refuse()

    def abandon(self, job: Job) -> None:
        """Forget a job whose caller is gone. Its batch stops after the next network call if it has no other callers."""
        with self._changed:
            if job.is_abandoned or job.future.done():
                return
            job.is_abandoned = True
            if job in self._waiting:
                self._waiting.remove(job)
            job.future.cancel()
        self._counters.abandoned.labels(self._name).inc()

    def close(self) -> None:
        """Refuse more jobs, fail those that wait, and return when the batch that is being drawn is done."""
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        stopping = StoppedError("the server is stopping; ask again when it is back")
        for job in waiting:
            self._settle(job, error=stopping)
        self._thread.join()

    def _work(self) -> None:
        while batch := self._take_batch():
            try:
                self._draw(batch)
            except BaseException as error:  # the thread must outlive whatever an engine raises
                self._counters.failed.labels(self._name).inc()
                log.exception("bundle %r failed on a batch of %d", self._name, sum(map(len, batch)))
                for job in batch:
                    self._settle(job, error=error)

    def _take_batch(self) -> list[Job]:
        """Wait for jobs; return the oldest with all that fit beside it, or none once closed."""
        with self._changed:
            while not self._waiting:
                if self._is_closed:
                    return []
                self._changed.wait()
            first = self._waiting.popleft()
            batch, size, key = [first], len(first), first.request.batch_key
            for job in list(self._waiting):
                if size + len(job) <= self._max_batch and job.request.batch_key == key:
                    self._waiting.remove(job)
                    batch.append(job)
                    size += len(job)
            return batch

    def _draw(self, batch: Sequence[Job]) -> None:
        # Not without need where it would cost more than a batch that nobody waits for.
        is_watched = not self._generator.is_recorded or any(job.on_progress for job in batch)
        look_on = partial(self._look_on, batch) if is_watched else None
        try:
            results = self._generator.make_together(
                [job.request for job in batch], output="numpy", callback=look_on
            )
        except Cancelled:
            return  # nobody waits for any of them
        self._count(batch, results[0])
        for job, result in zip(batch, results, strict=True):
            self._settle(job, result)

    def _settle(self, job: Job, result: Result | None = None, *, error: BaseException | None = None) -> None:
        with self._changed:  # else `abandon` could come in between
            if job.future.done():
                return
            if error is not None:
                job.future.set_exception(error)
            elif result is not None:
                job.future.set_result(result)

    def _look_on(self, batch: Sequence[Job], done: Progress) -> None:
        if all(job.is_abandoned for job in batch):
            raise Cancelled("all who asked for these images are gone")
        for job, first, piece in _find_pieces(batch, done):
            if job.on_progress is not None and not job.is_abandoned:
                job.on_progress(JobProgress(done, first, piece, self._generator))

    def _count(self, batch: Sequence[Job], result: Result) -> None:
        size, counters = sum(map(len, batch)), self._counters
        counters.images.labels(self._name).inc(size)
        counters.batches.labels(self._name).observe(size)
        for stage, ms in result.timings.items():
            counters.stages.labels(self._name, stage).inc(ms / 1000)
        newest = result.timings["total"] / 1000 / size
        before = self._seconds_per_image or newest
        self._seconds_per_image = before + _NEWEST * (newest - before)


def _find_pieces(batch: Sequence[Job], done: Progress) -> Iterator[tuple[Job, int, slice]]:
    """Give each job that has images in a report, the number of its first one there, and which of the report's
    they are."""
    start = -done.first
    for job in batch:
        stop = start + len(job)
        piece = slice(max(start, 0), min(stop, len(done.state)))
        if piece.start < piece.stop:
            yield job, max(0, -start), piece
        start = stop
