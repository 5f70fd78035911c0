"""The student on its own trajectories: what a converted graph is fitted to, and how far off it then is."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from piflow_edge.bundle.manifest import STUDENT, Manifest
from piflow_edge.bundle.sections import ToleranceSpec
from piflow_edge.conditioning import Conditioner
from piflow_edge.engines import Engine, Graph, open_engine
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.drawing.acceleration import integrate
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.verification import (
    golden_conditioning,
    peak_error,
    relative_error,
    rms_levels,
    rms_of_psnr,
)
from piflow_edge.sampling import Hooks, sample
from piflow_edge.sampling_settings import SamplingSettings

Inputs = dict[str, np.ndarray]

# Not the golden images' seed: a precision is checked on other inputs than it was fitted to.
CALIBRATION_SEED = 1
CALIBRATION_IMAGES = 16
# Of a network of so many weights, or fewer; a larger one is slower, and each image of it has more values to look at.
_WEIGHTS_FOR_ALL = 10_000_000
_FEWEST_IMAGES = 3
# Images in one call: some speed for small networks, little memory for large ones.
_TOGETHER = 4
# Not the fastest here: whether an export passes must not hang on the exporting machine's GPU, and int8 is for CPUs.
ENGINE = "ort-cpu"


@dataclass
class Conversion:
    """A graph in another precision.

    `float32_nodes`: nodes left in float32 -> why, or "all". `layer_errors`: of layers in fewer bits, as far as they
    were measured; see `layer_errors.measure_layers`.
    """

    graph: Graph
    float32_nodes: dict[str, str] | str = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)


def keep_fp32(network: str, graph: Graph, calibration: "Calibration | None") -> Conversion:
    """The conversion to fp32, which graphs are exported in; see `Precision`."""
    return Conversion(graph)


def count_images(most: int, parameters: int) -> int:
    """Return how many images an export draws of a network, at most `most`: large networks are given few."""
    return min(most, max(_FEWEST_IMAGES, most * _WEIGHTS_FOR_ALL // max(parameters, 1)))


class Calibration:
    """An fp32 student and what it makes of up to `CALIBRATION_IMAGES` seeds; see `count_images`.

    `batches`: what the network is fed, one batch per call of each trajectory. `encoder_inputs`: what each text encoder
    is fed for some prompts, by its network's name. `room`: folder for files that a conversion needs.

    Args:
        student: the fp32 network.
        manifest: of its bundle.
        nfes: calls per image; a trajectory is run for each.
        decoder: makes images of latents.
        conditioner: the student's, opened; None is what the manifest says.
        golden: golden samples of a network that memory may not hold, which is then not run: its batches are theirs.
        room: see above; None is the system's.
    """

    def __init__(
        self,
        student: Graph,
        manifest: Manifest,
        nfes: Iterable[int],
        decoder: Graph | None = None,
        conditioner: Conditioner | None = None,
        golden: Inputs | None = None,
        room: Path | None = None,
    ):
        self.manifest, self.room = manifest, room
        self.batches: list[Inputs] = []
        self.encoder_inputs: dict[str, list[Inputs]] = {}
        self._encodings: dict[str, list[dict[str, np.ndarray]]] = {}
        self._outputs: list[dict[str, np.ndarray]] = []
        if golden is not None:
            self.batches = golden_calls(manifest, golden)
            return
        self._count = count_images(CALIBRATION_IMAGES, student.size // 4)
        self._conditioning = manifest.example(self._count, conditioner=conditioner)
        self._noise = self._draw_noise(0)
        self._decoder = open_engine(decoder, engine=ENGINE) if decoder else None
        engine = open_engine(student, engine=ENGINE)
        drawn = {nfe: self._latents(engine, nfe, record=True) for nfe in nfes}
        if (nfe := manifest.schedule.nfe) not in drawn:
            drawn[nfe] = self._latents(engine, nfe)
        self._drawn = drawn[nfe]

    def inputs_of(self, network: str) -> list[Inputs]:
        """What a network of the bundle is fed: of the decoder, one state of the last call; of encoders, prompts."""
        if network == STUDENT:
            return self.batches
        if network in self.encoder_inputs:
            return self.encoder_inputs[network]
        states = self.manifest.latent.restore(self.batches[-1]["x_t"][:1])
        return [{self.manifest.networks[network].inputs[0].name: states.astype(np.float32)}]

    def errors(self, graph: Graph) -> dict[str, float]:
        """How far a converted student is off, by the names and measures of `ToleranceSpec`; `psnr` as a difference.

        What `verify` asks of golden samples is asked of the calibration images here: network outputs, latents, and
        the root mean square of images, or of latents where there are none.
        """
        engine = open_engine(graph, engine=ENGINE)
        outputs = [
            relative_error(found, expected[name])
            for batch, expected in zip(self.batches, self._outputs, strict=True)
            for name, found in _run(engine, batch).items()
        ]
        drawn = self._latents(engine, self.manifest.schedule.nfe)
        if self.manifest.makes_images:
            whole = rms_levels(self._images(drawn), self._images(self._drawn))
        else:
            whole = peak_error(drawn, self._drawn)
        return {"outputs": max(outputs), "latents": relative_error(drawn, self._drawn), "psnr": whole}

    def share(
        self, graph: Graph, tolerances: ToleranceSpec, network: str = STUDENT, exact: Graph | None = None
    ) -> float:
        """The largest error of a converted network in units of what `tolerances` allow; see `errors`.

        `exact`: the text encoder in fp32, where `network` is one.
        """
        if network != STUDENT:
            assert exact is not None
            return self._error_of_encoder(network, graph, exact) / tolerances.encodings
        errors = self.errors(graph)
        allowed = rms_of_psnr(tolerances.psnr, peak=255 if self.manifest.makes_images else 1)
        limits = {"outputs": tolerances.outputs, "latents": tolerances.latents, "psnr": allowed}
        shares = [errors[name] / limit for name, limit in limits.items()]
        return max(np.inf if np.isnan(share) else share for share in shares)

    def _error_of_encoder(self, network: str, graph: Graph, exact: Graph) -> float:
        """The largest relative error of its outputs, at tokens that it is told to see."""
        inputs = self.encoder_inputs[network]
        if network not in self._encodings:
            self._encodings[network] = _encode_all(exact, inputs)
        errors = [
            relative_error(found[name], array)
            for found, wanted in zip(_encode_all(graph, inputs), self._encodings[network], strict=True)
            for name, array in wanted.items()
        ]
        return np.inf if np.isnan(errors).any() else max(errors)

    def _draw_noise(self, draw: int) -> np.ndarray:
        return philox_normal(CALIBRATION_SEED, range(self._count), self.manifest.latent.shape, draw=draw)

    def _latents(self, engine: Engine, nfe: int, *, record: bool = False) -> np.ndarray:
        def network(x_t, sigma):
            inputs = self.manifest.network_inputs(x_t, sigma, self._conditioning)
            outputs = _run(engine, inputs)
            if record:
                self.batches.append(inputs)
                self._outputs.append(outputs)
            return self.manifest.policy.policy(outputs, x_t, sigma)

        spec = self.manifest.schedule
        return sample(
            network,
            self._noise,
            spec.schedule(nfe=nfe),
            SamplingSettings(temperature=spec.temperature_of(nfe)),
            Hooks(integrate=integrate, renoise=self._draw_noise),
        )

    def _images(self, latents: np.ndarray) -> np.ndarray:
        spec = self.manifest.latent
        if self._decoder is None:
            return decode(latents, spec)
        assert self.manifest.decoder is not None
        name = self.manifest.decoder.inputs[0].name
        unscaled = spec.restore(latents).astype(np.float32)
        # One at a time: large images would not fit otherwise.
        parts = [next(iter(self._decoder.run({name: one[None]}).values())) for one in unscaled]
        return decode(np.concatenate(parts))


def golden_calls(manifest: Manifest, golden: Mapping[str, np.ndarray]) -> list[Inputs]:
    """What a student was fed for golden samples, one batch per call."""
    conditioning = golden_conditioning(manifest, golden)
    return [
        manifest.network_inputs(golden[f"x_t.{i}"], segment.sigma_src, conditioning)
        for i, segment in enumerate(manifest.schedule.schedule().segments)
    ]


def _run(engine: Engine, inputs: Inputs) -> dict[str, np.ndarray]:
    """A network call for any number of samples, `_TOGETHER` at a time."""
    count = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[start : start + _TOGETHER] for name, array in inputs.items()})
        for start in range(0, count, _TOGETHER)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _encode_all(graph: Graph, batches: Iterable[Inputs]) -> list[dict[str, np.ndarray]]:
    """What a text encoder makes of prompts; 0 at tokens that it does not see."""
    with closing(open_engine(graph, engine=ENGINE)) as engine:
        found = [engine.run(inputs) for inputs in batches]
    for made, inputs in zip(found, batches, strict=True):
        made["hidden_states"] = made["hidden_states"] * inputs["attention_mask"][..., None]
    return found


def split_samples(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The samples of calibration batches, one by one, each as a batch of its own."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: array[i : i + 1] for name, array in batch.items()}
