"""The work on a folder of many images: shards that are missing, made one by one, each there when it is whole.

Which images a shard holds follows from its number alone, and the noise of an image from its own. So workers need not
speak with each other: two that make the same shard write the same bytes, and one that is killed leaves nothing but a
hidden file that nobody reads.
"""

from collections.abc import Iterator
from pathlib import Path

from piflow_edge.errors import BundleError
from piflow_edge.runtime.generator import Generator
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.files import atomic_file, sha256
from piflow_edge.system.progress import progress

from .bulk_job import BulkJob
from .shards import Sample, write_shard

# Bytes of a sample beside its pixels: three headers of a tar file, what fills its blocks, the recipe twice.
_SAMPLE_OVERHEAD = 5 * 512 + 2048
# Images of one call. It belongs to what determines them: some engines round otherwise in another batch.
_PIECE = 64


def make_shards(generator: Generator, job: BulkJob, folder: Path, part: tuple[int, int] = (0, 1)) -> int:
    """Make the shards of a folder that are missing, and return how many those were.

    Args:
        generator: of the job's bundle, precision and engine.
        job: the folder's, which `claim_folder` wrote.
        folder: where the shards go.
        part: (i, n): only every n-th shard, from number i on.
    """
    mine = job.shards[part[0] :: part[1]]
    missing = [shard for shard in job.find_missing(folder) if shard in mine]
    with progress("shards", len(mine), start=len(mine) - len(missing)) as bar:
        for shard in missing:
            make_shard(generator, job, folder, shard)
            bar(job.path_of(folder, shard).name)
    return len(missing)


def make_shard(generator: Generator, job: BulkJob, folder: Path, shard: int) -> None:
    """Make one shard, which is there afterwards whoever else makes it too."""
    if sha256(generator.bundle.manifest_bytes) != job.bundle_sha256:
        raise BundleError(f"the images are of bundle {job.bundle!r} as it was; this one was changed since")
    path = job.path_of(folder, shard)
    try:
        with atomic_file(path, size=_estimate_size(generator, job, folder, shard)) as file:
            write_shard(file, _make_samples(generator, job, job.indices_of(shard)))
    except FileNotFoundError:  # another worker made it sooner, and `sweep` took the half of this one
        if not path.exists():
            raise


def _estimate_size(generator: Generator, job: BulkJob, folder: Path, shard: int) -> int:
    """Return the bytes that a shard will take, for the error of a full disk: as many per image as in a shard that is
    there, or else as pixels that nothing compresses."""
    for made in (shard - 1, shard + 1, 0):
        if made in job.shards and (neighbour := job.path_of(folder, made)).exists():
            per_image = neighbour.stat().st_size / len(job.indices_of(made))
            return int(per_image * len(job.indices_of(shard)))
    channels = (generator.bundle.manifest.image_shape or (1,))[0]
    pixels = channels * (job.settings.height or 1) * (job.settings.width or 1)
    return len(job.indices_of(shard)) * (pixels + _SAMPLE_OVERHEAD)


def _make_samples(generator: Generator, job: BulkJob, indices: range) -> Iterator[Sample]:
    for start in range(0, len(indices), _PIECE):
        piece = indices[start : start + _PIECE]
        result = generator(**job.arguments_of(piece))
        for i, (index, image) in enumerate(zip(piece, result.images, strict=True)):
            recipe = result.recipe.of(i)
            title = generator.conditioner.title(recipe.conditioning[0])
            yield Sample(index, png_bytes(image, recipe), recipe.as_json(), title)


def sweep(job: BulkJob, folder: Path) -> bool:
    """Return True if all shards are there; then what workers that were killed left behind is removed."""
    if job.find_missing(folder):
        return False
    for left in folder.glob(".*.tar.*"):
        left.unlink(missing_ok=True)
    return True
