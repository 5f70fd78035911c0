"""Which architectures there are: for each, how a network of it is made of its description.

To add one, write a `FlowNetwork` with `describe` and `from_description`, and a line in `FAMILIES`. One that
`train-teacher` trains from scratch has a dataclass of its sizes too, and a line in `ARCHITECTURES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from piflow_edge.conditioning import Conditioner
from piflow_edge.errors import CheckpointError, DataError

from .diffusers_networks import build_diffusers
from .dit import DiTConfig
from .flow_network import DiTNetwork, FlowNetwork
from .text_dit import TextDiTConfig, TextDiTNetwork

Architecture = DiTConfig | TextDiTConfig

# Sizes of an architecture -> a network with random weights.
ARCHITECTURES: dict[type, Callable[[Any], FlowNetwork]] = {
    DiTConfig: DiTNetwork,
    TextDiTConfig: TextDiTNetwork,
}
# Name in checkpoints -> what makes the network of its description; the weights mean nothing yet.
FAMILIES: dict[str, Callable[[Mapping[str, Any]], FlowNetwork]] = {
    DiTNetwork.family: DiTNetwork.from_description,
    TextDiTNetwork.family: TextDiTNetwork.from_description,
    "diffusers": build_diffusers,
}


def new_network(architecture: Architecture) -> FlowNetwork:
    """Return a network of these sizes, with random weights of torch's own generator."""
    return ARCHITECTURES[type(architecture)](architecture)


def fit_architecture(shape: tuple[int, ...], conditioner: Conditioner, **sizes: int) -> Architecture:
    """Return the architecture that `train-teacher` trains on states (C, H, W) steered by `conditioner`.

    Args:
        sizes: patch_size, hidden_size, depth and num_heads, where they are not the architecture's own.

    Raises:
        DataError: none is steered by that.
    """
    for kind in ARCHITECTURES:
        if fitting := kind.fitting(shape, conditioner, **sizes):
            return fitting
    raise DataError(
        "a teacher is trained on images with labels, or with encodings of text (a float32 array "
        f"encoder_hidden_states, a mask encoder_attention_mask, pooled_projections); here {conditioner.summarize()}"
    )


def check_family(description: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the description is of a family that is known."""
    family = description.get("family")
    if family not in FAMILIES:
        raise CheckpointError(f"architectures that are known: {', '.join(FAMILIES)}; got {family!r}")


def build_network(description: Mapping[str, Any]) -> FlowNetwork:
    """Return the teacher's architecture that `describe` described; the weights mean nothing yet.

    Raises:
        CheckpointError: the description is of no family that is known, or lacks something.
    """
    check_family(description)
    try:
        return FAMILIES[description["family"]](description)
    except (TypeError, KeyError, AttributeError) as error:
        known = ", ".join(
            f"{name.__name__}: {', '.join(name.__dataclass_fields__)}" for name in ARCHITECTURES
        )
        raise CheckpointError(
            f"the architecture cannot be read: {error}; a configuration holds the fields of its class ({known})"
        ) from error
