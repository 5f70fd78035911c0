"""A pipeline and an adapter, by folder or hub id -> student, text encoders and autoencoder for `export_bundle`."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from piflow_edge.conditioning import TextPrompts
from piflow_edge.distill.data.autoencoder import Autoencoder, load_autoencoder
from piflow_edge.distill.networks.diffusers_networks import DiffusersNetwork, load_module
from piflow_edge.distill.networks.text_encoders import (
    TextEncoder,
    load_text_encoder,
    open_prompts,
    read_chat_template,
)
from piflow_edge.distill.official.adapters import join_adapter
from piflow_edge.distill.official.checkpoint_files import read_official_files
from piflow_edge.distill.official.hub import find_files
from piflow_edge.distill.official.published import Published, find_published
from piflow_edge.distill.official.students import ADAPTER_FILES, SUBSTEP_RULE, describe_source
from piflow_edge.distill.official.user_lora import UserLoRA, add_user_lora
from piflow_edge.distill.student_model import StudentModel
from piflow_edge.errors import CheckpointError
from piflow_edge.export.pipelines.pipeline_families import FAMILIES, EncoderPlace, PipelineFamily

log = logging.getLogger(__name__)

_INDEX = "model_index.json"
# Of a pipeline on the hub: what lies beside its folders are the same weights once more, for other programs.
_PIPELINE_FILES = (_INDEX, "*/*")
# A token is two by two places of a latent.
_PACKED = 2
# Of the authors' FlowMapSDEScheduler, for all text students.
_SHIFT, _FINAL_STEP_SIZE_SCALE = 3.2, 0.5
_USUAL_NFE = (4,)
# Sides of latents that a bundle is for, where the user does not say: images of 256 to 2048 pixels.
_SHORTEST, _LONGEST = 32, 256


@dataclass(frozen=True)
class PipelineParts:
    """What a bundle is made of. `license_name`: of the base's weights, where it is known."""

    student: StudentModel
    autoencoder: Autoencoder
    encoders: list[TextEncoder]
    license_name: str | None

    @property
    def license_text(self) -> str | None:
        """What the bundle's LICENSE says where the user gives none."""
        if self.license_name is None:
            return None
        base = self.student.provenance["base"]
        return (
            f"The weights in this bundle are made of {base}, which is under: {self.license_name}.\n"
            "What it allows holds for this bundle too. Read it where the base is published.\n"
        )


def read_pipeline(
    pipeline: str,
    adapter: str,
    *,
    size: tuple[int, int] | None = None,
    strength: float = 1.0,
    loras: Sequence[UserLoRA] = (),
) -> PipelineParts:
    """Read a pipeline and make its transformer the student that an adapter makes of it.

    Args:
        pipeline: folder or hub id of a pipeline of diffusers; see `FAMILIES`.
        adapter: folder, `FOLDER:subfolder` or hub id of one of the authors' adapters.
        size: height and width of the images, in pixels; None is the family's.
        strength: of the adapter's LoRA.
        loras: of the user's own, added to the student's weights.

    Raises:
        CheckpointError: no such pipeline or adapter, or they do not fit each other; or a size that cannot be.
        DataError: the autoencoder cannot be used.
        MissingExtraError: diffusers or transformers is not installed.
    """
    folder = find_files(pipeline, _PIPELINE_FILES)
    family = _find_family(folder)
    files = read_official_files(find_files(adapter, ADAPTER_FILES))
    published = find_published(adapter)
    _tell_license(published)
    autoencoder = load_autoencoder(folder / "vae")
    encoders = [_load_encoder(folder, place) for place in family.encoders]
    module = load_module(folder / "transformer", family.transformer)
    shape = _latent_shape(module, autoencoder, size or family.size)
    guidance = published.guidance if published else None
    network = join_adapter(files, module, shape, guidance=guidance, strength=strength)
    for lora in loras:
        add_user_lora(module, lora)
    provenance = {
        **describe_source(adapter, published, network),
        "loras": [{"source": Path(lora.source).name, "strength": lora.strength} for lora in loras],
        "adapter_strength": strength,
        "embedded_guidance": getattr(network, "guidance_embedding", None),
    }
    conditioner = open_prompts(encoders, examples=family.examples).spec
    student = _build_student(network, conditioner, autoencoder, published, provenance)
    return PipelineParts(student, autoencoder, encoders, published.base_license if published else None)


def _build_student(
    network: DiffusersNetwork,
    conditioner: TextPrompts,
    autoencoder: Autoencoder,
    published: Published | None,
    provenance: dict[str, Any],
) -> StudentModel:
    moments = {"mean": list(autoencoder.mean), "deviation": list(autoencoder.deviation)}
    sides = network.sample_shape[1:]
    return StudentModel(
        network,
        nfe=published.nfes if published else _USUAL_NFE,
        shift=_SHIFT,
        final_step_size_scale=_FINAL_STEP_SIZE_SCALE,
        conditioner=conditioner,
        latent=vars(autoencoder.latent) | moments,
        provenance=provenance,
        substep_rule=SUBSTEP_RULE,
        or_more=bool(published and published.or_more),
        sides=(min(_SHORTEST, *sides), max(_LONGEST, *sides), _PACKED),
    )


def _load_encoder(folder: Path, place: EncoderPlace) -> TextEncoder:
    words = folder / place.tokenizer
    chat = {} if place.system is None else {"template": read_chat_template(words, place.system)}
    return load_text_encoder(
        folder / place.folder, tokenizer=words, name=place.name, in_files=True, **{**place.settings, **chat}
    )


def _find_family(folder: Path) -> PipelineFamily:
    try:
        index = json.loads((folder / _INDEX).read_bytes())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"a pipeline is a folder with {_INDEX}, as diffusers saves it; there is none that can be read in {folder}"
        ) from error
    if name not in FAMILIES:
        raise CheckpointError(f"{folder} is a {name}; pipelines that are known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


@torch.no_grad()
def _latent_shape(module: Any, autoencoder: Autoencoder, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of the latents of images of `size`."""
    channels = module.config.in_channels // _PACKED**2
    side = autoencoder.decode(torch.zeros(1, channels, _PACKED, _PACKED)).shape[-1] // _PACKED
    unit = side * _PACKED
    if size[0] < unit or size[1] < unit or size[0] % unit or size[1] % unit:
        near = tuple(max(length // unit, 1) * unit for length in size)
        raise CheckpointError(
            f"height and width are multiples of {unit} for this pipeline; got {size[0]}x{size[1]}; the nearest are "
            f"{near[0]}x{near[1]} and {near[0] + unit}x{near[1] + unit}"
        )
    return channels, size[0] // side, size[1] // side


def _tell_license(published: Published | None) -> None:
    if published is not None and published.base_license is not None:
        log.warning(
            "%s is under: %s; what it allows holds for the bundle too", published.base, published.base_license
        )
