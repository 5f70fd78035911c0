"""Plain arrays, such as encodings of a text that was encoded elsewhere."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from piflow_edge.errors import ConditioningError

from .base import (
    Conditioner,
    ConditionRequest,
    PlainConditioner,
    convert_arrays,
    refuse_others,
    repeat,
    require_keys,
)
from .mapping import Conditioning, count_of, take
from .specs import TensorSpec

# Length of a named axis of examples that nobody gave, such as tokens.
_EXAMPLE_LENGTH = 8
_DTYPES = ("float32", "float16", "int64", "int32", "bool")


class ArrayConditioner(PlainConditioner):
    """What steers by arrays has of them alone: to check, to show, and to name images that were made of them."""

    inputs: tuple[TensorSpec, ...]

    def encode(self: Conditioner, request: ConditionRequest) -> dict[str, np.ndarray]:
        return _encode(self, request)

    def example(self, count: int) -> dict[str, np.ndarray]:
        """Random numbers in the place of encodings: to time a network, not to look at its images."""
        random = np.random.default_rng(0)
        return {spec.name: _example(spec, count, random) for spec in self.inputs}

    def describe(self, request: ConditionRequest, conditioning: Conditioning) -> list[dict[str, Any]]:
        """The SHA-256 of every array of an image, of its bytes in little endian."""
        return [
            {"sha256": {spec.name: _digest(conditioning[spec.name][index]) for spec in self.inputs}}
            for index in range(count_of(conditioning) or 0)
        ]

    def recall(
        self: Conditioner, descriptions: Sequence[dict[str, Any]], request: ConditionRequest
    ) -> ConditionRequest:
        given, count = _encode(self, request), len(descriptions)
        if count_of(given) == 1:
            given = repeat(given, count)
        if count_of(given) != count:
            raise ConditioningError(f"give arrays of {count} images; got {count_of(given)}")
        for index, (found, wanted) in enumerate(
            zip(self.describe(request, given), descriptions, strict=True)
        ):
            if found != wanted:
                raise ConditioningError(
                    f"the arrays of image {index} are other ones than those it was made from"
                )
        return ConditionRequest(arrays=given)

    def title(self, description: dict[str, Any]) -> str:
        """Return a short name for an image, of its digests."""
        return hashlib.sha256("".join(description["sha256"].values()).encode()).hexdigest()[:8]


def _encode(conditioner: Conditioner, request: ConditionRequest) -> dict[str, np.ndarray]:
    refuse_others(conditioner, request, "arrays")
    if request.arrays is None:
        raise ConditioningError(f"give arrays; {_list_inputs(conditioner.inputs)}")
    return repeat(convert_arrays(conditioner, request.arrays), request.count)


@dataclass(frozen=True)
class Arrays(ArrayConditioner):
    """Steers by arrays as they are. `inputs`: their names, dtypes and shapes.

    `null_row`: an array (1, ...) for every input, which stands for "no condition"; it may have another length than what
    is given along a named axis. `rows`: arrays (M, ...) that were seen in training, for `example`. Neither is part of
    the JSON: a bundle has no use for the first, and keeps examples in its golden samples.
    """

    inputs: tuple[TensorSpec, ...]
    null_row: Mapping[str, np.ndarray] | None = field(default=None, compare=False)
    rows: Mapping[str, np.ndarray] | None = field(default=None, compare=False)

    kind: ClassVar[str] = "arrays"
    positional: ClassVar[str] = "arrays"

    def __post_init__(self):
        object.__setattr__(self, "inputs", tuple(self.inputs))
        for spec in self.inputs:
            if not spec.shape or spec.shape[0] != "batch":
                raise ConditioningError(f"the first axis of an input is 'batch'; got {spec}")
        for name in ("null_row", "rows"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, convert_arrays(self, given))

    def null(self, count: int) -> dict[str, np.ndarray] | None:
        return None if self.null_row is None else repeat(self.null_row, count)

    def example(self, count: int) -> dict[str, np.ndarray]:
        if self.rows is None:
            return super().example(count)
        return take(self.rows, np.arange(count) % (count_of(self.rows) or 1))

    def summarize(self) -> str:
        return _list_inputs(self.inputs)

    def to_json(self) -> dict[str, Any]:
        inputs = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in self.inputs]
        return {"kind": self.kind, "inputs": inputs}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Arrays":
        require_keys(cls.kind, body, "inputs")
        return cls(specs_from_json(cls.kind, body["inputs"]))


def specs_from_json(kind: str, inputs: Any) -> tuple[TensorSpec, ...]:
    """Return the inputs of a network that JSON lists for conditioning of this kind.

    Raises:
        ConditioningError: no list of inputs, one without a name, dtype and shape, or two of one name.
    """
    if not isinstance(inputs, list) or not inputs or not all(map(_is_spec, inputs)):
        raise ConditioningError(
            f"conditioning of kind {kind!r} holds inputs, each with a name, a dtype and a shape; "
            f"dtypes are {', '.join(_DTYPES)}"
        )
    specs = tuple(TensorSpec(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in inputs)
    if len({spec.name for spec in specs}) < len(specs):
        raise ConditioningError(f"two inputs have one name: {', '.join(spec.name for spec in specs)}")
    return specs


def _list_inputs(inputs: Sequence[TensorSpec]) -> str:
    return f"the network takes arrays: {'; '.join(map(str, inputs))}"


def _is_spec(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"name", "dtype", "shape"}:
        return False
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    texts = type(name) is str and name and dtype in _DTYPES
    return bool(texts) and isinstance(shape, list) and 0 < len(shape) <= 8 and all(map(_is_length, shape))


def _is_length(length: Any) -> bool:
    return (type(length) is str and bool(length)) or (type(length) is int and 0 < length < 2**31)


def _example(spec: TensorSpec, count: int, random: "np.random.Generator") -> np.ndarray:
    axes = {length: _EXAMPLE_LENGTH for length in spec.shape if isinstance(length, str)} | {"batch": count}
    size, dtype = spec.size(axes), np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.standard_normal(size).astype(dtype)
    return np.ones(size, dtype)  # a mask that hides nothing


def _digest(array: np.ndarray) -> str:
    plain = np.ascontiguousarray(array)
    return hashlib.sha256(plain.astype(plain.dtype.newbyteorder("<")).tobytes()).hexdigest()
