"""The generator an app embeds: a bundle, opened, that makes images. Any number of threads may share one."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import DECODER, STUDENT, trained_with
from piflow_edge.conditioning import build_condition_request
from piflow_edge.engines import DEFAULT_OPTIONS, Engine, EngineOptions
from piflow_edge.errors import BundleError, ShapeError, UsageError
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.system.files import sha256

from .arguments import convert_floats
from .drawing.batching import cut_batches, join_arrays
from .drawing.decoding import Decoding, check_finite, not_finite, on_host
from .drawing.latents import Student, Workplace, draw_latents
from .drawing.observer import Event, Observer, Progress, build_observer
from .drawing.stopwatch import Stopwatch
from .lifetime import Lifetime
from .recipe import Recipe
from .request import (
    Request,
    build_request,
    describe_request,
    join_requests,
    open_conditioner,
    repeat_request,
)
from .result import Result
from .settings import change_settings, describe_untrained

log = logging.getLogger(__name__)

# Images that share a network call; a longer list is cut into such pieces.
_BATCH_SIZE = 64
_OUTPUTS = ("pil", "numpy", "float", "latent")


class Generator:
    """A bundle, opened and ready to make images. Made by `load`.

    May be called from several threads at once. `close`, or leaving a `with` block, frees its memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        precision: str | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
    ):
        """`engines`: of the bundle's student, and of its decoder and text encoders where it has some, by name."""
        self.precision = bundle.precision(precision)
        self.bundle, self.engines, self.options = bundle, dict(engines), options
        self.engine, self.decoder = engine, decoder = engines[STUDENT], engines.get(DECODER)
        self.conditioner = open_conditioner(bundle, engines)
        self.student = Student(bundle.manifest, engine)
        self.decoding = Decoding(bundle.manifest, decoder, self.precision)
        # On a GPU nothing crosses the bus between noise and image.
        self._place = gpu_arrays.place_of(engine.device)
        self._keeps_one = options.keep == "one"
        self._graphs = None
        if self._place and not self._keeps_one:
            from .drawing.recorded import ImageGraphs  # late: only GPUs record

            self._graphs = ImageGraphs(bundle.manifest, engine, decoder, self.decoding, self._place)
        self._lifetime = Lifetime(bundle.name, self._free)
        self._warned: set[str] = set()

    @cached_property
    def trained_nfes(self) -> tuple[int, ...]:
        """Student calls per image that it was trained for, rising; the last is what it makes an image with."""
        schedule = self.bundle.manifest.schedule
        if schedule.good_nfes:
            return tuple(sorted(schedule.good_nfes))
        recorded = trained_with(self.bundle.manifest, "imitation", "nfe")  # of bundles that do not say it
        several = recorded if isinstance(recorded, list) else []
        known = {nfe for nfe in several if type(nfe) is int and nfe > 0}
        return tuple(sorted({*known, schedule.nfe}))

    @property
    def is_recorded(self) -> bool:
        """Whether images of a kind that came before are one CUDA graph, which a callback cuts into its calls."""
        return self._graphs is not None

    def __call__(
        self,
        subject: Any = None,
        count: int | None = None,
        seed: int | Sequence[int | tuple[int, int]] = 0,
        *,
        labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        arrays: dict[str, np.ndarray] | None = None,
        settings: SamplingSettings | None = None,
        noise: np.ndarray | None = None,
        image: Any = None,
        mask: Any = None,
        output: str = "pil",
        callback: Callable[[Progress], None] | None = None,
        callback_every: int | None = None,
        cancel: Event | None = None,
        synchronize: bool = False,
        **changes: Any,
    ) -> Result:
        """Make images: one for each of what steers them, or `count` of them.

        Args:
            subject: what the bundle is steered by, without its name: labels where it has classes.
            count: images of each label, prompt or entry of `arrays`, where None is one; in all where nothing steers.
            seed: of the noise; image i of the call is number i of the seed. Or for every image a seed of its own, or
                its (seed, index), as `Result.seeds` gives them, to make certain images again.
            labels: class ids or names; a text may hold several, "3,7", a range, "0-9", or "all".
            prompt: text or texts, where the bundle reads them.
            arrays: the network's inputs by name, made elsewhere.
            settings: how to sample. Every field may also be given by its own name, such as nfe=2, and goes before it.
            noise: starting noise (B, C, H, W) instead of the seed's, which then is of what `h` and `resamples` add.
            image: to start from, or for `mask` to keep a part of: one, or one per image to make. PIL, uint8
                (H, W, C), or latents (C, H, W) as `Result.latents` has them, which a bundle of latents wants.
            mask: white or True where something is to be drawn into `image`: a PIL image or an array (H, W), as large as
                the image or its latents; or one per image. Black stays, exactly; grey mixes the two.
            output: "pil", "numpy" (uint8), "float" (0 to 1) or "latent" (images are not made).
            callback: called with a `Progress` after every student call's segment; its `x_0` is the clean latents as the
                policy sees them, which `decode` shows. What it raises, such as `Cancelled`, reaches the caller.
            callback_every: substeps after which `callback` is called, besides; costs no network call. Rollouts are cut
                there, which rounds otherwise: latents differ by some 1e-7.
            cancel: such as `threading.Event`; once it is set, from any thread, the call ends within some substeps. It
                cuts rollouts as `callback_every` does.
            synchronize: on an NVIDIA GPU, wait for it at the end of every stage, so that `Result.timings` are of the
                stages themselves, and the call takes longer. Else they are those of queueing, and "transfer" has the
                waiting; with engine "tensorrt" images of a kind that came before are one CUDA graph, all in "transfer".
            changes: fields of `SamplingSettings`: nfe, substeps, solver, temperature, h, strength, resamples, height,
                width.

        Raises:
            ConditioningError: what steers is missing, or of another kind; LabelError: a class the bundle has not.
            ShapeError: noise, an image, a mask or arrays of another shape, or not finite.
            ScheduleError: a setting out of range, or without what it is for.
            UsageError: an argument that there is not.
            BundleError: images are asked for, and the bundle makes latents and has no decoder.
            EngineError: a network failed, or the generator was closed; NotFiniteError: it made NaN or infinity.
            Cancelled: `cancel` was set. No part of the images is returned; a callback has seen what there was.
        """
        began = time.perf_counter()
        observer = build_observer(callback, callback_every, cancel)
        settings = change_settings(settings, changes)
        condition_request = build_condition_request(
            self.conditioner, subject, labels=labels, prompts=prompt, arrays=arrays, count=count
        )
        given = {"image": image, "mask": mask, "noise": noise}
        request = build_request(self.bundle, self.conditioner, condition_request, seed, settings, **given)
        return self._make(request, output, observer, synchronize, began)

    def prepare(
        self,
        subject: Any = None,
        count: int | None = None,
        seed: int | Sequence[int | tuple[int, int]] = 0,
        *,
        labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        settings: SamplingSettings | None = None,
    ) -> Request:
        """Check what a call would ask for, and return it for `make_together`; prompts are encoded here.

        Args and errors are those of a call.
        """
        condition_request = build_condition_request(
            self.conditioner, subject, labels=labels, prompts=prompt, count=count
        )
        with self._lifetime:
            return build_request(
                self.bundle, self.conditioner, condition_request, seed, change_settings(settings, {})
            )

    def make_together(
        self,
        requests: Sequence[Request],
        *,
        output: str = "pil",
        callback: Callable[[Progress], None] | None = None,
    ) -> list[Result]:
        """Make the images of several requests in one batch, and return a result for each.

        Every image is the one that a call for it alone makes, wherever the engine rounds alike in every batch, as
        ONNX Runtime does on the CPU.

        Args:
            requests: of `prepare`, all of one `batch_key`.
            output, callback: as in a call; a callback sees the images of all requests, in their order.

        Raises:
            ShapeError: requests that no batch can hold. Others as a call does.
        """
        clock, began = Stopwatch(), time.perf_counter()
        latents, images = self._draw_all(join_requests(requests), output, Observer(callback), clock)
        clock.add("total", began)
        stops = list(accumulate(map(len, requests)))
        pieces = [slice(stop - len(request), stop) for request, stop in zip(requests, stops, strict=True)]
        return [
            self._describe(request, latents[piece], None if images is None else images[piece], clock)
            for request, piece in zip(requests, pieces, strict=True)
        ]

    def make_again(
        self,
        recipe: Recipe,
        *,
        arrays: dict[str, np.ndarray] | None = None,
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
            arrays, noise, image, mask: those that were given then; a recipe holds only their hashes.
            output, callback, cancel: as in a call.

        Raises:
            RecipeError: another bundle, precision, noise, image or mask.
            Others as a call does.
        """
        began = time.perf_counter()
        observer = build_observer(callback, None, cancel)
        given = {"arrays": arrays, "noise": noise, "image": image, "mask": mask}
        request = repeat_request(self.bundle, self.conditioner, recipe, self._run, **given)
        return self._make(request, output, observer, False, began)

    def _make(
        self, request: Request, output: str, observer: Observer, synchronize: bool, began: float
    ) -> Result:
        clock = Stopwatch(self._wait_for_gpu if synchronize and self._place else None)
        latents, images = self._draw_all(request, output, observer, clock)
        clock.add("total", began)
        return self._describe(request, latents, images, clock)

    def _draw_all(
        self, request: Request, output: str, observer: Observer, clock: Stopwatch
    ) -> tuple[np.ndarray, Any]:
        """Draw latents in as many pieces as the engine needs, and make images of them."""
        self._check_output(output)
        self._warn_if_untrained(request)
        # The policies' threads are started from this one, and keep to its cores.
        with self._lifetime, self.options.on_cores():
            # Where networks take turns, the decoder has its own once all is drawn.
            wanted = "latent" if self._keeps_one else output
            pieces = [
                self._draw(request, piece, wanted, observer, clock)
                for piece in cut_batches(len(request), _BATCH_SIZE, self.engine)
            ]
            latents = join_arrays([piece for piece, _ in pieces])
            images = None
            if wanted != "latent":
                images = join_arrays([piece for _, piece in pieces if piece is not None])
            if wanted != output:
                images = self.decoding.images(latents, as_float=output == "float", clock=clock)
            if output == "pil":
                from piflow_edge.system.sheets import as_pil  # Pillow is only needed where pictures are made

                images = clock.run("decode", as_pil, images)
        return latents, images

    def _describe(self, request: Request, latents: np.ndarray, images: Any, clock: Stopwatch) -> Result:
        recipe = describe_request(self.conditioner, request, self._run)
        seeds = None if request.noise is not None else request.seeds
        return Result(images, latents, seeds, self.engine.name, self.engine.device, clock.ms, recipe)

    def _draw(
        self, request: Request, piece: slice, output: str, observer: Observer, clock: Stopwatch
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents and images of some of a request's images, as one CUDA graph where that can be."""
        manifest, threads = self.bundle.manifest, self.options.threads
        recorded = None
        if self._graphs is not None and not observer.is_watching and not clock.waits:
            recorded = self._graphs.draw(request, piece, output, threads, clock)
        if recorded is not None:
            latents, drawn = recorded["latents"], None
        else:
            drawn = draw_latents(
                self.student, request, piece, Workplace(self._place, threads), observer, clock
            )
            latents = on_host(drawn, clock)
        check_finite(latents, "the student", manifest, self.precision, self.engine)
        if output == "latent":
            return latents, None
        if recorded is None:
            return latents, self.decoding.images(drawn, as_float=output == "float", clock=clock)
        finite = [np.isfinite(array).all() for name, array in recorded.items() if name.startswith("finite")]
        if self.decoder is not None and not all(finite):
            raise not_finite("the decoder", manifest, self.precision, self.decoder)
        return latents, join_arrays([array for name, array in recorded.items() if name.startswith("images")])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Images, uint8 (B, H, W, C), of latents (B, C, H, W) as the network sees them.

        May be called from a callback; to the end of its call, if the generator is closed meanwhile.

        Raises:
            ShapeError: latents of another shape than the bundle's, or not finite.
            EngineError: the decoder failed, or the generator was closed; NotFiniteError: it made NaN or infinity.
        """
        manifest = self.bundle.manifest
        shape = manifest.latent.shape
        if manifest.sizes is not None and np.ndim(latents) == 4:
            height, width = (side * manifest.sizes.factor for side in np.shape(latents)[2:])
            shape = manifest.state_shape(height, width)
        latents = convert_floats("latents", latents, shape)
        self._lifetime.begin(within_call=True)
        try:
            return self.decoding.images(latents, as_float=False, clock=Stopwatch())
        finally:
            self._lifetime.end()

    def close(self) -> None:
        """Free the networks' memory, at once or when the calls that are running are done; more calls are refused."""
        self._lifetime.close()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        nfe, where = self.bundle.manifest.schedule.nfe, f"{self.engine.name} on {self.engine.device}"
        calls = f"{nfe} network call{'s' * (nfe != 1)} per image"
        return f"<Generator {self.bundle.name!r}: {self.precision}, {where}, {calls}; {self.conditioner.summarize()}>"

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "a Generator holds an open engine, which cannot be pickled or copied; load the bundle again in the other "
            "process. The threads of one process may share a Generator"
        )

    def _check_output(self, output: str) -> None:
        if output not in _OUTPUTS:
            raise ShapeError(f"output is {', '.join(map(repr, _OUTPUTS))}; got {output!r}")
        if output != "latent" and not self.bundle.manifest.makes_images:
            raise BundleError(
                f"bundle {self.bundle.name!r} makes latents and has no decoder; ask for output='latent', or export it "
                "with --autoencoder"
            )

    def _warn_if_untrained(self, request: Request) -> None:
        spec = self.bundle.manifest.schedule
        problem = describe_untrained(request.settings, request.schedule, spec, self.trained_nfes)
        if problem is not None and problem not in self._warned:
            self._warned.add(problem)
            log.warning("bundle %r %s", self.bundle.name, problem)

    def _wait_for_gpu(self) -> None:
        if self._place is not None:
            nvidia.wait_for(self._place.stream)

    def _free(self) -> None:
        with (
            ExitStack() as closing
        ):  # all of them, also where one fails: a GPU that failed says so at every close
            if self._place is not None:
                closing.callback(gpu_arrays.release, self._place.ordinal)
            for engine in dict.fromkeys((*self.engines.values(), self.decoder, self.engine)):
                if engine is not None:
                    closing.callback(engine.close)
            if self._graphs is not None:
                closing.callback(self._graphs.free)

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
