"""One class per image, such as a digit."""

import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from piflow_edge.errors import ConditioningError, LabelError

from .base import ConditionRequest, PlainConditioner, convert_arrays, refuse_others, repeat, require_keys
from .mapping import Conditioning
from .specs import TensorSpec

# More names than this are not listed in a message.
_LISTED = 20
_MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class ClassLabels(PlainConditioner):
    """Steers by class. `names`: of the classes, in the order of their ids. `input_name`: of the network's input.

    The id after the last class is guidance's "no condition".
    """

    names: tuple[str, ...]
    input_name: str = "labels"

    kind: ClassVar[str] = "class"
    positional: ClassVar[str] = "labels"

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))  # JSON has lists
        if not self.names:
            raise ConditioningError("class labels need one class or more; got none")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.input_name, "int64", ("batch",)),)

    def encode(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """Ids of `asked.labels`: ids, names, or texts such as "3,7", "0-9" and "all". Or ids in `asked.arrays`."""
        refuse_others(self, request, "labels", "arrays")
        if (request.labels is None) == (request.arrays is None):
            raise LabelError(f"give labels, one per image; {self.summarize()}")
        if request.arrays is not None:
            ids = self._known_ids(convert_arrays(self, request.arrays)[self.input_name])
        else:
            ids = np.array(self._ids(request.labels), np.int64)
        return repeat({self.input_name: ids}, request.count)

    def null(self, count: int) -> dict[str, np.ndarray]:
        return {self.input_name: np.full(count, len(self.names), np.int64)}

    def example(self, count: int) -> dict[str, np.ndarray]:
        return {self.input_name: np.arange(count) % len(self.names)}

    def describe(self, request: ConditionRequest, conditioning: Conditioning) -> list[dict[str, Any]]:
        return [{"label": int(label)} for label in conditioning[self.input_name]]

    @staticmethod
    def describe_labels(labels: Sequence[int]) -> list[dict[str, Any]]:
        """Return the descriptions of images of these classes; recipes once held the plain ids."""
        return [{"label": label} for label in labels]

    def recall(self, descriptions: Sequence[dict[str, Any]], request: ConditionRequest) -> ConditionRequest:
        if request != ConditionRequest():
            raise ConditioningError("the description holds the labels; give nothing else")
        labels = [description.get("label") for description in descriptions]
        if any(
            type(label) is not int or set(d) != {"label"}
            for label, d in zip(labels, descriptions, strict=True)
        ):
            raise ConditioningError(f"a description holds one label; got {descriptions[0]!r} and so on")
        return ConditionRequest(labels=labels)

    def title(self, description: dict[str, Any]) -> str:
        return self.names[description["label"]]

    def summarize(self) -> str:
        count = len(self.names)
        listed = ", ".join(self.names) if count <= _LISTED else f"{', '.join(self.names[:_LISTED])}, ..."
        plural = f"{count} classes, 0 to {count - 1}" if count > 1 else "1 class, 0"
        return f"there are {plural}: {listed}" if count > 1 else f"there is {plural}: {listed}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "names": list(self.names), "input": self.input_name}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "ClassLabels":
        require_keys(cls.kind, body, "names", "input")
        names, input_name = body["names"], body["input"]
        texts = isinstance(names, list) and 0 < len(names) <= _MOST_CLASSES and {*map(type, names)} == {str}
        if not texts or type(input_name) is not str or not input_name:
            raise ConditioningError(
                "conditioning of kind 'class' holds names, a list of texts, and input, a text"
            )
        return cls(tuple(names), input_name)

    def _ids(self, labels: Any) -> list[int]:
        if not isinstance(labels, list):
            single = isinstance(labels, (numbers.Number, str, bytes))
            labels = [labels] if single else np.atleast_1d(np.asarray(labels, object)).ravel().tolist()
        ids = [i for label in labels for i in self._ids_of(label)]
        if not ids:
            raise LabelError(f"give one label or more; {self.summarize()}")
        return ids

    def _ids_of(self, label: Any) -> Sequence[int]:
        """The ids that one entry stands for; a name goes before every other reading of a text."""
        if isinstance(label, str):
            if label in self.names:
                return [self.names.index(label)]
            return [i for part in label.split(",") for i in self._read_part(part.strip())]
        if type(label) is int or (isinstance(label, numbers.Integral) and not isinstance(label, bool)):
            return [self._known_id(int(label), label)]
        raise self._refusal(label)

    def _read_part(self, text: str) -> Sequence[int]:
        if text in self.names:
            return [self.names.index(text)]
        if text == "all":
            return range(len(self.names))
        if re.fullmatch(r"\d{1,9}", text, re.ASCII):
            return [self._known_id(int(text), int(text))]
        if ends := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text, re.ASCII):
            first, last = (self._known_id(int(end), text) for end in ends.groups())
            if first <= last:
                return range(first, last + 1)
        raise self._refusal(text)

    def _known_id(self, number: int, label: Any) -> int:
        if not 0 <= number < len(self.names):
            raise self._refusal(label)
        return number

    def _known_ids(self, ids: np.ndarray) -> np.ndarray:
        outside = ids[(ids < 0) | (ids >= len(self.names))]
        if len(outside):
            raise self._refusal(int(outside[0]))
        return ids

    def _refusal(self, label: Any) -> LabelError:
        hint = ""
        if isinstance(label, str):
            import difflib  # late: only errors need it

            by_case = {name.casefold(): name for name in self.names}
            close = difflib.get_close_matches(label.casefold(), by_case, n=1)
            hint = f" (did you mean {by_case[close[0]]!r}?)" if close else ""
        return LabelError(f"got label {label!r}{hint}; {self.summarize()}")
