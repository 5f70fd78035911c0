"""Random numbers that depend on neither the number of processes nor on where a run was stopped.

Every iteration draws from a generator of its own, keyed by (seed, iteration): no random state has to be saved, and a
resumed run takes the same steps as one that was never stopped. Every process draws for the whole batch and keeps the
rows that are its own: a batch is the same numbers however it is shared out.
"""

import numpy as np


class IterationRandom:
    """The random numbers of one iteration, for the whole batch; see `imitation.Random`."""

    def __init__(self, seed: int, iteration: int):
        self.iteration = iteration
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, iteration])))

    def uniform(self, shape) -> np.ndarray:
        return self._generator.random(shape)

    def normal(self, shape) -> np.ndarray:
        return self._generator.standard_normal(shape, dtype=np.float32)

    def shared_choice(self, count: int) -> int:
        return int(self._generator.integers(0, count))

    def choice(self, count: int, size: int) -> np.ndarray:
        """`size` whole numbers below `count`, with repetition."""
        return self._generator.integers(0, count, size)

    def permutation(self, count: int) -> np.ndarray:
        """0 to count - 1 in random order."""
        return self._generator.permutation(count)


class SharedRandom:
    """An iteration's random numbers, drawn once for a batch of `batch_size` and handed out by rows.

    All shares must ask for the same things in the same order, as one loss on parts of a batch does.
    """

    def __init__(self, random: IterationRandom, batch_size: int):
        self.random, self.batch_size = random, batch_size
        self.draws: list = []

    def rows(self, rows: slice) -> "Share":
        """The numbers of these rows of the batch."""
        return Share(self, rows)


class Share:
    """Rows of a `SharedRandom`: asked for (n, ...), it draws (batch_size, ...) and returns its own n rows."""

    def __init__(self, shared: SharedRandom, rows: slice):
        self._shared, self._rows, self._count = shared, rows, 0

    def uniform(self, shape) -> np.ndarray:
        return self._next(self._shared.random.uniform, shape)

    def normal(self, shape) -> np.ndarray:
        return self._next(self._shared.random.normal, shape)

    def shared_choice(self, count: int) -> int:
        return self._draw(self._shared.random.shared_choice, count)

    @property
    def iteration(self) -> int:
        return self._shared.random.iteration

    def _draw(self, draw, size):
        """The next of the batch's draws, made by whichever share comes first."""
        draws = self._shared.draws
        if self._count == len(draws):
            draws.append(draw(size))
        self._count += 1
        return draws[self._count - 1]

    def _next(self, draw, shape) -> np.ndarray:
        whole = (self._shared.batch_size, *shape[1:])
        numbers = self._draw(draw, whole)
        assert numbers.shape == whole, "shares of one batch must draw alike"
        numbers = numbers[self._rows]
        assert len(numbers) == shape[0], "the first axis is that of the batch"
        return numbers
