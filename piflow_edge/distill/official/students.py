"""An official student by its folder, file or hub id -> a `StudentModel`; `FAMILIES` is the registry of its classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.distill.student_model import StudentModel
from piflow_edge.errors import CheckpointError

from .adapters import ADAPTERS
from .checkpoint_files import OfficialFiles, read_class_name, read_official_files
from .class_students import build_class_student
from .hub import find_files, find_local, parse_hub_id
from .published import REPOSITORIES, Published, find_published

# Files of a student on the hub that are read.
ADAPTER_FILES = ("*.json", "*.safetensors")
# The authors' pipelines: substeps are rounded up since LakonLab 0.2.0.
SUBSTEP_RULE = "ceil"
# Latents of the autoencoder of Stable Diffusion, which all class-conditional students are of.
_SD_LATENT = {"scale": 0.18215, "shift": 0.0, "autoencoder": None}
_SD_CHANNELS = 4


def is_official(source: str, config: Path | None = None) -> bool:
    """Return True if `source` is a student of the authors: by its class or its folder's name, or by a hub id.

    A hub id names a subfolder or a repository of theirs: "runs/student" is a folder that is not there.
    """
    here = find_local(source)
    if here is None:
        place = parse_hub_id(source)
        return place is not None and bool(place.subfolder or place.repo in REPOSITORIES)
    if (here / "checkpoint.json").is_file():
        return False
    return read_class_name(config or here) in {*FAMILIES, *ADAPTERS} or find_published(source) is not None


def load_official_student(source: str, config: Path | None = None) -> StudentModel:
    """Read a class-conditional student of the authors; an adapter needs its pipeline, see `export.pipelines`.

    Args:
        source: a diffusers folder, `FOLDER:subfolder`, a hub id such as
            `Lakonik/pi-Flow-ImageNet:gmdit_k32_imagenet_piid_1step`, or a `.pth` or `.safetensors` file.
        config: the student's `config.json`, where it does not lie beside the weights. `policy_config` in it stands for
            what the authors' exporter records in safetensors files; `num_timesteps` for the network's time at noise,
            which no file says: 1000, or 1 where the folder is called `gmrepa_...`.

    Raises:
        CheckpointError: nothing there, or nothing that can be used; MissingExtraError: the hub needs another package.
    """
    files = read_official_files(find_files(source, ADAPTER_FILES), config)
    class_name = files.class_name or _guess_class(files)
    if class_name in ADAPTERS:
        raise CheckpointError(
            f"{source} is an adapter ({class_name}) and no whole network; export it together with the pipeline it is "
            "for: --pipeline FOLDER_OR_HUB_ID --adapter " + source
        )
    if class_name not in FAMILIES:
        raise CheckpointError(
            f"{source} holds a {class_name or 'network of no known class'}; official students are "
            f"{', '.join([*FAMILIES, *ADAPTERS])}"
        )
    return FAMILIES[class_name](files, find_published(source), source)


def _read_class_student(files: OfficialFiles, published: Published | None, source: str) -> StudentModel:
    usual = published.num_timesteps if published else 1000.0
    network = build_class_student(files, float(files.config.get("num_timesteps", usual)))
    classes = int(network.null["labels"])
    return StudentModel(
        network,
        nfe=published.nfes if published else (1,),
        or_more=bool(published and published.or_more),
        shift=1.0,
        final_step_size_scale=1.0,
        conditioner=ClassLabels(tuple(map(str, range(classes)))),
        latent=_SD_LATENT if network.sample_shape[0] == _SD_CHANNELS else None,
        provenance=describe_source(source, published, network),
        substep_rule=SUBSTEP_RULE,
    )


def describe_source(source: str, published: Published | None, network: FlowNetwork) -> dict[str, Any]:
    """What a bundle records of where its student came from; no folder of this machine."""
    known = {"hub_id": published.hub_id, "base": published.base} if published else {}
    local = find_local(source)
    return {"source": local.name if local else source, **known, "sha256": network.fingerprint()}


def _guess_class(files: OfficialFiles) -> str:
    """The class of weights without a configuration: a `.pth` as released."""
    if "emb.class_embedder.embedding_table.weight" not in files.weights:
        return ""
    return (
        "GMDiTTransformer2DModelV2" if "proj_out_means.weight" in files.weights else "DXDiTTransformer2DModel"
    )


Reader = Callable[[OfficialFiles, "Published | None", str], StudentModel]
# The authors' class of a whole network -> what makes a student of its files; of adapters see `ADAPTERS`.
FAMILIES: dict[str, Reader] = {
    "GMDiTTransformer2DModelV2": _read_class_student,
    "GMDiTTransformer2DModel": _read_class_student,
    "DXDiTTransformer2DModel": _read_class_student,
}
