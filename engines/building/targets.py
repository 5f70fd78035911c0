"""What an engine is built of: a graph with the shapes of its inputs, and the batch sizes it is made for."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from piflow_edge.engines import Graph
from piflow_edge.errors import EngineError
from piflow_edge.system.onnx_messages import ITEM_BYTES


class Tensor(Protocol):
    """An input or output of a graph: the sizes of its axes, or their names where they vary, such as "batch"."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int | str]: ...


# Places in a profile's three shapes.
_MOST = 2


@dataclass(frozen=True)
class Batch:
    """Batch sizes an engine is made for: from `least` to `most`, fastest at `best`.

    Raises:
        EngineError: they do not rise, or are not 1 or more.
    """

    least: int = 1
    best: int = 1
    most: int = 8

    def __post_init__(self):
        if not 1 <= self.least <= self.best <= self.most:
            raise EngineError(f"batch sizes rise from 1 or more: MIN <= OPT <= MAX; got {self}")

    def __str__(self) -> str:
        return f"{self.least}:{self.best}:{self.most}"

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """From "MIN:OPT:MAX", or one number for all three.

        Raises:
            EngineError: the text is neither, or the numbers do not rise.
        """
        if not re.fullmatch(r"\d{1,6}(:\d{1,6}:\d{1,6})?", text):
            raise EngineError(f"batch sizes are MIN:OPT:MAX, such as 1:1:8, or one number; got {text!r}")
        numbers = [int(number) for number in text.split(":")]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))


@dataclass(frozen=True)
class Target:
    """One graph to build. `name`: for people. `file`: where it lies. `inputs`, `outputs`: as far as they are known.

    `precision`: the bundle's name of it. `computes_in`: the narrowest number format of its matrix products.
    `lengths`: least, best and greatest of every named axis but the batch.
    """

    name: str
    file: str
    graph: Graph
    precision: str
    computes_in: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    lengths: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def shapes(self, batch: int, place: int = _MOST) -> dict[str, tuple[int, ...]]:
        """Of the inputs, at a batch size. `place`: 0, 1, 2 for the least, best and greatest of other axes."""
        return {spec.name: self._size(spec, batch, place) for spec in self.inputs}

    def buffers(self, batch: int) -> int:
        """Bytes of the inputs and outputs, at a batch size and the greatest of other axes."""
        specs = (*self.inputs, *self.outputs)
        return sum(math.prod(self._size(spec, batch, _MOST)) * ITEM_BYTES[spec.dtype] for spec in specs)

    def profile(self, batch: Batch) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Least, best and greatest shape of each input."""
        batches = (batch.least, batch.best, batch.most)
        least, best, most = (self.shapes(size, place) for place, size in enumerate(batches))
        return {name: (least[name], best[name], most[name]) for name in least}

    def describe_profile(self, batch: Batch) -> str:
        """The sizes in one line, "1:1:8 tokens=1:77:512", by which engines in the cache differ."""
        lengths = (f" {name}={':'.join(map(str, three))}" for name, three in sorted(self.lengths.items()))
        return f"{batch}{''.join(lengths)}"

    def _size(self, spec: Tensor, batch: int, place: int) -> tuple[int, ...]:
        sizes = {name: three[place] for name, three in self.lengths.items()} | {"batch": batch}
        return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
