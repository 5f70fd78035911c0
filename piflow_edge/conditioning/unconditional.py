"""Nothing steers: every image is another one of what the model was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from piflow_edge.errors import ConditioningError

from .base import ConditionRequest, PlainConditioner, refuse_others, require_keys
from .mapping import Conditioning
from .specs import TensorSpec


@dataclass(frozen=True)
class Unconditional(PlainConditioner):
    """Steers by nothing; a caller says how many images to make."""

    kind: ClassVar[str] = "none"
    positional: ClassVar[str] = "count"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return ()

    def encode(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        if request.arrays is not None and not len(request.arrays):
            request = ConditionRequest(
                request.labels, request.prompts, None, request.count
            )  # no arrays are what it takes
        refuse_others(self, request)
        if request.count is None:
            raise ConditioningError(f"give count; {self.summarize()}")
        return {}

    def example(self, count: int) -> dict[str, np.ndarray]:
        return {}

    def describe(self, request: ConditionRequest, conditioning: Conditioning) -> list[dict[str, Any]]:
        return [{} for _ in range(request.count or 0)]

    def recall(self, descriptions: Sequence[dict[str, Any]], request: ConditionRequest) -> ConditionRequest:
        if request != ConditionRequest() or any(descriptions):
            raise ConditioningError("nothing steers these images; give nothing")
        return ConditionRequest(count=len(descriptions))

    def title(self, description: dict[str, Any]) -> str:
        return ""

    def summarize(self) -> str:
        return "nothing steers these images, a call takes their count"

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "Unconditional":
        require_keys(cls.kind, body)
        return cls()
