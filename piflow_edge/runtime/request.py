"""What one call of a generator asks for: checked, and with all that was left open filled in."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import Conditioner, Conditioning, ConditionRequest, concatenate, count_of
from piflow_edge.engines import Engine
from piflow_edge.errors import RecipeError, ShapeError
from piflow_edge.kernels import gpu_arrays
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.schedule import Schedule
from piflow_edge.version import __version__

from .arguments import Seeds, convert_floats, draw_noise, read_seeds, read_start_and_mask
from .recipe import RECIPE_VERSION, Recipe, hash_each
from .settings import complete_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Request:
    """All that determines the images of a call but what runs it; for the settings see `Generator`.

    `condition_request`: what the caller wants to see; `conditioning`: what became of it. `seeds`: (seed, index) of each
    image. `settings`: with nothing left open; `schedule`: what they make. `start`: the image to start from or to keep a
    part of, as latents (B, C, H, W). `drawn`: the mask, (B, 1, H, W), bool or from 0 to 1.
    `noise`: (B, C, H, W). `start`, `drawn` and `noise` are None where they were not given. `shape`: of one image's
    latents.
    """

    condition_request: ConditionRequest
    conditioning: Conditioning
    seeds: Seeds
    settings: SamplingSettings
    schedule: Schedule
    start: np.ndarray | None
    drawn: np.ndarray | None
    noise: np.ndarray | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def batch_key(self) -> Hashable:
        """Requests of one key can be drawn in one batch, and none of their images is another for it.

        The lengths of what steers belong to it: prompts that were filled up to a common length might round otherwise.
        """
        arrays = {**self.conditioning, "start": self.start, "drawn": self.drawn, "noise": self.noise}
        shapes = ((name, array.shape[1:]) for name, array in arrays.items() if array is not None)
        return self.settings, tuple(sorted(shapes))

    def draw_noise(self, piece: slice, draw: int, num_threads: int | None) -> np.ndarray:
        """Return noise of some of the images, float32 (B, C, H, W).

        `draw`: 0 is what they start from, the caller's or the seeds'; from 1 on, what is added between calls.
        """
        if draw == 0 and self.noise is not None:
            return self.noise[piece]
        return draw_noise(self.seeds[piece], self.shape, draw, num_threads)

    def start_from(self, noise: np.ndarray, piece: slice) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Return the state that some images start from, and what `KeptImage` takes: nothing without a mask."""
        x_src, strength = noise, self.settings.strength
        if self.start is not None and strength is not None and strength < 1:
            x_src = (1 - strength) * self.start[piece] + strength * noise
        if self.drawn is None or self.start is None:
            return x_src, ()
        share = self.drawn[piece].astype(np.float32)
        return x_src, (self.start[piece], np.ceil(share), share, noise)


def open_conditioner(bundle: Bundle, engines: Mapping[str, Engine]) -> Conditioner:
    """Return what steers a bundle's images, ready to read what a caller asks for. `engines`: of its networks."""
    described = bundle.manifest.conditioner
    if not described.networks or not set(described.networks) <= engines.keys():
        return described  # it needs nothing, or takes arrays that were made elsewhere

    def run_network(network: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = engines[network].run(dict(inputs))
        return {
            name: v if isinstance(v, np.ndarray) else gpu_arrays.to_host(v) for name, v in outputs.items()
        }

    return described.open(bundle.read_asset, run_network)


def build_request(
    bundle: Bundle,
    conditioner: Conditioner,
    condition_request: ConditionRequest,
    seed: Any,
    settings: SamplingSettings,
    *,
    image: Any = None,
    mask: Any = None,
    noise: Any = None,
) -> Request:
    """Make a call's arguments, as `Generator` describes them, a request to a bundle; its errors are those of a call.

    `conditioner`: the bundle's, opened.
    """
    manifest = bundle.manifest
    conditioning = conditioner.encode(condition_request)
    manifest.check_lengths(conditioning)
    seeds = read_seeds(seed, count_of(conditioning, condition_request.count) or 0)
    count = len(seeds)
    settings, schedule = complete_settings(
        settings, manifest, has_image=image is not None, has_mask=mask is not None
    )
    shape = manifest.state_shape(settings.height, settings.width)
    start, drawn = _read_start_and_mask(bundle, shape, image, mask, count)
    if noise is not None:
        noise = convert_floats("noise", noise, shape, count)
    return Request(condition_request, conditioning, seeds, settings, schedule, start, drawn, noise, shape)


def _read_start_and_mask(
    bundle: Bundle, shape: tuple[int, ...], image: Any, mask: Any, count: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """As `read_start_and_mask`, for images whose states have this shape."""
    if image is None and mask is None:  # as in most calls
        return None, None
    latent = replace(bundle.manifest.latent, shape=list(shape))
    return read_start_and_mask(image, mask, count, latent, bundle.name)


def join_requests(requests: Sequence[Request]) -> Request:
    """Return one request for the images of several, in order, to be drawn in one batch.

    It holds all that drawing takes; what was asked for stays with the requests that it was made of.

    Raises:
        ShapeError: they differ in settings or shapes, so that no batch holds them.
    """
    first, *others = requests
    if not others:
        return first
    if any(other.batch_key != first.batch_key for other in others):
        raise ShapeError("requests of one batch have the same settings and shapes; draw these one by one")
    arrays = {
        name: None if getattr(first, name) is None else np.concatenate([getattr(r, name) for r in requests])
        for name in ("start", "drawn", "noise")
    }
    return replace(
        first,
        condition_request=ConditionRequest(),
        conditioning=concatenate([request.conditioning for request in requests]),
        seeds=[pair for request in requests for pair in request.seeds],
        **arrays,
    )


def describe_request(conditioner: Conditioner, request: Request, run: dict[str, str]) -> Recipe:
    """Return how to make the images of a request again; `run` is what carries it out, as a `Recipe` names it."""
    return Recipe(
        version=RECIPE_VERSION,
        conditioning=conditioner.describe(request.condition_request, request.conditioning),
        seeds=request.seeds,
        settings=request.settings,
        noise=hash_each(request.noise),
        image=hash_each(request.start),
        mask=hash_each(request.drawn),
        release=__version__,
        **run,
    )


def repeat_request(
    bundle: Bundle,
    conditioner: Conditioner,
    recipe: Recipe,
    run: dict[str, str],
    *,
    arrays: Any = None,
    noise: Any = None,
    image: Any = None,
    mask: Any = None,
) -> Request:
    """Make a recipe, and the arrays that it holds the hashes of, a request to a bundle.

    `run` is what carries it out, as for `describe_request`; where it may round otherwise than before, that is logged.

    Raises:
        RecipeError: another bundle, precision, noise, image or mask than the recipe's.
        ConditioningError: other `arrays`.
        ShapeError: an array that does not fit the bundle.
    """
    _check_run(bundle, recipe, run)
    condition_request = conditioner.recall(recipe.conditioning, ConditionRequest(arrays=arrays))
    size, manifest = len(recipe.seeds), bundle.manifest
    shape = manifest.state_shape(recipe.settings.height, recipe.settings.width)
    start, drawn = _read_start_and_mask(bundle, shape, image, mask, size)
    if noise is not None:
        noise = convert_floats("noise", noise, shape, size)
    for name, given in {"noise": noise, "image": start, "mask": drawn}.items():
        hashes = getattr(recipe, name)
        if hash_each(given) != hashes:
            begins = None if hashes is None else hashes[0][:12]
            hint = "leave it out" if begins is None else f"give the one whose SHA-256 begins with {begins}"
            raise RecipeError(f"the {name} is another than the recipe's; {hint}")
    mask = None if drawn is None else drawn[:, 0]
    given = {"image": start, "mask": mask, "noise": noise}
    return build_request(bundle, conditioner, condition_request, recipe.seeds, recipe.settings, **given)


def _check_run(bundle: Bundle, recipe: Recipe, run: dict[str, str]) -> None:
    """Refuse another bundle or precision, and log another engine, device or release."""
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
    before, now = f"{recipe.engine} ({recipe.device})", f"{run['engine']} ({run['device']})"
    if before != now:
        log.warning("the recipe ran on %s, this is %s: rounding may differ", before, now)
    if recipe.release != __version__:
        log.warning(
            "the recipe is of piflow-edge %s, this is %s: the image may differ", recipe.release, __version__
        )
