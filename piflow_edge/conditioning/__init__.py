"""What steers an image: class labels, prompts, plain arrays, or nothing.

`Conditioning` travels everywhere as a mapping from a network's input to an array (B, ...). Only a `Conditioner` knows
what it means: it makes the arrays of what a caller asks for, describes them in a recipe, and says what "no condition"
is. To add a kind, write a class with the methods of `Conditioner` in a file of its own and a line in `CONDITIONERS`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from piflow_edge.errors import ConditioningError

from .arrays import Arrays
from .base import Conditioner, ConditionerKind, ConditionRequest, build_condition_request
from .class_labels import ClassLabels
from .mapping import Conditioning, concatenate, count_of, take
from .specs import TensorSpec
from .unconditional import Unconditional

if TYPE_CHECKING:
    from .text import OpenedTextPrompts, TextEncoderSpec, TextPrompts

# The one registry: name in JSON -> where the class lives. Few bundles read prompts, so that their module loads late.
CONDITIONERS = {
    "class": "piflow_edge.conditioning.class_labels:ClassLabels",
    "text": "piflow_edge.conditioning.text:TextPrompts",
    "arrays": "piflow_edge.conditioning.arrays:Arrays",
    "none": "piflow_edge.conditioning.unconditional:Unconditional",
}
_OF_TEXT = ("OpenedTextPrompts", "TextEncoderSpec", "TextPrompts")

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
    "find_conditioner_kind",
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
    return find_conditioner_kind(kind).from_json(body)


def find_conditioner_kind(kind: str) -> type[ConditionerKind]:
    """Return the class of one of `CONDITIONERS`."""
    module, _, name = CONDITIONERS[kind].partition(":")
    return getattr(import_module(module), name)


def __getattr__(name: str) -> Any:
    if name in _OF_TEXT:
        return getattr(import_module(".text", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
