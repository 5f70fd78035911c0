"""The same work on a cluster of Ray: Ray Data hands out the numbers of shards to workers that keep a generator open.

A worker that dies is started again and its shards are handed out again. That is safe because a shard is there when it
is whole, and the same whoever makes it.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_edge.errors import EngineError, MissingExtraError
from piflow_edge.option import option
from piflow_edge.runtime.loading import load
from piflow_edge.system.progress import progress

from .bulk_job import BulkJob, read_job
from .bulk_work import make_shard


@dataclass(frozen=True)
class ClusterSettings:
    """Where the work is done. `ray`: None for here."""

    ray: str | None = option(
        None, "Address of a Ray cluster, such as auto, or local for one on this machine alone."
    )
    workers: int = option(2, "Of the cluster.", minimum=1)
    gpus_per_worker: float = option(0.0, "GPUs of a worker; 0.5 lets two share one.", minimum=0)
    cpus_per_worker: float = option(1.0, "Processor cores of a worker.", minimum=0)


class ShardWorker:
    """What Ray runs: a generator that makes the shards whose numbers it is called with."""

    def __init__(self, folder: str, bundle: str, settings: dict[str, Any]):
        """`settings`: of `load`, beside the job's precision and engine."""
        self._folder = Path(folder)
        self._job = read_job(self._folder)
        self._generator = load(bundle, engine=self._job.engine, precision=self._job.precision, **settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        make_shard(self._generator, self._job, self._folder, int(row["shard"]))
        return row


def make_shards_on_ray(
    cluster: ClusterSettings, job: BulkJob, folder: Path, bundle: Path, settings: dict[str, Any]
) -> int:
    """Make the shards of a folder that are missing on a cluster, and return how many those were.

    Args:
        cluster: where, and with how many workers.
        job: the folder's, which `claim_folder` wrote.
        folder, bundle: paths that lead every machine of the cluster to the same files.
        settings: of `load`, beside the job's precision and engine.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: workers failed, or wrote where this machine cannot see it.
    """
    missing = job.find_missing(folder)
    if not missing:
        return 0
    ray = _connect(cluster)
    arguments = (str(folder.resolve()), str(bundle.resolve()), settings)
    rows = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    made = rows.map(
        ShardWorker,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=cluster.workers),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
    )
    try:
        with progress("shards", len(job.shards), start=len(job.shards) - len(missing)) as bar:
            for row in made.iter_rows():
                bar(job.path_of(folder, int(row["shard"])).name)
    except ray.exceptions.RayError as error:
        raise EngineError(f"Ray gave up: {error}; the same command goes on where it was") from error
    finally:
        ray.shutdown()
    if lost := set(missing) & set(job.find_missing(folder)):
        raise EngineError(
            f"workers made {len(lost)} shards that are not in {folder} here; --out is a folder that all machines share"
        )
    return len(missing)


def _connect(cluster: ClusterSettings) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray  # pyright: ignore[reportMissingImports]  # in none but the ray extra
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtraError(
            f"a cluster needs {error.name!r}; get it with: pip install 'piflow-edge[ray]'"
        ) from error
    try:
        ray.init(address=cluster.ray, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(f"there is no Ray cluster at {cluster.ray!r}: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # our own progress says enough
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray
