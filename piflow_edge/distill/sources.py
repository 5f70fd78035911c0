"""Where networks come from: a checkpoint of ours, a Python function, a diffusers folder or hub id, a SiT file.

Students too: a checkpoint of ours, a state dict with its configuration, a Python function.
"""

import importlib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from piflow_edge.conditioning import Conditioner, conditioner_from_json
from piflow_edge.distill.loop.checkpoint import Checkpoint, load_checkpoint, load_weights, state_dict
from piflow_edge.distill.networks.families import build_network, check_family
from piflow_edge.distill.networks.flow_network import (
    Convention,
    FlowNetwork,
    ModuleNetwork,
    Teacher,
    attach_policy_head,
)
from piflow_edge.distill.networks.lora import LoRAConfig, fold_lora
from piflow_edge.distill.official.hub import absence_error
from piflow_edge.distill.official.students import is_official, load_official_student
from piflow_edge.errors import CheckpointError, DataError, PiFlowError
from piflow_edge.policies import policy_spec_from_json

from .student_model import StudentModel

_WEIGHT_FILES = {".pt", ".pth", ".safetensors"}


@dataclass(frozen=True)
class TeacherModel:
    """A network to imitate.

    `network`: its weights are frozen. `conditioner`: what steers it, None where that is not known. `provenance`: JSON,
    for the record; it names no folder of this machine.
    """

    network: FlowNetwork
    conditioner: Conditioner | None
    provenance: dict[str, Any]


def load_student(source: str | Path, *, config: str | Path | None = None) -> StudentModel:
    """A student from wherever it is.

    Args:
        source: folder of a checkpoint that `distill` left; a `.pt`, `.pth` or `.safetensors` file with a state dict;
            "package.module:function", a function without arguments that returns a `StudentModel`; a class-conditional
            student of the authors, as folder, file or hub id, see `official.students`.
        config: of the authors' student in a file its `config.json`. Of a state dict JSON with `network` (`family`, and
            what `networks.describe` says of it: for "dit" the fields of `DiTConfig` under `config`; or `entry`, a
            function that returns the teacher's `FlowNetwork`), `head` (`kind`, one of `POLICIES`, and its fields),
            `nfe`, `conditioning` (such as {"kind": "class", "names": ["cat", "dog"], "input": "labels"}; without it
            nothing steers), and where they are not the defaults the other fields of `StudentModel`.

    Raises:
        CheckpointError: nothing there, or nothing that can be used.
    """
    text, path = str(source), Path(source)
    config = None if config is None else Path(config)
    if is_official(text, config):
        return load_official_student(text, config)
    if path.suffix in _WEIGHT_FILES and not path.is_dir():
        return _student_from_state_dict(path, config)
    if config is not None:
        raise CheckpointError(f"a configuration is for a state dict; {text} brings its own")
    if (path / "checkpoint.json").is_file():
        return student_from_checkpoint(load_checkpoint(path, kind="student"))
    if ":" in text and not path.exists():
        student = _call_entry(text)
        if not isinstance(student, StudentModel):
            raise CheckpointError(
                f"{text} must return a StudentModel; it returned a {type(student).__name__}"
            )
        return student
    raise CheckpointError(
        "a student is a folder with checkpoint.json, a state dict (.pt, .pth, .safetensors) with its configuration, "
        "'package.module:function', or one that pi-Flow's authors published, such as "
        f"Lakonik/pi-Flow-ImageNet:gmdit_k32_imagenet_piid_1step; there is none at {text}"
    )


def student_from_checkpoint(checkpoint: Checkpoint) -> StudentModel:
    """A student that was distilled here."""
    return student_of_run(
        network_of(checkpoint), checkpoint.settings, checkpoint.conditioner, checkpoint.iteration
    )


def student_of_run(
    network: FlowNetwork, settings: Mapping[str, Any], conditioner: Conditioner, iteration: int
) -> StudentModel:
    """Return the student that a run with these settings has come to; `settings`: what its checkpoint records."""
    imitation = settings["imitation"]
    nfe = imitation["nfe"]
    return StudentModel(
        network,
        tuple(nfe) if isinstance(nfe, list | tuple) else nfe,
        imitation["shift"],
        imitation["final_step_size_scale"],
        imitation["total_substeps"],
        conditioner,
        settings.get("latent"),
        {"iteration": iteration, "settings": dict(settings)},
    )


def _student_from_state_dict(path: Path, config: str | Path | None) -> StudentModel:
    if config is None:
        raise CheckpointError(f"{path} holds weights and nothing else; give its configuration (--config) too")
    try:
        settings = json.loads(Path(config).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the configuration {config} cannot be read: {error}") from error
    known = set(StudentModel.__dataclass_fields__) - {"provenance", "conditioner"} | {"head", "conditioning"}
    if not isinstance(settings, dict) or not {"network", "head", "nfe"} <= settings.keys() <= known:
        raise CheckpointError(
            f"a student's configuration holds network, head and nfe, and may hold "
            f"{', '.join(sorted(known - {'network', 'head', 'nfe'}))}; {config} has "
            f"{', '.join(sorted(settings)) if isinstance(settings, dict) else type(settings).__name__}"
        )
    weights = state_dict(path)
    recorded = {key: value for key, value in settings.items() if key not in ("network", "conditioning")}
    try:
        description = {"family": "module", "convention": asdict(Convention()), **settings.pop("network")}
        network = attach_policy_head(build(description), policy_spec_from_json(settings.pop("head")))
        network.module.load_state_dict(weights)
        conditioner = conditioner_from_json(settings.pop("conditioning", {"kind": "none"}))
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
        provenance = {"source": path.name, "settings": {"imitation": recorded}}
        student = network.eval().requires_grad_(False)
        return StudentModel(student, conditioner=conditioner, provenance=provenance, **fields)
    except PiFlowError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} are not those of {config}: {error}") from error
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configuration {config} cannot be used: {error!r}") from error


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
    text = str(source)
    family = next(family for family in TEACHER_FAMILIES.values() if family.recognises(text))
    return family.load(text, sample_shape, style)


def _load_teacher_checkpoint(source: str, sample_shape: Any, style: str) -> TeacherModel:
    path = Path(source)
    return teacher_from_checkpoint(load_checkpoint(path, kind="teacher"), origin=str(path.resolve()))


def _load_sit_file(source: str, sample_shape: tuple[int, ...] | None, style: str) -> TeacherModel:
    from piflow_edge.distill.networks.sit import load_sit

    path = Path(source)
    if not path.exists():
        raise absence_error(source)
    if sample_shape is None:
        raise CheckpointError(f"{source} does not say the size of its states; give sample_shape")
    network = load_sit(path, sample_size=(sample_shape[1], sample_shape[2]), style=style)
    origin = {"source": str(path.resolve()), "style": style}
    return _teacher(network, None, origin, {"source": path.name, "style": style})


def _load_function(source: str, sample_shape: Any, style: str) -> TeacherModel:
    return _teacher(_from_entry(source), None, {"source": source}, {"source": source})


def _load_diffusers(source: str, sample_shape: tuple[int, ...] | None, style: str) -> TeacherModel:
    from piflow_edge.distill.networks.diffusers_networks import load_diffusers

    path = Path(source)
    network = load_diffusers(source, sample_shape=sample_shape)
    origin = {"source": str(path.resolve()) if path.exists() else source}
    return _teacher(network, None, origin, {"source": path.name})


@dataclass(frozen=True)
class TeacherFamily:
    """A kind of source that teachers come from.

    `recognises`: whether a source, as text, is of this kind. `load`: source, shape of the states, style -> teacher; see
    `load_teacher`.
    """

    recognises: Callable[[str], bool]
    load: Callable[[str, tuple[int, ...] | None, str], TeacherModel]


# The one registry, by name. The first that recognises a source loads it; the last takes what is left: a hub id may be
# anything.
TEACHER_FAMILIES = {
    "checkpoint": TeacherFamily(
        lambda source: (Path(source) / "checkpoint.json").is_file(), _load_teacher_checkpoint
    ),
    "sit": TeacherFamily(lambda source: Path(source).suffix in _WEIGHT_FILES, _load_sit_file),
    "function": TeacherFamily(lambda source: ":" in source and not Path(source).exists(), _load_function),
    "diffusers": TeacherFamily(lambda source: True, _load_diffusers),
}


def teacher_from_checkpoint(checkpoint: Checkpoint, origin: str | None = None) -> TeacherModel:
    """A teacher that was trained here; `origin` is the folder, which a LoRA student is read back with."""
    network = network_of(checkpoint)
    return _teacher(network, checkpoint.conditioner, {"source": origin}, {"settings": checkpoint.settings})


def network_of(checkpoint: Checkpoint) -> FlowNetwork:
    """The checkpoint's network with its averaged weights, in float32, ready to be called.

    Adapters of a LoRA student are folded into the weights, which are read from where the teacher was.

    Raises:
        CheckpointError: the weights are of another architecture, or a LoRA student's teacher is not what it was.
    """
    description = checkpoint.network
    check_source(description)
    lora = LoRAConfig(**description["lora"]) if description["lora"] else None
    network = _base(description["base"], description["sample_shape"]) if lora else build(description)
    if description["head"]:
        network = attach_policy_head(network, policy_spec_from_json(description["head"]), lora=lora)
    load_weights(network, checkpoint.group("ema"), trained_only=lora is not None)
    if lora:
        fold_lora(network)
    return network.eval().requires_grad_(False)


def build(description: Mapping[str, Any]) -> FlowNetwork:
    """Return the teacher's architecture that `describe` described; the weights mean nothing yet.

    Raises:
        CheckpointError: it was made by a function that is not known or no longer there, or cannot be read.
    """
    if description["family"] != ModuleNetwork.family:
        return build_network(description)
    check_source({"lora": None, **description})
    return _from_entry(description["entry"])


def check_source(description: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the network that `describe` described can be made again from a checkpoint."""
    if description["lora"]:
        if (description["base"] or {}).get("source") is None:
            raise CheckpointError("a LoRA student needs its teacher; this one's was not loaded from anywhere")
    elif description["family"] != ModuleNetwork.family:
        check_family(description)
    elif description.get("entry") is None:
        raise CheckpointError(
            "a network that was made in Python cannot be made again from a checkpoint; load its teacher by "
            "'package.module:function' when you distil"
        )


def _base(base: Mapping[str, Any], sample_shape) -> FlowNetwork:
    teacher = load_teacher(base["source"], sample_shape=tuple(sample_shape), style=base.get("style", "sit"))
    if teacher.provenance["sha256"] != base["sha256"]:
        raise CheckpointError(
            f"a LoRA student needs the teacher it was distilled from; the weights at {base['source']} have changed"
        )
    return teacher.network


def _from_entry(entry: str) -> FlowNetwork:
    network = _call_entry(entry)
    if not isinstance(network, FlowNetwork):
        raise CheckpointError(f"{entry} must return a FlowNetwork; it returned a {type(network).__name__}")
    if isinstance(network, ModuleNetwork):
        network.entry = entry
    return network.requires_grad_(False)


def _call_entry(entry: str) -> Any:
    """What a function of the user's returns; whatever goes wrong in it is told as it is, with its place."""
    module_name, _, name = entry.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise CheckpointError(
            f"a network in Python is 'package.module:function'; got {entry!r}, which is neither that nor a file here"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise CheckpointError(
                f"{entry}: there is no module {missing!r} to import here; for a file in this folder set PYTHONPATH=."
            ) from error
        raise CheckpointError(
            f"{entry}: importing {module_name} failed: {describe_failure(error)}; mend that"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        what = f"is a {type(function).__name__}" if hasattr(module, name) else "is not there"
        raise CheckpointError(
            f"{entry} must be a function; {name!r} {what} in {module.__file__ or module_name}"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled ones do not tell; the call does
        signature = inspect.Signature()
    try:
        signature.bind()
    except TypeError as error:
        raise CheckpointError(
            f"{entry} is called without arguments, and it takes {name}{signature}; name a function that needs none "
            "and calls it"
        ) from error
    try:
        return function()
    except PiFlowError:
        raise
    except Exception as error:
        raise CheckpointError(f"{entry} failed: {describe_failure(error)}; mend that") from error


def ask_teacher(teacher: Teacher, x_t: Tensor, sigma_t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """Return a teacher's velocity at states (B, C, *S), as the first call of a run asks for it.

    Raises:
        DataError: the teacher cannot take what it is given.
    """
    try:
        return teacher.velocity(x_t, sigma_t, **conditioning)
    except PiFlowError:
        raise
    except Exception as error:  # a network's own code runs here
        given = {"states": x_t, **conditioning}
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
        raise DataError(
            f"the teacher fails on what the data give it ({shapes}): {describe_failure(error)}; give data of the "
            "shapes that it was made for"
        ) from error


def describe_failure(error: BaseException) -> str:
    """Return the user's exception, and the user's line it came from: the command line shows no traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<")]
    # Of a library's own lines the user can mend none.
    place = next((f for f in reversed(frames) if "site-packages" not in Path(f.filename).parts), None)
    where = f" ({place.filename}, line {place.lineno})" if place else ""
    text = str(error).strip().partition("\n\n")[0]
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"


def _teacher(network, conditioner, origin, provenance) -> TeacherModel:
    fingerprint = network.fingerprint()
    network.origin = {**origin, "sha256": fingerprint}
    return TeacherModel(network, conditioner, {"sha256": fingerprint, **provenance})
