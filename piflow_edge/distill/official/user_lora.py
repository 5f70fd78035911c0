"""LoRA of the user's own on top of a student, in diffusers' format: added to the weights before export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from piflow_edge.distill.loop.checkpoint import state_dict
from piflow_edge.errors import CheckpointError

from .adapters import merge_lora
from .hub import find_files

# As diffusers saves them, and as they are named where there is one in a folder.
_FILE = "pytorch_lora_weights.safetensors"
_ALPHA, _DOWN = ".alpha", ".lora_A.weight"


@dataclass(frozen=True)
class UserLoRA:
    """A LoRA and how much of it. `source`: file, folder, `FOLDER:subfolder` or hub id."""

    source: str
    strength: float = 1.0


def add_user_lora(module: nn.Module, lora: UserLoRA) -> None:
    """Add a LoRA to a transformer's weights, in place.

    Raises:
        CheckpointError: nothing there; other names than diffusers'; layers that the transformer has not.
    """
    place = find_files(lora.source, ("*.safetensors",))
    weights = scale_by_alpha(state_dict(_choose_file(place)))
    if not any(name.endswith(_DOWN) for name in weights):
        example = next(iter(weights), "nothing")
        raise CheckpointError(
            f"{lora.source} has no LoRA by diffusers' names (layer{_DOWN}), but {example!r} and the like; load it with "
            "diffusers and save it again"
        )
    merge_lora(module, weights, lora.strength)


def scale_by_alpha(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the pairs of matrices by the transformer's names, scaled by alpha / rank where an alpha is given."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    alphas = {name.removesuffix(_ALPHA): v.item() for name, v in plain.items() if name.endswith(_ALPHA)}
    scaled = {name: tensor for name, tensor in plain.items() if not name.endswith(_ALPHA)}
    for layer, alpha in alphas.items():
        name = layer + _DOWN
        if name in scaled:
            scaled[name] = scaled[name] * (alpha / len(scaled[name]))
    return scaled


def _choose_file(place: Path) -> Path:
    if place.is_file():
        return place
    files = sorted(place.glob("*.safetensors"))
    if (place / _FILE) in files:
        return place / _FILE
    if len(files) != 1:
        raise CheckpointError(
            f"{place} has {len(files)} safetensors files and no {_FILE}; name the file of the LoRA"
        )
    return files[0]
