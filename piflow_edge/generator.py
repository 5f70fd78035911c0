"""The generator an app embeds: a bundle, opened, that makes images."""

import logging
import numbers
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from piflow_edge.engines import DEFAULT_OPTIONS, Engine, EngineOptions, open_engine

from .bundle import Bundle
from .errors import BundleError, LabelError, ScheduleError, ShapeError
from .images import as_pil, decode
from .kernels import gpu_arrays
from .noise import philox_normal
from .policies import Policy
from .sampling import sample
from .signature import TrustedKey

log = logging.getLogger(__name__)

# Images that share a network call; a longer list is cut into such pieces.
_BATCH_SIZE = 64
# Pixels that are decoded at a time: a decoder's inner states are hundreds of times larger than its images.
_DECODED_PIXELS = 1 << 20


@dataclass(frozen=True)
class Result:
    """What a generator made.

    `images`: PIL images, or a uint8 array (B, H, W, C) for output="numpy", or None for output="latent".
    `latents`: float32 (B, C, H, W). `seeds`: for every image the (seed, index) that makes it again, None when the
    noise was given. `engine`, `device`: what ran the network. `timings`: milliseconds per stage ("noise",
    "network", "policy", "decode", "total").
    """

    images: Any
    latents: np.ndarray
    seeds: list[tuple[int, int]] | None
    engine: str
    device: str
    timings: dict[str, float]


class Generator:
    """A bundle, opened and ready to make images. Made by `load`."""

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

    @property
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
        seed: int | Sequence[tuple[int, int]] = 0,
        nfe: int | None = None,
        substeps: int | None = None,
        temperature: float | None = None,
        noise: np.ndarray | None = None,
        output: str = "pil",
        callback: Callable[[int, int, np.ndarray], None] | None = None,
        solver: str = "euler",
    ) -> Result:
        """Make one image per label, or `count` images.

        Args:
            labels: class ids or names, one per image; refused by bundles without classes.
            count: number of images, for bundles without classes; refused otherwise.
            seed: of the starting noise; image i of the call is number i of the seed. Or one (seed, index) per
                image, as `Result.seeds` gives them, to make certain images again.
            nfe: student calls per image; None is what the student was trained for.
            substeps: Euler steps over all of raw time; None is what the student was trained with.
            temperature: of GM policies at every call but the last, 0 or more; None is the bundle's.
            noise: starting noise (B, C, H, W) instead of a seed.
            output: "pil", "numpy" (uint8) or "latent" (images are not made).
            callback: told (calls done, nfe, latents) after every student call; more than 64 images are made in
                pieces of 64, and the count starts again with each.
            solver: "euler", as the student was trained, or "multistep"; see `rollout`.

        Raises:
            LabelError: a class the bundle does not know, or none given; a count below 1.
            ShapeError: noise of another shape, or not finite.
            ScheduleError: `nfe`, `substeps` or `temperature` out of range; an unknown solver.
            BundleError: images are asked for, and the bundle makes latents and has no decoder.
            EngineError: the network call failed.
        """
        began = time.perf_counter()
        if output not in ("pil", "numpy", "latent"):
            raise ShapeError(f"output is 'pil', 'numpy' or 'latent'; got {output!r}")
        if output != "latent" and not self.bundle.manifest.makes_images:
            raise BundleError(
                f"bundle {self.bundle.name!r} makes latents and has no decoder; ask for output='latent', or export it "
                "with --autoencoder"
            )
        ids = self._label_ids(labels, count)
        trained = self.bundle.manifest.schedule
        changes = {"nfe": nfe, "total_substeps": substeps}
        schedule = trained.schedule(**{k: v for k, v in changes.items() if v is not None})
        temperature = trained.temperature if temperature is None else temperature
        if not (isinstance(temperature, numbers.Real) and temperature >= 0):
            raise ScheduleError(f"temperature is 0 or more; got {temperature!r}")
        if schedule.nfe not in self.trained_nfes:
            log.warning(
                "bundle %r was trained for %s calls per image and runs with %d", self.bundle.name,
                " or ".join(map(str, self.trained_nfes)), schedule.nfe,
            )  # fmt: skip
        timings = dict.fromkeys(("noise", "network", "policy", "decode", "total"), 0.0)

        def clock(stage: str, seconds: float) -> None:
            timings[stage] += 1000 * seconds

        told = None
        if callback is not None:

            def told(done: int, nfe: int, x_t) -> None:
                callback(done, nfe, gpu_arrays.to_host(x_t))

        seeds = None if noise is not None else self._seeds(seed, len(ids))
        if noise is not None:
            noise = self._checked_noise(noise, len(ids))
        pieces = []
        for start in range(0, len(ids), _BATCH_SIZE):
            piece = slice(start, start + _BATCH_SIZE)
            drawing = time.perf_counter()
            x_src = self._placed(noise[piece] if noise is not None else self._noise(seeds[piece], 0))
            clock("noise", time.perf_counter() - drawing)
            pieces.append(
                sample(
                    lambda x_t, sigma, piece=piece: self.policy(x_t, sigma, ids[piece]),
                    x_src,
                    schedule,
                    temperature=temperature,
                    solver=solver,
                    num_threads=self.options.threads,
                    renoise=lambda draw, piece=piece: self._placed(self._renoise(seeds, piece, draw)),
                    clock=clock,
                    callback=told,
                )
            )
        decoding = time.perf_counter()
        images = None if output == "latent" else np.concatenate([self.decode(piece) for piece in pieces])
        latents = np.concatenate([gpu_arrays.to_host(piece) for piece in pieces])
        if output == "pil":
            images = as_pil(images)
        clock("decode", time.perf_counter() - decoding)
        clock("total", time.perf_counter() - began)
        return Result(images, latents, seeds, self.engine.name, self.engine.device, timings)

    def close(self) -> None:
        """Free the networks' memory. May be called twice; a call for images after it is an error."""
        self.engine.close()
        if self.decoder is not None:
            self.decoder.close()
        if self._place is not None:
            gpu_arrays.release(self._place.ordinal)

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, uint8 (B, H, W, C), of latents (B, C, H, W) as the network sees them."""
        spec = self.bundle.manifest.latent
        if self.decoder is None:
            return decode(latents, spec)
        *_, height, width = self.bundle.manifest.decoder.outputs[0].shape
        size = max(1, _DECODED_PIXELS // (height * width))
        name = self.bundle.manifest.decoder.inputs[0].name
        images = []
        for start in range(0, len(latents), size):
            unscaled = latents[start : start + size] / spec.scale + spec.shift
            (decoded,) = self.decoder.run({name: unscaled}).values()
            images.append(decode(decoded))
        return np.concatenate(images)

    def _placed(self, array: np.ndarray):
        """The array where the engine works."""
        return array if self._place is None else gpu_arrays.asarray(array, device=self._place)

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

    def _label_ids(self, labels, count) -> np.ndarray:
        if self.bundle.manifest.conditioning.kind == "none":
            if labels is not None or not (isinstance(count, numbers.Integral) and count > 0):
                raise LabelError(
                    f"bundle {self.bundle.name!r} has no classes: it wants count, 1 or more, and no labels; got "
                    f"{count=}, {labels=}"
                )
            return np.zeros(count, np.int64)  # which nothing reads
        known = f"{len(self.class_names)} classes, 0 to {len(self.class_names) - 1}: {', '.join(self.class_names)}"
        if count is not None or labels is None:
            raise LabelError(
                f"bundle {self.bundle.name!r} wants labels, one per image, and no count; it has {known}"
            )
        if isinstance(labels, (numbers.Number, str)):
            labels = [labels]
        ids = [self._label_id(label, known) for label in np.atleast_1d(np.asarray(labels, object)).tolist()]
        if not ids:
            raise LabelError(f"give one label or more; bundle {self.bundle.name!r} has {known}")
        return np.array(ids, np.int64)

    def _label_id(self, label, known: str) -> int:
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        is_id = isinstance(label, numbers.Integral) and not isinstance(label, bool)
        if is_id and 0 <= label < len(self.class_names):
            return int(label)
        raise LabelError(f"bundle {self.bundle.name!r} has {known}; got label {label!r}")

    def _seeds(self, seed, count: int) -> list[tuple[int, int]]:
        if isinstance(seed, numbers.Integral):
            return [(int(seed), i) for i in range(count)]
        try:
            seeds = [(s, i) for s, i in seed]
        except (TypeError, ValueError):
            raise ShapeError(
                f"seed is a whole number, or one (seed, index) per image; got {seed!r}"
            ) from None
        if len(seeds) != count:
            raise ShapeError(f"give one (seed, index) per image: {count} images, {len(seeds)} pairs")
        return seeds

    def _noise(self, seeds: list[tuple[int, int]], draw: int) -> np.ndarray:
        shape = self.bundle.manifest.latent.shape
        if len({s for s, _ in seeds}) == 1:
            return philox_normal(seeds[0][0], [i for _, i in seeds], shape, draw=draw)
        return np.concatenate([philox_normal(s, [i], shape, draw=draw) for s, i in seeds])

    def _renoise(self, seeds, piece, draw: int) -> np.ndarray:
        if seeds is None:
            raise ScheduleError(
                "a schedule with h above 0 draws noise between calls; give a seed instead of noise"
            )
        return self._noise(seeds[piece], draw)

    def _checked_noise(self, noise, count: int) -> np.ndarray:
        expected = (count, *self.bundle.manifest.latent.shape)
        try:
            noise = np.asarray(noise)
        except ValueError as error:
            raise ShapeError(f"noise must be one array {expected}: {error}") from error
        if noise.shape != expected or not np.issubdtype(noise.dtype, np.floating):
            raise ShapeError(f"noise must be floating point {expected}; got {noise.dtype} {noise.shape}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused in the next line
            noise = noise.astype(np.float32, copy=False)
        if not np.isfinite(noise).all():
            raise ShapeError("noise must be finite in float32; it holds NaN or infinity")
        return noise


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
    network = open_engine(opened.graph(precision), engine=engine, device=device, options=options)
    decoder = None
    if opened.manifest.decoder is not None:
        settings = {"engine": network.name, "device": network.device, "options": options}
        decoder = open_engine(opened.decoder(precision), **settings)
    log.info("bundle %r runs on %s (%s)", opened.name, network.name, network.device)
    policy = opened.manifest.policy
    if {spec.name for spec in opened.manifest.network.outputs} != set(policy.outputs):
        raise BundleError(
            f"a {policy.kind.upper()} student returns {', '.join(policy.outputs)}; {opened.name!r} does not"
        )
    return Generator(opened, network, decoder, precision, options)
