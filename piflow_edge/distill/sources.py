"""Where networks come from: a checkpoint of ours, a Python function, a diffusers folder or hub id, a SiT file."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_edge.errors import CheckpointError

from .checkpoint import Checkpoint, load_checkpoint, load_weights
from .dit import DiTConfig
from .heads import head_from_json
from .lora import LoRAConfig, fold_lora
from .networks import Convention, DiTNetwork, FlowNetwork, attach_policy_head

_WEIGHT_FILES = {".pt", ".pth", ".safetensors"}


@dataclass(frozen=True)
class TeacherModel:
    """A network to imitate.

    `network`: its weights are frozen. `class_names`: None where it does not know them. `provenance`: JSON, for the
    record; it names no folder of this machine.
    """

    network: FlowNetwork
    class_names: tuple[str, ...] | None
    provenance: dict[str, Any]


def load_teacher(
    source: str | Path, *, sample_shape: tuple[int, ...] | None = None, style: str = "sit"
) -> TeacherModel:
    """A teacher from wherever it is.

    Args:
        source: folder of a checkpoint that `train-teacher` left; "package.module:function", a function without
            arguments that returns a `FlowNetwork`; a SiT-like `.pt`, `.pth` or `.safetensors` file; else a folder or
            hub id that diffusers knows.
        sample_shape: (C, H, W) of the states, for files and transformers that run at several sizes.
        style: of a SiT-like file; see `sit.load_sit`.

    Raises:
        CheckpointError: nothing there, or nothing that can be used.
        MissingExtraError: what reads it is not installed.
    """
    text, path = str(source), Path(source)
    if (path / "checkpoint.json").is_file():
        return teacher_from_checkpoint(load_checkpoint(path, kind="teacher"), origin=str(path.resolve()))
    if path.suffix in _WEIGHT_FILES:
        from .sit import load_sit

        if sample_shape is None:
            raise CheckpointError(f"{text} does not say the size of its states; give sample_shape")
        network = load_sit(path, sample_size=tuple(sample_shape[1:]), style=style)
        origin = {"source": str(path.resolve()), "style": style}
        provenance = {"source": path.name, "style": style}
    elif ":" in text and not path.exists():
        network, origin = _from_entry(text), {"source": text}
        provenance = {"source": text}
    else:
        from .diffusers_networks import load_diffusers

        network = load_diffusers(text, sample_shape=sample_shape)
        origin = {"source": str(path.resolve()) if path.exists() else text}
        provenance = {"source": path.name}
    return _teacher(network, None, origin, provenance)


def teacher_from_checkpoint(checkpoint: Checkpoint, origin: str | None = None) -> TeacherModel:
    """A teacher that was trained here; `origin` is the folder, which a LoRA student is read back with."""
    network = network_of(checkpoint)
    return _teacher(network, checkpoint.class_names, {"source": origin}, {"settings": checkpoint.settings})


def network_of(checkpoint: Checkpoint) -> FlowNetwork:
    """The checkpoint's network with its averaged weights, in float32, ready to be called.

    Adapters of a LoRA student are folded into the weights, which are read from where the teacher was.

    Raises:
        CheckpointError: the weights are of another architecture, or a LoRA student's teacher is not what it was.
    """
    description = checkpoint.network
    lora = LoRAConfig(**description["lora"]) if description["lora"] else None
    network = _base(description["base"], description["sample_shape"]) if lora else build(description)
    if description["head"]:
        network = attach_policy_head(network, head_from_json(description["head"]), lora=lora)
    load_weights(network, checkpoint.group("ema"), trained_only=lora is not None)
    if lora:
        fold_lora(network)
    return network.eval().requires_grad_(False)


def build(description: Mapping[str, Any]) -> FlowNetwork:
    """The teacher's architecture that `networks.describe` described; the weights mean nothing yet.

    Raises:
        CheckpointError: it was made by a function that is not known or no longer there.
    """
    try:
        if description["family"] == "dit":
            return DiTNetwork(DiTConfig(**description["config"]), Convention(**description["convention"]))
        if description["family"] == "diffusers":
            from .diffusers_networks import build_diffusers

            return build_diffusers(description)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's architecture cannot be read: {error}") from error
    if description.get("entry") is None:
        raise CheckpointError(
            "the checkpoint's network was made in Python; load its teacher by 'package.module:function' "
            "when you distil, so that it can be made again"
        )
    return _from_entry(description["entry"])


def _base(base: Mapping[str, Any], sample_shape) -> FlowNetwork:
    if base.get("source") is None:
        raise CheckpointError("a LoRA student needs its teacher; this one's was not loaded from anywhere")
    teacher = load_teacher(base["source"], sample_shape=tuple(sample_shape), style=base.get("style", "sit"))
    if teacher.provenance["sha256"] != base["sha256"]:
        raise CheckpointError(
            f"a LoRA student needs the teacher it was distilled from; the weights at {base['source']} have changed"
        )
    return teacher.network


def _from_entry(entry: str) -> FlowNetwork:
    module, _, function = entry.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"a teacher in Python is 'package.module:function', importable from here; {entry!r}: {error}"
        ) from error
    if not isinstance(network, FlowNetwork):
        raise CheckpointError(f"{entry} must return a FlowNetwork; it returned a {type(network).__name__}")
    if hasattr(network, "entry"):
        network.entry = entry
    return network.requires_grad_(False)


def _teacher(network, class_names, origin, provenance) -> TeacherModel:
    fingerprint = network.fingerprint()
    network.origin = {**origin, "sha256": fingerprint}
    return TeacherModel(network, class_names, {"sha256": fingerprint, **provenance})
