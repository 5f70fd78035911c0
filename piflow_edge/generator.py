"""The generator an app embeds: a bundle, opened, that makes images. Any number of threads may share one."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from piflow_edge.engines import DEFAULT_OPTIONS, Engine, EngineOptions, open_engine

from . import __version__
from .arguments import (
    Seeds,
    asked_schedule,
    asked_temperature,
    check_numbers,
    checked_noise,
    drawn_noise,
    image_seeds,
    label_ids,
    start_and_mask,
    start_level,
)
from .bundle import Bundle
from .errors import BundleError, EngineError, RecipeError, ShapeError
from .files import sha256
from .images import as_pil, decode, decode_float
from .kernels import gpu_arrays
from .policies import Policy
from .recipe import Recipe, hashes
from .sampling import Known, Progress, sample
from .schedule import Schedule
from .signature import TrustedKey

log = logging.getLogger(__name__)

# Images that share a network call; a longer list is cut into such pieces.
_BATCH_SIZE = 64
# Pixels that are decoded at a time: a decoder's inner states are hundreds of times larger than its images.
_DECODED_PIXELS = 1 << 20
# Of inpainting. On Gaussian data with 4 calls the seam is 2.5 times as rough as the data without, 1.5 times with 4.
_RESAMPLES = 4
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
    "network", "policy", "decode", "total"). `recipe`: all settings used; see `Generator.make_again`.
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
        self.class_names = tuple(bundle.manifest.conditioning.class_names)
        # On a GPU nothing crosses the bus between noise and image.
        self._place = gpu_arrays.place_of(engine.device)
        self._lock, self._running, self._closed = threading.Lock(), 0, False

    @cached_property
    def trained_nfes(self) -> tuple[int, ...]:
        """Student calls per image that it was trained for, rising; the last is what it makes an image with."""
        settings = self.bundle.manifest.provenance.get("settings", {})
        recorded = settings.get("imitation", {}).get("nfe")
        several = recorded if isinstance(recorded, list) else []
        return tuple(sorted({*several, self.bundle.manifest.schedule.nfe}))

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
    ) -> Result:
        """Make images: one per label, or `count` of them.

        Args:
            labels: class ids or names; None for a bundle without classes.
            count: images in all for a bundle without classes; else of each label, where None is one.
            seed: of the noise; image i of the call is number i of the seed. Or for every image a seed of its own, or
                its (seed, index), as `Result.seeds` gives them, to make certain images again.
            nfe: student calls per image; None is what the student was trained for. What is fixed in its policy stays.
            substeps: Euler steps over all of raw time; None is what the student was trained with.
            temperature: of GM policies at every call but the last, 0 or more; "auto" is min(0.1 (nfe - 1), 1), as the
                authors' pipelines sample; None is the bundle's.
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
            callback_every: substeps after which `callback` is told, besides; costs no network call.
            cancel: such as `threading.Event`; once it is set, from any thread, the call ends within some substeps.

        Raises:
            LabelError: a class the bundle does not know, or none given.
            ShapeError: noise, an image or a mask of another shape, or not finite.
            ScheduleError: a setting out of range, or without what it is for.
            BundleError: images are asked for, and the bundle makes latents and has no decoder.
            EngineError: the network call failed or made NaN, or the generator was closed.
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
        ids = label_ids(labels, count, self.class_names, self.bundle.name)
        seeds = image_seeds(seed, len(ids))
        schedule = asked_schedule(manifest.schedule, nfe, substeps, h)
        temperature = asked_temperature(manifest.schedule, temperature, schedule.nfe)
        check_numbers(resamples, callback_every)
        if resamples is None:
            resamples = 0 if mask is None else _RESAMPLES
        strength = start_level(image, strength, mask, resamples, schedule)
        start, drawn = start_and_mask(image, mask, len(ids), manifest.latent, self.bundle.name)
        if noise is not None:
            noise = checked_noise(noise, (len(ids), *manifest.latent.shape))
        self._tell_of_training(schedule, strength)
        recipe = Recipe(
            version=1,
            bundle=self.bundle.name,
            bundle_sha256=self._bundle_sha256,
            precision=self.precision,
            engine=self.engine.name,
            device=self.engine.device,
            labels=ids.tolist() if self.class_names else None,
            seeds=seeds,
            nfe=int(schedule.nfe),
            substeps=int(schedule.total_substeps),
            solver=solver,
            temperature=temperature,
            h="inf" if math.isinf(float(schedule.h)) else float(schedule.h),  # JSON has no infinity
            strength=strength,
            resamples=int(resamples),
            noise=hashes(noise),
            image=hashes(start),
            mask=hashes(drawn),
            release=__version__,
        )
        timings = dict.fromkeys(("noise", "network", "policy", "decode", "total"), 0.0)

        def clock(stage: str, seconds: float) -> None:
            timings[stage] += 1000 * seconds

        settings = {
            "temperature": temperature,
            "solver": solver,
            "num_threads": self.options.threads,
            "clock": clock,
            "callback_every": callback_every,
            "cancelled": cancel and cancel.is_set,
            "strength": strength,
            "resamples": resamples,
        }

        def make(piece: slice) -> Any:
            drawing = time.perf_counter()
            fresh = noise[piece] if noise is not None else self._noise(seeds[piece], 0)
            x_src, known = fresh, None
            if start is not None and strength < 1:
                x_src = (1 - strength) * start[piece] + strength * fresh
            if drawn is not None:
                parts = (start[piece], drawn[piece].astype(np.float32), fresh)
                known = Known(*map(self._placed, parts))
            x_src = self._placed(x_src)
            clock("noise", time.perf_counter() - drawing)
            return sample(
                lambda x_t, sigma: self.policy(x_t, sigma, ids[piece]),
                x_src,
                schedule,
                renoise=lambda draw: self._placed(self._noise(seeds[piece], draw)),
                callback=callback and (lambda done: callback(replace(done, first=piece.start))),
                known=known,
                **settings,
            )

        with self._open():
            pieces = [make(piece) for piece in _pieces(len(ids), self.engine.max_batch)]
            decoding = time.perf_counter()
            images = None
            latents = _joined([gpu_arrays.to_host(piece) for piece in pieces])
            if not np.isfinite(latents).all():  # would be black, or whatever the processor makes of it
                raise EngineError(
                    f"bundle {self.bundle.name!r} in {self.precision} on {self.engine.name} made NaN or infinity; load "
                    f"it in another precision. `piflow-edge verify BUNDLE --precision {self.precision}` tells where"
                )
            if output != "latent":
                images = _joined([self._decoded(piece, output == "float") for piece in pieces])
            if output == "pil":
                images = as_pil(images)
            clock("decode", time.perf_counter() - decoding)
        clock("total", time.perf_counter() - began)
        known_seeds = None if noise is not None else seeds
        return Result(images, latents, known_seeds, self.engine.name, self.engine.device, timings, recipe)

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

        On the recipe's engine and device they are the same; on another, the same but for rounding, which is logged.

        Args:
            recipe: of this bundle, in this precision.
            noise, image, mask: those that were given then; a recipe holds only their hashes.
            output, callback, cancel: as in a call.

        Raises:
            RecipeError: another bundle, precision, noise, image or mask.
            Others as a call does.
        """
        if recipe.bundle_sha256 != self._bundle_sha256:
            raise RecipeError(
                f"the recipe is of bundle {recipe.bundle!r} with SHA-256 {recipe.bundle_sha256[:12]}, this is "
                f"{self.bundle.name!r} with {self._bundle_sha256[:12]}; load the one that made the image"
            )
        if recipe.precision != self.precision:
            raise RecipeError(
                f"the recipe is in {recipe.precision!r}, the bundle was loaded in {self.precision!r}; load it with "
                f"precision={recipe.precision!r}"
            )
        if (recipe.engine, recipe.device) != (self.engine.name, self.engine.device):
            log.warning(
                "the recipe ran on %s (%s), this is %s (%s): rounding may differ",
                recipe.engine, recipe.device, self.engine.name, self.engine.device,
            )  # fmt: skip
        size = len(recipe.seeds)
        start, drawn = start_and_mask(image, mask, size, self.bundle.manifest.latent, self.bundle.name)
        if noise is not None:
            noise = checked_noise(noise, (size, *self.bundle.manifest.latent.shape))
        for name, given in {"noise": noise, "image": start, "mask": drawn}.items():
            if hashes(given) != getattr(recipe, name):
                made = getattr(recipe, name)
                hint = (
                    "leave it out"
                    if made is None
                    else f"give the one whose SHA-256 begins with {made[0][:12]}"
                )
                raise RecipeError(f"the {name} is another than the recipe's; {hint}")
        shared = ("nfe", "substeps", "temperature", "solver", "h", "strength", "resamples")
        return self(
            recipe.labels,
            None if self.class_names else size,
            recipe.seeds,
            noise=noise,
            image=start,
            mask=None if drawn is None else drawn[:, 0],
            output=output,
            callback=callback,
            cancel=cancel,
            **{name: getattr(recipe, name) for name in shared if name != "strength" or start is not None},
        )

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
    def _open(self) -> Iterator[None]:
        """While images are made: not closed, and not freed before the end."""
        with self._lock:
            if self._closed:
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
        self.engine.close()
        if self.decoder is not None:
            self.decoder.close()
        if self._place is not None:
            gpu_arrays.release(self._place.ordinal)

    def _placed(self, array: np.ndarray) -> Any:
        """The array where the engine works."""
        return array if self._place is None else gpu_arrays.asarray(array, device=self._place)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, uint8 (B, H, W, C), of latents (B, C, H, W) as the network sees them."""
        return self._decoded(latents, False)

    def _decoded(self, latents: Any, as_float: bool) -> np.ndarray:
        spec, made = self.bundle.manifest.latent, decode_float if as_float else decode
        if self.decoder is None:
            return made(latents, spec)
        *_, height, width = self.bundle.manifest.decoder.outputs[0].shape
        size = max(1, _DECODED_PIXELS // (height * width))
        name = self.bundle.manifest.decoder.inputs[0].name
        images = []
        for piece in _pieces(len(latents), min(size, self.decoder.max_batch or size)):
            unscaled = latents[piece] / spec.scale + spec.shift
            (decoded,) = self.decoder.run({name: unscaled}).values()
            images.append(made(decoded))
        return _joined(images)

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
    def _bundle_sha256(self) -> str:
        return sha256(self.bundle.manifest_bytes)

    def _tell_of_training(self, schedule: Schedule, strength: float) -> None:
        spec = self.bundle.manifest.schedule
        if schedule.nfe not in self.trained_nfes:
            log.warning(
                "bundle %r was trained for %s calls per image and runs with %d",
                self.bundle.name, " or ".join(map(str, self.trained_nfes)), schedule.nfe,
            )  # fmt: skip
        elif strength < 1 and not any(
            np.isclose(strength, asked_schedule(spec, nfe, None, None).sigmas).any()
            for nfe in self.trained_nfes
        ):
            log.warning(
                "bundle %r was trained to be called at noise levels %s and starts at %.3g", self.bundle.name,
                ", ".join(f"{sigma:.3g}" for sigma in schedule.sigmas[:-1]), strength,
            )  # fmt: skip

    def _noise(self, seeds: Seeds, draw: int) -> np.ndarray:
        return drawn_noise(seeds, self.bundle.manifest.latent.shape, draw)


def _pieces(count: int, max_batch: int | None) -> Iterator[slice]:
    size = min(_BATCH_SIZE, max_batch or _BATCH_SIZE)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def load(
    bundle: str | os.PathLike[str],
    engine: str = "auto",
    precision: str | None = None,
    device: str | None = None,
    *,
    options: EngineOptions = DEFAULT_OPTIONS,
    trusted_keys: Sequence[TrustedKey] | None = None,
) -> Generator:
    """Open an exported student.

    Args:
        bundle: the bundle's folder.
        engine: "auto", the fastest that can run here, or the name of a backend; see `engines.open_engine`.
        precision: one of the bundle's ("fp32"); None is its first.
        device: what the backend runs on, such as "cpu", "cuda" or "cuda:1"; None is its best.
        options: threads and memory.
        trusted_keys: public keys in PEM, as files or as bytes: only a bundle that one of them signed is opened, and
            with an empty list none is. None opens unsigned bundles too; a signature that is there must still fit,
            which is checked where the `sign` extra is installed.

    Returns:
        A generator: call it with labels to make images. Its `engine.choice` says why that engine runs. `close`, or a
        `with` block, frees its memory.

    Raises:
        BundleError: not a bundle, or altered, or not signed by one of the `trusted_keys`.
        SigningKeyError: one of the `trusted_keys` is not an Ed25519 public key.
        EngineError: the engine cannot run here.
        MissingExtraError: the engine's package is not installed, or `trusted_keys` are given and `cryptography` is not.
    """
    opened = Bundle(bundle, trusted_keys=trusted_keys)
    policy = opened.manifest.policy
    if {spec.name for spec in opened.manifest.network.outputs} != set(policy.outputs):
        raise BundleError(
            f"a {policy.kind.upper()} student returns {', '.join(policy.outputs)}; {opened.name!r} does not"
        )
    network = open_engine(opened.graph(precision), engine=engine, device=device, options=options)
    decoder = None
    if opened.manifest.decoder is not None:
        # "auto" chooses for the decoder too, on the same device: an engine may be built for the student alone.
        same = engine if engine == "auto" else network.name
        try:
            decoder = open_engine(
                opened.decoder(precision), engine=same, device=network.device, options=options
            )
        except BaseException:
            network.close()
            raise
    log.info("bundle %r runs on %s (%s)", opened.name, network.name, network.device)
    return Generator(opened, network, decoder, precision, options)
