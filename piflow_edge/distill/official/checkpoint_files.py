"""Files of the authors' students: a diffusers folder, a `.pth` as released, a training checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from piflow_edge.distill.loop.checkpoint import state_dict
from piflow_edge.errors import CheckpointError

_WEIGHTS, _CONFIG = "diffusion_pytorch_model", "config.json"
# In training checkpoints: the averaged weights, which are those that were published, and the others.
_PREFIXES = ("diffusion_ema.denoising.", "diffusion.denoising.")


@dataclass(frozen=True)
class OfficialFiles:
    """What the files of one student say.

    Args:
        class_name: the authors' class; "" where no configuration says it.
        config: its constructor's arguments.
        weights: as they are stored, by the authors' names; of a training checkpoint the averaged ones.
        policy: the policy's JSON, as the authors' exporter records it; {} where no file says it.
    """

    class_name: str
    config: Mapping[str, Any]
    weights: dict[str, Tensor] = field(repr=False)
    policy: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """The weights of that name, in float32; CheckpointError where there are none."""
        if name not in self.weights:
            raise CheckpointError(f"this is no {self.class_name or 'student'} of pi-Flow: it lacks {name!r}")
        return self.weights[name].float()


def read_official_files(path: Path, config: Path | None = None) -> OfficialFiles:
    """Read a student of the authors.

    Args:
        path: a diffusers folder, or a `.pth`, `.pt` or `.safetensors` file. Pickles are read as plain tensors; one that
            would have to run code is refused.
        config: the `config.json` of weights that lie without one. It may hold `policy_config` too, which the authors'
            exporter writes into safetensors files and nowhere else.

    Raises:
        CheckpointError: they cannot be read, or hold something else.
    """
    files = _find_weights(path)
    beside = config or files[0].parent / _CONFIG
    settings = _read_config(beside) if config is not None or beside.is_file() else {}
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= state_dict(file, widen=False)
    class_name = str(settings.pop("_class_name", ""))
    policy = settings.pop("policy_config", None) or _read_policy(files[0])
    return OfficialFiles(class_name, settings, _name_plainly(weights), policy)


def read_class_name(path: Path) -> str:
    """The class that a configuration names: the file itself, a folder's or the one beside weights; "" if there is none.

    A file that is no JSON object says none; whoever reads it says so.
    """
    place = path / _CONFIG if path.is_dir() else path if path.suffix == ".json" else path.parent / _CONFIG
    try:
        settings = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return ""
    return str(settings.get("_class_name", "")) if isinstance(settings, dict) else ""


def _find_weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob(f"{_WEIGHTS}*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no {_WEIGHTS}.safetensors; is it the folder of one student?")
    return files


def _read_config(place: Path) -> dict[str, Any]:
    try:
        settings = json.loads(place.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the configuration {place} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"the configuration {place} is a JSON object; it holds {settings!r:.60}")
    return settings


def _read_policy(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            recorded = (opened.metadata() or {}).get("policy_config", "{}")
        policy = json.loads(recorded)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the policy recorded in {file} cannot be read: {error}") from error
    return policy if isinstance(policy, dict) else {}


def _name_plainly(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's own names, without what a trainer or an adapter's library puts before or into them."""
    for prefix in _PREFIXES:
        own = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        if own:
            weights = own
            break
    return {
        name.removeprefix("transformer.").replace(".default.", "."): tensor
        for name, tensor in weights.items()
    }
