"""The generator an app embeds: a bundle, opened, that makes images. Any number of threads may share one."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import trained_with
from piflow_edge.engines import DEFAULT_OPTIONS, Engine, EngineOptions
from piflow_edge.errors import BundleError, EngineError, ShapeError
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import Policy
from piflow_edge.sampling import Known, Progress, sample
from piflow_edge.system.files import sha256

from .arguments import Seeds, check_watchers, checked_floats
from .batching import joined, pieces
from .decoding import Decoding, check_finite, on_host
from .images import as_pil
from .recipe import Recipe
from .request import Request, asked_again, checked, untrained
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)

# Images that share a network call; a longer list is cut into such pieces.
_BATCH_SIZE = 64
_OUTPUTS = ("pil", "numpy", "float", "latent")


class Event(Protocol):
    """What says that a call is to stop, such as `threading.Event`."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class Result:
    """What a generator made.

    `images`: PIL images; for output="numpy" an array uint8 (B, H, W, C), for "float" float32 from 0 to 1; None for
    "latent". `latents`: float32 (B, C, H, W). `seeds`: for every image the (seed, index) that makes it again, None
    when the noise was given. `engine`, `device`: what ran the network. `timings`: milliseconds per stage ("noise",
    "network", "policy", "decode", "transfer" between host and device) and "total"; on a GPU see `synchronize` of a
    call. `recipe`: all settings used; see `Generator.make_again`.
    """

    images: Any
    latents: np.ndarray
    seeds: Seeds | None
    engine: str
    device: str
    timings: dict[str, float]
    recipe: Recipe


class Generator:
    """A bundle, opened and ready to make images. Made by `load`.

    May be called from several threads at once. `close`, or leaving a `with` block, frees its memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        decoder: Engine | None = None,
        precision: str | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
    ):
        self.precision = bundle.precision(precision)
        self.bundle, self.engine, self.decoder, self.options = bundle, engine, decoder, options
        self.decoding = Decoding(bundle.manifest, decoder, self.precision)
        self.class_names = tuple(bundle.manifest.conditioning.class_names)
        # On a GPU nothing crosses the bus between noise and image.
        self._place = gpu_arrays.place_of(engine.device)
        self._lock, self._running, self._closed = threading.Lock(), 0, False
        self._told: set[str] = set()

    @cached_property
    def trained_nfes(self) -> tuple[int, ...]:
        """Student calls per image that it was trained for, rising; the last is what it makes an image with."""
        recorded = trained_with(self.bundle.manifest, "imitation", "nfe")
        several = recorded if isinstance(recorded, list) else []
        known = {nfe for nfe in several if type(nfe) is int and nfe > 0}
        return tuple(sorted({*known, self.bundle.manifest.schedule.nfe}))

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        count: int | None = None,
        seed: int | Sequence[int | tuple[int, int]] = 0,
        nfe: int | None = None,
        substeps: int | None = None,
        temperature: float | str | None = None,
        noise: np.ndarray | None = None,
        output: str = "pil",
        callback: Callable[[Progress], None] | None = None,
        solver: str = "euler",
        *,
        h: float | str | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        resamples: int | None = None,
        callback_every: int | None = None,
        cancel: Event | None = None,
        synchronize: bool = False,
    ) -> Result:
        """Make images: one per label, or `count` of them.

        Args:
            labels: class ids or names; None for a bundle without classes.
            count: images in all for a bundle without classes; else of each label, where None is one.
            seed: of the noise; image i of the call is number i of the seed. Or for every image a seed of its own, or
                its (seed, index), as `Result.seeds` gives them, to make certain images again.
            nfe: student calls per image; None is what the student was trained for. What is fixed in its policy stays.
            substeps: Euler steps over all of raw time; None is what the student was trained with.
            temperature: of GM policies at every call but the last, 0 or more, where 1 leaves them as trained; "auto" is
                the published rule min(0.1 (nfe - 1), 1); None is the bundle's, which is "auto" unless exported
                otherwise.
            noise: starting noise (B, C, H, W) instead of the seed's, which then is of what `h` and `resamples` add.
            output: "pil", "numpy" (uint8), "float" (0 to 1) or "latent" (images are not made).
            callback: told a `Progress` after every student call's segment; its `x_0` is the clean latents as the policy
                sees them, which `decode` shows. What it raises, such as `Cancelled`, reaches the caller.
            solver: "euler", as the student was trained, or "multistep"; see `rollout`.
            h: strength of noise added between calls, 0 or more, or "inf"; None is the bundle's. See `Schedule`.
            image: to start from, or for `mask` to keep a part of: one, or one per image to make. PIL, uint8
                (H, W, C), or latents (C, H, W) as `Result.latents` has them, which a bundle of latents wants.
            strength: noise level to start from `image` at, above 0 and up to 1, where nothing is left of it. The calls
                above it are left out. None is 1 with a `mask`; without one it must be given.
            mask: white or True where something is to be drawn into `image`: a PIL image or an array (H, W), as large as
                the image or its latents; or one per image. All else stays, exactly.
            resamples: with a `mask`, calls more for every call but the one at noise level 1, by which what is drawn
                comes to fit what is kept; see `sampling.sample`. None is 4, which few calls per image need.
            callback_every: substeps after which `callback` is told, besides; costs no network call. Rollouts are cut
                there, which rounds otherwise: latents differ by some 1e-7.
            cancel: such as `threading.Event`; once it is set, from any thread, the call ends within some substeps. It
                cuts rollouts as `callback_every` does.
            synchronize: on an NVIDIA GPU, wait for it at the end of every stage, so that `Result.timings` are of the
                stages themselves, and the call takes longer. Else they are those of queueing, and "transfer" has the
                waiting.

        Raises:
            LabelError: a class the bundle does not know, or none given.
            ShapeError: noise, an image or a mask of another shape, or not finite.
            ScheduleError: a setting out of range, or without what it is for.
            BundleError: images are asked for, and the bundle makes latents and has no decoder.
            EngineError: a network failed, or the generator was closed; NotFiniteError: it made NaN or infinity.
            Cancelled: `cancel` was set. No part of the images is returned; a callback has seen what there was.
        """
        began = time.perf_counter()
        if output not in _OUTPUTS:
            raise ShapeError(f"output is {', '.join(map(repr, _OUTPUTS))}; got {output!r}")
        manifest = self.bundle.manifest
        if output != "latent" and not manifest.makes_images:
            raise BundleError(
                f"bundle {self.bundle.name!r} makes latents and has no decoder; ask for output='latent', or export it "
                "with --autoencoder"
            )
        check_watchers(callback, callback_every, cancel)
        request = checked(
            self.bundle,
            labels=labels,
            count=count,
            seed=seed,
            nfe=nfe,
            substeps=substeps,
            solver=solver,
            temperature=temperature,
            h=h,
            strength=strength,
            resamples=resamples,
            image=image,
            mask=mask,
            noise=noise,
        )
        if (told := untrained(request, manifest.schedule, self.trained_nfes)) is not None:
            self._warn_once(told)
        place = self._place
        clock = Stopwatch(lambda: nvidia.wait_for(place.stream)) if synchronize and place else Stopwatch()
        settings = {
            "clock": clock,
            "callback": callback,
            "callback_every": callback_every,
            "cancelled": None if cancel is None else cancel.is_set,
        }
        # The policies' threads are started from this one, and keep to its cores.
        with self._open(), self.options.on_cores():
            made = [
                self._drawn(request, piece, **settings)
                for piece in pieces(len(request), _BATCH_SIZE, self.engine)
            ]
            images, latents = None, joined([on_host(piece, clock) for piece in made])
            check_finite(latents, "the student", manifest, self.precision, self.engine)
            if output != "latent":
                images = joined(
                    [self.decoding.images(piece, as_float=output == "float", clock=clock) for piece in made]
                )
            if output == "pil":
                with clock.stage("decode"):
                    images = as_pil(images)
        recipe = request.recipe(**self._run)
        clock("total", time.perf_counter() - began)
        seeds = None if noise is not None else request.seeds
        return Result(images, latents, seeds, self.engine.name, self.engine.device, clock.ms, recipe)

    def make_again(
        self,
        recipe: Recipe,
        *,
        noise: np.ndarray | None = None,
        image: Any = None,
        mask: Any = None,
        output: str = "pil",
        callback: Callable[[Progress], None] | None = None,
        cancel: Event | None = None,
    ) -> Result:
        """The images of a `Recipe`, such as `Result.recipe` or what `read_recipe` finds in a PNG file.

        On the recipe's engine and device they are the same, but for rounding if `cancel` or `callback_every` was given
        in one of the two calls; on another, the same but for rounding, which is logged, as another release of
        piflow-edge is.

        Args:
            recipe: of this bundle, in this precision.
            noise, image, mask: those that were given then; a recipe holds only their hashes.
            output, callback, cancel: as in a call.

        Raises:
            RecipeError: another bundle, precision, noise, image or mask.
            Others as a call does.
        """
        again = asked_again(self.bundle, recipe, self._run, noise=noise, image=image, mask=mask)
        return self(**again, output=output, callback=callback, cancel=cancel)

    def close(self) -> None:
        """Free the networks' memory, at once or when the calls that are running are done; more calls are refused."""
        with self._lock:
            idle = not self._closed and not self._running
            self._closed = True
        if idle:
            self._free()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextmanager
    def _open(self, *, within: bool = False) -> Iterator[None]:
        """While images are made: not closed, or `within` a call that began before, and not freed before the end."""
        with self._lock:
            if self._closed and not (within and self._running):
                raise EngineError(f"the generator of {self.bundle.name!r} is closed; load the bundle again")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                last = self._closed and not self._running
            if last:
                self._free()

    def _free(self) -> None:
        try:
            self.engine.close()
        finally:  # a GPU that failed says so at every close
            if self.decoder is not None:
                self.decoder.close()
        if self._place is not None:
            gpu_arrays.release(self._place.ordinal)

    def _drawn(self, request: Request, piece: slice, *, clock: Stopwatch, callback, **settings) -> Any:
        """Latents (B, C, H, W) of some of the images, where the engine works."""
        with clock.stage("noise"):
            fresh, parts = request.fresh_noise(piece, self.options.threads), ()
            x_src = fresh
            if request.start is not None and request.strength < 1:
                x_src = (1 - request.strength) * request.start[piece] + request.strength * fresh
            if request.drawn is not None:
                parts = (request.start[piece], request.drawn[piece].astype(np.float32), fresh)
        x_src, *parts = (self._placed(part, clock) for part in (x_src, *parts))

        def renoise(draw: int) -> Any:
            with clock.stage("noise"):
                added = request.added_noise(piece, draw, self.options.threads)
            return self._placed(added, clock)

        ids = request.ids[piece]
        return sample(
            lambda x_t, sigma: self.policy(x_t, sigma, ids),
            x_src,
            request.schedule,
            renoise=renoise,
            callback=callback and (lambda done: callback(replace(done, first=piece.start))),
            known=Known(*parts) if parts else None,
            clock=clock,
            solver=request.solver,
            temperature=request.temperature,
            strength=request.strength,
            resamples=request.resamples,
            integrate=partial(integrate, num_threads=self.options.threads),
            **settings,
        )

    def _placed(self, array: np.ndarray, clock: Stopwatch) -> Any:
        """The array where the engine works."""
        if self._place is None:
            return array
        with clock.stage("transfer"):
            return gpu_arrays.asarray(array, device=self._place)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, uint8 (B, H, W, C), of latents (B, C, H, W) as the network sees them.

        May be called from a callback; to the end of its call, if the generator is closed meanwhile.

        Raises:
            ShapeError: latents of another shape than the bundle's, or not finite.
            EngineError: the decoder failed, or the generator was closed; NotFiniteError: it made NaN or infinity.
        """
        latents = checked_floats("latents", latents, self.bundle.manifest.latent.shape)
        with self._open(within=True):
            return self.decoding.images(latents, as_float=False, clock=Stopwatch())

    def outputs(self, x_t: np.ndarray, sigma_t: float, ids: np.ndarray) -> dict[str, np.ndarray]:
        """One student call: the raw network outputs at `x_t` (B, C, H, W) for class ids (B,)."""
        return self.engine.run(self.inputs(x_t, sigma_t, ids))

    def inputs(self, x_t: np.ndarray, sigma_t: float, ids: np.ndarray) -> dict[str, np.ndarray]:
        """What the network is fed in `outputs`."""
        return self.bundle.manifest.network_inputs(x_t, sigma_t, ids)

    def policy(self, x_t: np.ndarray, sigma_t: float, ids: np.ndarray) -> Policy:
        """One student call as a policy; see `outputs`."""
        return self.as_policy(self.outputs(x_t, sigma_t, ids), x_t, sigma_t)

    def as_policy(self, outputs: dict[str, np.ndarray], x_src: np.ndarray, sigma_src: float) -> Policy:
        """The policy that network outputs stand for."""
        return self.bundle.manifest.policy.policy(outputs, x_src, sigma_src)

    @cached_property
    def _run(self) -> dict[str, str]:
        """What makes the images, as a `Recipe` names it."""
        return {
            "bundle": self.bundle.name,
            "bundle_sha256": sha256(self.bundle.manifest_bytes),
            "precision": self.precision,
            "engine": self.engine.name,
            "device": self.engine.device,
        }

    def _warn_once(self, told: str) -> None:
        with self._lock:
            new = told not in self._told
            self._told.add(told)
        if new:
            log.warning("bundle %r %s", self.bundle.name, told)
