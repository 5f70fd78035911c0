"""What steers an image: class labels, prompts, plain arrays, or nothing.

`Conditioning` travels everywhere as a mapping from a network's input to an array (B, ...). Only a `Conditioner` knows
what it means: it makes the arrays of what a caller asks for, describes them in a recipe, and says what "no condition"
is. To add a kind, write a class with the methods of `Conditioner` in a file of its own and a line in `CONDITIONERS`.
"""

from typing import Any

from piflow_edge.errors import ConditioningError

from .arrays import Arrays
from .base import Conditioner, ConditionerKind, ConditionRequest, build_condition_request
from .class_labels import ClassLabels
from .mapping import Conditioning, concatenate, count_of, take
from .specs import TensorSpec
from .text import OpenedTextPrompts, TextEncoderSpec, TextPrompts
from .unconditional import Unconditional

# The one registry: name in JSON -> class.
CONDITIONERS: dict[str, type[ConditionerKind]] = {
    kind.kind: kind for kind in (ClassLabels, TextPrompts, Arrays, Unconditional)
}

__all__ = [
    "CONDITIONERS",
    "Arrays",
    "ClassLabels",
    "ConditionRequest",
    "Conditioner",
    "Conditioning",
    "OpenedTextPrompts",
    "TensorSpec",
    "TextEncoderSpec",
    "TextPrompts",
    "Unconditional",
    "build_condition_request",
    "concatenate",
    "conditioner_from_json",
    "count_of",
    "take",
]


def conditioner_from_json(body: Any) -> Conditioner:
    """Make the conditioner that `to_json` described. The text may be anybody's: every value is checked.

    Raises:
        ConditioningError: an unknown kind, unknown keys or values that make no sense.
    """
    kind = body.get("kind") if isinstance(body, dict) else None
    if not isinstance(kind, str) or kind not in CONDITIONERS:
        raise ConditioningError(
            f"this release knows conditioning of kind {', '.join(CONDITIONERS)}; got {kind!r}"
        )
    return CONDITIONERS[kind].from_json(body)
