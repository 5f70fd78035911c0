"""What every conditioner can do, and what a caller can ask one for."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from piflow_edge.errors import ConditioningError

from .mapping import Conditioning, count_of
from .specs import TensorSpec, convert_array

ReadAsset = Callable[[str], bytes]
RunNetwork = Callable[[str, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class ConditionRequest:
    """What a caller wants to see, before a conditioner has read it. What is None was not given.

    `labels`: class ids or names. `prompts`: texts. `arrays`: the network's inputs, made elsewhere. `count`: images of
    each of those; in all where nothing else is given.
    """

    labels: Any = None
    prompts: Any = None
    arrays: Mapping[str, Any] | None = None
    count: int | None = None


# The fields beside `count`, of which a kind understands some.
_GIVEN = tuple(field.name for field in fields(ConditionRequest) if field.name != "count")


class Conditioner(Protocol):
    """Knows what the conditioning of one model means; the rest of the project only hands the arrays on.

    Where a bundle is read, a conditioner is a plain description. Whoever opens the bundle calls `open` with its
    networks and assets and uses what that returns: one whose `encode` runs networks (text) is then another object.

    `kind`: its name in JSON. `positional`: the field of `ConditionRequest` that the first argument of `generator(...)`
    fills.
    """

    kind: ClassVar[str]
    positional: ClassVar[str]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it feeds the network."""
        ...

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the bundle's networks that `open` needs to make it read what people write; most need none."""
        ...

    def open(self, read_asset: ReadAsset, run_network: RunNetwork) -> "Conditioner":
        """Return the conditioner that `encode` can be called on, with what it needs of a bundle; most need nothing.

        Args:
            read_asset: bytes of an asset, by its name.
            run_network: one call of a network, by its name: inputs by name -> outputs by name.
        """
        ...

    def encode(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """Return the conditioning. It is for `count_of(conditioning, asked.count)` images.

        Raises:
            ConditioningError: something else is asked for than it understands; LabelError: a label it does not know.
            ShapeError: an array that does not fit `inputs`.
        """
        ...

    def example_prompts(self, count: int) -> list[str]:
        """Return the prompts whose encodings `example` returns; empty where no prompts are read."""
        ...

    def trace(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """Return what comes before the network's inputs, such as token ids, by stage; `verify` compares it exactly."""
        ...

    def null(self, count: int) -> dict[str, np.ndarray] | None:
        """Return what guidance calls "no condition" for `count` images; None where there is none."""
        ...

    def example(self, count: int) -> dict[str, np.ndarray]:
        """Return a valid conditioning of `count` images, always the same, to try a network with."""
        ...

    def describe(self, request: ConditionRequest, conditioning: Conditioning) -> list[dict[str, Any]]:
        """Return what steers each image, as JSON: for its recipe and for reports.

        `conditioning`: what `encode` made of `request`.
        """
        ...

    def recall(self, descriptions: Sequence[dict[str, Any]], request: ConditionRequest) -> ConditionRequest:
        """Return what to ask for to get the images of these descriptions again, one each.

        `request`: what a description cannot hold and the caller gives again, such as arrays.

        Raises:
            ConditioningError: the descriptions are none of its own, or what is given is something else.
        """
        ...

    def title(self, description: dict[str, Any]) -> str:
        """Return a few words for an image of this description. Images with one title show the same thing."""
        ...

    def summarize(self) -> str:
        """Return what it takes in one line, for people and for the end of an error message."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the description from which `conditioner_from_json` makes it again."""
        ...


class ConditionerKind(Conditioner, Protocol):
    """A conditioner that a manifest can describe, as all are but those that `open` returns."""

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> Any:
        """Make it from `to_json`; ConditioningError for anything else."""
        ...


class PlainConditioner:
    """The answers of a conditioner that needs no network to read what people write, and has no "no condition"."""

    @property
    def networks(self) -> tuple[str, ...]:
        return ()

    def open(self, read_asset: ReadAsset, run_network: RunNetwork) -> Any:
        return self

    def example_prompts(self, count: int) -> list[str]:
        return []

    def trace(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        return {}

    def null(self, count: int) -> dict[str, np.ndarray] | None:
        return None


def build_condition_request(conditioner: Conditioner, subject: Any = None, **named: Any) -> ConditionRequest:
    """Return a call's arguments: `subject` came first and without a name, and fills the field that fits the kind."""
    if subject is not None:
        if named.get(conditioner.positional) is not None:
            raise ConditioningError(
                f"{conditioner.positional} are given twice: {subject!r} is the first argument"
            )
        named[conditioner.positional] = subject
    return ConditionRequest(**named)


def refuse_others(conditioner: Conditioner, request: ConditionRequest, *understood: str) -> None:
    """Raise ConditioningError if `request` holds anything but these fields and `count`, or a `count` below 1."""
    for name in _GIVEN:
        value = getattr(request, name)
        if value is not None and name not in understood:
            raise ConditioningError(
                f"{name} have no meaning here; {conditioner.summarize()}; got {_short(value)}"
            )
    count = request.count
    if count is not None and (
        isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1
    ):
        raise ConditioningError(f"count is a whole number, 1 or more; got {count!r}")


def convert_arrays(conditioner: Conditioner, arrays: Any) -> dict[str, np.ndarray]:
    """Return arrays of a caller as the conditioner's inputs: all of them, of one batch, with axes that agree."""
    specs = {spec.name: spec for spec in conditioner.inputs}
    wanted = "; ".join(map(str, conditioner.inputs)) or "none"
    if not isinstance(arrays, Mapping):
        raise ConditioningError(f"arrays are given by name: {wanted}; got {_short(arrays)}")
    if unknown := [name for name in arrays if name not in specs]:
        raise ConditioningError(f"the network has no input {unknown[0]!r}; it takes: {wanted}")
    if missing := [name for name in specs if name not in arrays]:
        raise ConditioningError(f"the input {missing[0]!r} is missing; the network takes: {wanted}")
    axes: dict[str, int] = {}
    converted = {name: convert_array(arrays[name], spec, axes) for name, spec in specs.items()}
    if count_of(converted) == 0:
        raise ConditioningError("give arrays of one image or more; got none")
    return converted


def repeat(conditioning: Conditioning, count: int | None) -> dict[str, np.ndarray]:
    """Return every entry `count` times in a row; None is once."""
    if count in (None, 1):
        return dict(conditioning)
    return {name: np.repeat(array, count, axis=0) for name, array in conditioning.items()}


def require_keys(kind: str, body: Any, *keys: str) -> None:
    """Raise ConditioningError unless a JSON object holds `kind` and these keys and no others."""
    if not isinstance(body, dict) or set(body) != {"kind", *keys}:
        got = sorted(body) if isinstance(body, dict) else body
        raise ConditioningError(
            f"conditioning of kind {kind!r} holds {', '.join(('kind', *keys))}; got {got!r}"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
