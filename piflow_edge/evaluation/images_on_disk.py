"""Images that `generate` made, as a contender: taken from its folder, not drawn."""

import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from piflow_edge.conditioning import Conditioning
from piflow_edge.errors import DataError
from piflow_edge.runtime.bulk.bulk_job import read_job
from piflow_edge.runtime.bulk.shards import Place, list_pictures

from .contenders import Contender, Seeds
from .plan import Plan


class ImageFolder:
    """A folder of shards. `is_steered`: its images have a class or a prompt each."""

    def __init__(self, folder: Path):
        """Raise DataError for anything else than a folder of `generate`, in which shards may still be missing."""
        self.job = read_job(folder)
        self.is_steered = self.job.steered_by is not None
        missing = set(self.job.find_missing(folder))
        paths = [self.job.path_of(folder, shard) for shard in self.job.shards if shard not in missing]
        self._places: dict[str, list[Place]] = defaultdict(list)
        for path in paths:
            for _, title, place in list_pictures(path):
                self._places[title].append(place)

    def contender(self, name: str, plan: Plan) -> Contender:
        """Return a contender that gives every image of a plan another picture of the folder, of its class or prompt.

        Raises:
            DataError: the folder has too few.
        """
        chosen = self._choose(name, plan)

        def sample(noise: np.ndarray, conditioning: Conditioning, seeds: Seeds) -> np.ndarray:
            return np.stack([_read_picture(chosen[index]) for _, index in seeds])

        return Contender(name, int(self.job.settings.nfe or 0), sample, is_drawn=False)

    def _choose(self, name: str, plan: Plan) -> list[Place]:
        if len(plan.group_names) == 1 and not plan.prompts:  # any image is one of the only group
            lists = [[place for places in self._places.values() for place in places]]
        else:
            lists = [self._places.get(title, []) for title in plan.group_names]
        needed = np.bincount(plan.groups, minlength=len(lists))
        for title, places, number in zip(plan.group_names, lists, needed, strict=True):
            if len(places) < number:
                raise DataError(
                    f"{name} holds {len(places)} images of {title!r}, and {number} are compared; make more, or compare "
                    "fewer with --images"
                )
        left = [iter(places) for places in lists]
        return [next(left[group]) for group in plan.groups]


def _read_picture(place: Place) -> np.ndarray:
    """Return a picture as float32 (C, H, W), -1 to 1."""
    with Image.open(io.BytesIO(place.read()), formats=["PNG"]) as picture:
        pixels = np.atleast_3d(np.asarray(picture))
    return pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
