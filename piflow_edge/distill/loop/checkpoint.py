"""Checkpoints: a folder with `checkpoint.json` and the safetensors file it names.

The weights are written first, under a new name; replacing `checkpoint.json` is the one step that counts. Killed at
any moment, the folder holds the previous checkpoint or the new one, never a mixture.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from piflow_edge.conditioning import (
    Arrays,
    ClassLabels,
    Conditioner,
    TensorSpec,
    Unconditional,
    conditioner_from_json,
)
from piflow_edge.errors import CheckpointError, ConditioningError
from piflow_edge.system.files import sha256, write_atomic

FORMAT_VERSION = 3
_KEYS = {"format_version", "kind", "iteration", "network", "settings", "conditioning", "file", "sha256"}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, and what is needed to go on training it.

    `kind`: "teacher" or "student". `iteration`: optimiser steps taken. `network`: JSON of its architecture, see
    `networks.describe`. `settings`: JSON of how it was trained; for a student the imitation settings and where its
    teacher came from. `conditioner`: what steers it. `tensors`: `ema.*` the weights to use; when training can go on
    also `raw.*` and `adam.*`.
    """

    kind: str
    iteration: int
    network: dict[str, Any]
    settings: dict
    conditioner: Conditioner
    tensors: dict[str, Tensor] = field(repr=False)

    def fingerprint(self) -> str:
        """SHA-256 of the averaged weights: the same network has the same, wherever its files are."""
        return sha256(save_tensors({k: v.contiguous() for k, v in self.group("ema").items()}))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix.`, without it."""
        start = prefix + "."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], *, trained_only: bool = False) -> None:
    """Copy `weights` into the network.

    Args:
        trained_only: the weights are those of the parameters that require gradients, not of all.

    Raises:
        CheckpointError: names or shapes that are not this architecture's.
    """
    own = {name: p for name, p in network.named_parameters() if p.requires_grad or not trained_only}
    expected = {k: tuple(v.shape) for k, v in own.items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        name = wrong[0]
        raise CheckpointError(
            f"the weights are of another architecture: {name!r} should be {expected.get(name, 'absent')}, is "
            f"{found.get(name, 'absent')} ({len(wrong)} such tensors); use the checkpoint this run was started from"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def state_dict(source: Path | Mapping[str, Tensor], *, widen: bool = True) -> dict[str, Tensor]:
    """Weights from a `.pt`, `.pth` or `.safetensors` file; of a training checkpoint the averaged ones.

    A leading "module." of a wrapped network is taken off the names. They are in float32, or with `widen=False` of the
    type that they are stored in.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    weights: Any = source
    if not isinstance(source, Mapping):
        try:
            if Path(source).suffix == ".safetensors":
                from safetensors.torch import load_file

                weights = load_file(source)
            else:
                weights = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds
            if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
                raise CheckpointError(
                    f"{source} is not read: it is a pickle that would run code ({found[1]}); where you trust it, save "
                    "its tensors alone, as safetensors"
                ) from error
            raise CheckpointError(f"{source} cannot be read as a checkpoint: {error}") from error
    for key in ("ema", "state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
            break
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        what = "the given one" if isinstance(source, Mapping) else source
        raise CheckpointError(
            f"a state dict is names and tensors, alone or under 'ema', 'state_dict' or 'model'; {what} holds something "
            "else; save the module's state_dict() alone"
        )
    return {
        name.removeprefix("module."): tensor.float() if widen else tensor for name, tensor in weights.items()
    }


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into `folder`; the one that was there stays whole until the new one is."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({k: v.contiguous() for k, v in checkpoint.tensors.items()})
    digest = sha256(data)
    # Named after its content: a new file never overwrites the one that checkpoint.json points to.
    name = f"weights-{checkpoint.iteration:07d}-{digest[:8]}.safetensors"
    description = {
        "format_version": FORMAT_VERSION,
        "kind": checkpoint.kind,
        "iteration": checkpoint.iteration,
        "network": checkpoint.network,
        "settings": checkpoint.settings,
        "conditioning": checkpoint.conditioner.to_json(),
        "file": name,
        "sha256": digest,
    }
    write_atomic(folder / name, data)
    write_atomic(folder / "checkpoint.json", (json.dumps(description, indent=2) + "\n").encode())
    for stale in folder.glob("weights-*.safetensors"):
        if stale.name != name:
            stale.unlink()


def load_checkpoint(folder: Path, *, kind: str | None = None) -> Checkpoint:
    """Read the checkpoint in `folder`.

    Raises:
        CheckpointError: there is none, it is damaged or of another version, or of another kind than asked for.
    """
    folder = Path(folder)
    description = _read_description(folder)
    if kind is not None and description["kind"] != kind:
        raise CheckpointError(f"{folder} holds a {description['kind']}; this needs a {kind}")
    try:
        conditioner = conditioner_from_json(description["conditioning"])
    except ConditioningError as error:
        raise CheckpointError(f"{folder / 'checkpoint.json'} cannot be used: {error}") from error
    tensors = _read_tensors(folder, description["file"], description["sha256"])
    return Checkpoint(
        description["kind"],
        description["iteration"],
        description["network"],
        description["settings"],
        conditioner,
        tensors,
    )


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        description = json.loads((folder / "checkpoint.json").read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"a checkpoint is a folder with checkpoint.json; there is none in {folder}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'checkpoint.json'} cannot be read: {error}") from error
    if isinstance(description, dict) and description.get("format_version") == 2:
        description = _from_format_2(description)
    if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is not a checkpoint of version {FORMAT_VERSION}; train it again, or use the release that made it"
        )
    if set(description) != _KEYS:
        odd = ", ".join(sorted(set(description) ^ _KEYS))
        raise CheckpointError(f"{folder / 'checkpoint.json'} has missing or unknown keys: {odd}")
    return description


def _read_tensors(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    if Path(name).name != name:
        raise CheckpointError(f"{folder / 'checkpoint.json'} points outside its folder: {name!r}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is incomplete: {name} cannot be read ({error.strerror})") from error
    if sha256(data) != digest:
        raise CheckpointError(f"{name} in {folder} does not match its checksum; copy the checkpoint again")
    try:
        return load_tensors(data)
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from error


def _from_format_2(description: dict) -> dict:
    """A description of format 2, which knew names of classes and, in a student's settings, shapes of arrays."""
    body = {**description, "format_version": FORMAT_VERSION}
    names = body.pop("class_names", ())
    shapes = body.get("settings", {}).get("conditioning", {})
    if names and set(shapes) <= {"labels"}:
        conditioner: Conditioner = ClassLabels(names)
    elif shapes:
        specs = (TensorSpec(name, s["dtype"], ("batch", *s["shape"])) for name, s in shapes.items())
        conditioner = Arrays(tuple(specs))
    else:
        conditioner = Unconditional()
    return {**body, "conditioning": conditioner.to_json()}


def inference_only(checkpoint: Checkpoint, dtype: torch.dtype = torch.float16) -> Checkpoint:
    """The checkpoint with nothing but its averaged weights, in `dtype`: small enough to ship."""
    tensors = {f"ema.{k}": v.to(dtype) for k, v in checkpoint.group("ema").items()}
    return replace(checkpoint, tensors=tensors)
