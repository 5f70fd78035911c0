"""What the authors say of each student they publish: the calls it is good for, its base and its guidance.

Sources: docs/piFlow.md and the demos of Lakonik/LakonLab at 84566d5, README of ComfyUI-piFlow; no file of the students
themselves holds it.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Published:
    """One published student.

    Args:
        repo, subfolder: where it lies on the hub.
        nfes: calls per image that it is good for; the first is what it was trained with.
        or_more: whether more calls than these do too.
        base: hub id of the pipeline that an adapter is for; None of a whole network.
        guidance: the only scale that the base's guidance embedding may be given, or None.
        num_timesteps: the network's time at pure noise.
        base_license: short name of the license of the base, None where there is no base.
    """

    repo: str
    subfolder: str
    nfes: tuple[int, ...]
    or_more: bool = False
    base: str | None = None
    guidance: float | None = None
    num_timesteps: float = 1.0
    base_license: str | None = None

    @property
    def hub_id(self) -> str:
        """As it is written on the command line."""
        return f"{self.repo}:{self.subfolder}"


_FLUX_1 = Published(
    "Lakonik/pi-FLUX.1", "", (4,), base="black-forest-labs/FLUX.1-dev", guidance=3.5,
    base_license="FLUX.1 [dev] Non-Commercial License",
)  # fmt: skip
_QWEN = Published("Lakonik/pi-Qwen-Image", "", (4,), base="Qwen/Qwen-Image", base_license="Apache-2.0")
_FLUX_2 = Published(
    "Lakonik/pi-FLUX.2", "", (4,), or_more=True, base="black-forest-labs/FLUX.2-dev", guidance=4.0,
    base_license="FLUX [dev] Non-Commercial License",
)  # fmt: skip
_IMAGENET = Published("Lakonik/pi-Flow-ImageNet", "", (1,))

STUDENTS = (
    replace(_FLUX_1, subfolder="gmflux_k8_piid_4step"),
    replace(_FLUX_1, subfolder="gmflux_k8_piid_8step", nfes=(8,)),
    replace(_FLUX_1, subfolder="gmflux_k8_datafree_piid_4step"),
    replace(_FLUX_1, subfolder="dxflux_n10_piid_4step"),
    replace(_QWEN, subfolder="gmqwen_k8_piid_4step", or_more=True),
    replace(_QWEN, subfolder="gmqwen_k8_datafree_piid_4step", or_more=True),
    replace(_QWEN, subfolder="dxqwen_n10_piid_4step"),
    replace(_QWEN, subfolder="dxqwen_p10_piid_4step"),
    replace(_FLUX_2, subfolder="gmflux2_k8_piid_4step"),
    replace(_IMAGENET, subfolder="gmdit_k32_imagenet_piid_1step", num_timesteps=1000.0),
    replace(_IMAGENET, subfolder="gmrepa_k32_imagenet_piid_1step"),
    replace(_IMAGENET, subfolder="gmrepa_k32_imagenet_piid_2step", nfes=(2,)),
)
REPOSITORIES = frozenset(student.repo for student in STUDENTS)
_BY_NAME = {student.subfolder: student for student in STUDENTS}


def find_published(source: str) -> Published | None:
    """Return what is known of a student by its hub id or by its folder's name, which people keep; else None."""
    name = source.replace("\\", "/").rstrip("/").replace(":", "/").rpartition("/")[2]
    return _BY_NAME.get(name)
