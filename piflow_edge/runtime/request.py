"""What one call of a generator asks for: checked, and with all that was left open filled in."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from piflow_edge import __version__
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import ScheduleSpec
from piflow_edge.errors import RecipeError
from piflow_edge.schedule import Schedule

from .arguments import (
    Seeds,
    asked_schedule,
    asked_temperature,
    check_whole,
    checked_floats,
    drawn_noise,
    image_seeds,
    label_ids,
    start_and_mask,
    start_level,
)
from .recipe import Recipe, hashes

log = logging.getLogger(__name__)

# Of inpainting. On Gaussian data with 4 calls the seam is 2.5 times as rough as the data without, 1.5 times with 4.
_RESAMPLES = 4


@dataclass(frozen=True, eq=False)
class Request:
    """All that determines the images of a call but what runs it; for the settings see `Generator`.

    `ids`: classes, int64 (B,), zeros without classes. `seeds`: (seed, index) of each image. `start`: the image to start
    from or to keep a part of, as latents (B, C, H, W). `drawn`: the mask, bool (B, 1, H, W). `noise`: (B, C, H, W).
    `start`, `drawn` and `noise` are None where they were not given. `shape`: of one image's latents.
    """

    ids: np.ndarray
    has_classes: bool
    seeds: Seeds
    schedule: Schedule
    solver: str
    temperature: float
    strength: float
    resamples: int
    start: np.ndarray | None
    drawn: np.ndarray | None
    noise: np.ndarray | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def fresh_noise(self, piece: slice, num_threads: int) -> np.ndarray:
        """The noise that some of the images start from, float32 (B, C, H, W): the caller's, or the seeds'."""
        return self.added_noise(piece, 0, num_threads) if self.noise is None else self.noise[piece]

    def added_noise(self, piece: slice, draw: int, num_threads: int) -> np.ndarray:
        """What is added to some of the images between calls, float32 (B, C, H, W); `draw` counts from 1."""
        return drawn_noise(self.seeds[piece], self.shape, draw, num_threads)

    def recipe(self, **run) -> Recipe:
        """How to make it again; `run` is what carries it out, as a `Recipe` names it."""
        return Recipe(
            version=1,
            labels=self.ids.tolist() if self.has_classes else None,
            seeds=self.seeds,
            nfe=int(self.schedule.nfe),
            substeps=int(self.schedule.total_substeps),
            solver=self.solver,
            temperature=self.temperature,
            h="inf" if math.isinf(float(self.schedule.h)) else float(self.schedule.h),  # JSON has no infinity
            strength=self.strength,
            resamples=self.resamples,
            noise=hashes(self.noise),
            image=hashes(self.start),
            mask=hashes(self.drawn),
            release=__version__,
            **run,
        )


def checked(
    bundle: Bundle,
    *,
    labels,
    count,
    seed,
    nfe,
    substeps,
    solver: str,
    temperature,
    h,
    strength,
    resamples,
    image,
    mask,
    noise,
) -> Request:
    """A call's arguments, as `Generator` describes them, made a request to a bundle; its errors are those of a call."""
    manifest = bundle.manifest
    class_names = manifest.conditioning.class_names
    ids = label_ids(labels, count, class_names, bundle.name)
    seeds = image_seeds(seed, len(ids))
    schedule = asked_schedule(manifest.schedule, nfe, substeps, h)
    temperature = asked_temperature(manifest.schedule, temperature, schedule.nfe)
    check_whole("resamples", resamples, 0)
    if resamples is None:
        resamples = 0 if mask is None else _RESAMPLES
    strength = start_level(image, strength, mask, resamples, schedule)
    start, drawn = start_and_mask(image, mask, len(ids), manifest.latent, bundle.name)
    if noise is not None:
        noise = checked_floats("noise", noise, manifest.latent.shape, len(ids))
    return Request(
        ids=ids,
        has_classes=bool(class_names),
        seeds=seeds,
        schedule=schedule,
        solver=solver,
        temperature=temperature,
        strength=strength,
        resamples=int(resamples),
        start=start,
        drawn=drawn,
        noise=noise,
        shape=tuple(manifest.latent.shape),
    )


def untrained(request: Request, spec: ScheduleSpec, trained_nfes: Sequence[int]) -> str | None:
    """What a student of `spec`, trained for these calls per image, was not trained for in a request; None: nothing."""
    nfe, strength = request.schedule.nfe, request.strength
    if nfe not in trained_nfes:
        plural = "s" * (list(trained_nfes) != [1])
        return f"was trained for {' or '.join(map(str, trained_nfes))} call{plural} per image and runs with {nfe}"
    if strength == 1:
        return None
    levels = [asked_schedule(spec, each, None, None).sigmas for each in trained_nfes]
    if any(np.isclose(strength, sigmas).any() for sigmas in levels):
        return None
    told = ", ".join(f"{sigma:.3g}" for sigma in request.schedule.sigmas[:-1])
    return f"was trained to be called at noise levels {told} and starts at {strength:.3g}"


def asked_again(bundle: Bundle, recipe: Recipe, run: dict[str, str], *, noise, image, mask) -> dict[str, Any]:
    """A recipe, and the arrays that it holds the hashes of, as the arguments of a call of a generator of `bundle`.

    `run` is what carries it out, as for `Request.recipe`; where it may round otherwise than before, that is logged.

    Raises:
        RecipeError: another bundle, precision, noise, image or mask than the recipe's.
        ShapeError: an array that does not fit the bundle.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"a recipe is what read_recipe(file) or a Result has; got {recipe!r}")
    if recipe.bundle_sha256 != run["bundle_sha256"]:
        raise RecipeError(
            f"the recipe is of bundle {recipe.bundle!r} with SHA-256 {recipe.bundle_sha256[:12]}, this is "
            f"{bundle.name!r} with {run['bundle_sha256'][:12]}; load the one that made the image"
        )
    if recipe.precision != run["precision"]:
        raise RecipeError(
            f"the recipe is in {recipe.precision!r}, the bundle was loaded in {run['precision']!r}; load it with "
            f"precision={recipe.precision!r}"
        )
    ran, runs = f"{recipe.engine} ({recipe.device})", f"{run['engine']} ({run['device']})"
    if ran != runs:
        log.warning("the recipe ran on %s, this is %s: rounding may differ", ran, runs)
    if recipe.release != __version__:
        log.warning(
            "the recipe is of piflow-edge %s, this is %s: the image may differ", recipe.release, __version__
        )
    size, latent = len(recipe.seeds), bundle.manifest.latent
    start, drawn = start_and_mask(image, mask, size, latent, bundle.name)
    if noise is not None:
        noise = checked_floats("noise", noise, latent.shape, size)
    for name, given in {"noise": noise, "image": start, "mask": drawn}.items():
        made = getattr(recipe, name)
        if hashes(given) != made:
            hint = (
                "leave it out" if made is None else f"give the one whose SHA-256 begins with {made[0][:12]}"
            )
            raise RecipeError(f"the {name} is another than the recipe's; {hint}")
    settings = ("nfe", "substeps", "solver", "temperature", "h", "resamples")
    return {
        "labels": recipe.labels,
        "count": size if recipe.labels is None else None,
        "seed": recipe.seeds,
        "noise": noise,
        "image": start,
        "mask": None if drawn is None else drawn[:, 0],
        "strength": None if start is None else recipe.strength,
        **{name: getattr(recipe, name) for name in settings},
    }
