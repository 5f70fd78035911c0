"""What a folder of many images holds: which samples there are, in which shards, and all that determines them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import Conditioner, ConditionRequest
from piflow_edge.conditioning.base import refuse_others
from piflow_edge.errors import BundleError, ConditioningError, DataError
from piflow_edge.option import check_options, option
from piflow_edge.runtime.settings import complete_settings
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.system.files import sha256, write_atomic
from piflow_edge.version import __version__

JOB_FILE = "job.json"
_VERSION = 1


@dataclass(frozen=True)
class BulkSettings:
    """How many images, and how they lie in shards. `count`: of each label or prompt; in all where nothing steers."""

    count: int = option(1, "Images of each label or prompt; in all where nothing steers.", minimum=1)
    seed: int = option(0, "Of the noise; image i is number i of it.", minimum=0, maximum=2**64 - 1)
    shard_size: int = option(1000, "Images in one tar file.", minimum=1)

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class BulkJob:
    """All that determines the files of a folder.

    `release`: of piflow-edge. `bundle`: its name; `bundle_sha256`: of its manifest. `settings`: with nothing left open.
    `steered_by`: the argument of a generator's call that `subjects` are for, None where nothing steers; `subjects`:
    labels or prompts, each for `bulk.count` images in a row.
    """

    release: str
    bundle: str
    bundle_sha256: str
    precision: str
    engine: str
    settings: SamplingSettings
    bulk: BulkSettings
    steered_by: str | None
    subjects: tuple[Any, ...]

    @property
    def total(self) -> int:
        """Images in all."""
        return self.bulk.count * max(1, len(self.subjects))

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.total // self.bulk.shard_size))

    def indices_of(self, shard: int) -> range:
        """Return the numbers of a shard's images."""
        first = shard * self.bulk.shard_size
        return range(first, min(first + self.bulk.shard_size, self.total))

    def arguments_of(self, indices: range) -> dict[str, Any]:
        """Return what a generator's call takes to make these images."""
        steering: dict[str, Any] = {"count": len(indices)}
        if self.steered_by is not None:
            steering = {self.steered_by: [self.subjects[i // self.bulk.count] for i in indices]}
        return {**steering, "seed": [(self.bulk.seed, i) for i in indices], "settings": self.settings}

    def path_of(self, folder: Path, shard: int) -> Path:
        """Return where a shard lies, under a name as long as all the others."""
        return folder / f"{shard:06}.tar"

    def find_missing(self, folder: Path) -> list[int]:
        """Return the numbers of the shards that are not there. One that is there is whole."""
        return [shard for shard in self.shards if not self.path_of(folder, shard).exists()]


def build_job(
    bundle: Bundle,
    engine: str,
    precision: str | None,
    bulk: BulkSettings,
    settings: SamplingSettings,
    *,
    labels: Any = None,
    prompts: Sequence[str] | None = None,
) -> BulkJob:
    """Check what is asked for and make it a job.

    Args:
        bundle: that makes the images, in one of its precisions, None for its first.
        engine: name of the engine that all workers run it on: images of another differ in rounding.
        bulk, settings: how many images, and how they are sampled.
        labels, prompts: what a generator's call takes, as the bundle wants it.

    Raises:
        ConditioningError: what steers is missing, or of another kind than the bundle's; LabelError: an unknown class.
        ScheduleError, ShapeError: a setting that makes no sense; BundleError: the bundle makes no images.
    """
    manifest = bundle.manifest
    if not manifest.makes_images:
        raise BundleError(
            f"bundle {bundle.name!r} makes latents and has no decoder; export it with --autoencoder"
        )
    completed, _ = complete_settings(settings, manifest, has_image=False, has_mask=False)
    steered_by, subjects = _read_subjects(manifest.conditioner, labels, prompts)
    return BulkJob(
        __version__,
        bundle.name,
        sha256(bundle.manifest_bytes),
        bundle.precision(precision),
        engine,
        completed,
        bulk,
        steered_by,
        subjects,
    )


def _read_subjects(
    conditioner: Conditioner, labels: Any, prompts: Sequence[str] | None
) -> tuple[str | None, tuple[Any, ...]]:
    """Return the argument of a call, and its entries one by one: "0-9" becomes ten classes."""
    request = ConditionRequest(labels=labels, prompts=prompts)
    refuse_others(conditioner, request, conditioner.positional)
    if not conditioner.inputs:
        return None, ()
    if prompts is not None:
        return "prompt", tuple(prompts)
    if labels is None:
        raise ConditioningError(f"give labels or prompts; {conditioner.summarize()}")
    described = conditioner.describe(request, conditioner.encode(request))
    return "labels", tuple(conditioner.recall(described, ConditionRequest()).labels)


def has_job(folder: Path) -> bool:
    """Return True if a folder is one that a job writes its images into."""
    return (folder / JOB_FILE).is_file()


def read_job(folder: Path) -> BulkJob:
    """Return the job that a folder is of; DataError if it is of none, or of one of another release."""
    try:
        body = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        if body.pop("version") != _VERSION or set(body) != {field.name for field in fields(BulkJob)}:
            raise ValueError("it was written by another release")
        settings = {
            "settings": SamplingSettings(**body["settings"]),
            "bulk": BulkSettings(**body["bulk"]),
            "subjects": tuple(body["subjects"]),
        }
        return replace(BulkJob(**body), **settings)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / JOB_FILE} is no job of piflow-edge generate that this release reads: {error}"
        ) from error


def _flatten(job: BulkJob) -> dict[str, Any]:
    return {**vars(job), **vars(job.bulk), **vars(job.settings), "bulk": None, "settings": None}


def claim_folder(folder: Path, job: BulkJob) -> None:
    """Write a job into its folder, or see that the one that is there is the same.

    Raises:
        DataError: the folder holds another job's images, or files of somebody else.
    """
    if has_job(folder):
        there, wanted = _flatten(read_job(folder)), _flatten(job)
        other = [f"{name} is {there[name]!r:.60} there and {wanted[name]!r:.60} here"
                 for name in wanted if wanted[name] != there[name]]  # fmt: skip
        if other:
            raise DataError(
                f"{folder} holds images of another job: {'; '.join(other)}; give another --out, or what was given then"
            )
        return
    if folder.exists() and any(not name.name.startswith(".") for name in folder.iterdir()):
        raise DataError(f"{folder} holds other files; give --out a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / JOB_FILE, (json.dumps({"version": _VERSION, **asdict(job)}, indent=1) + "\n").encode()
    )
