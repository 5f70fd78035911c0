"""Does a bundle still compute what it did when it was exported? Compared layer by layer with its golden samples.

`golden.npz` holds, for a few images: `noise` and `conditioning.NAME` of every input that steers; for each student call
i `x_t.i` (its input), `NAME.i` (its outputs), `levels.i` and `velocities.i` (the policy at some noise levels); and at
the end `latents` and, where the bundle makes some, `images`. Where what steers has named axes, or images have several
sizes, `resized.conditioning.NAME`, `resized.NAME` and, of those, `resized.x_t` are of a first call with other lengths.
A layer is fed the golden input of that layer, so the first row that fails is the culprit.
"""

import io
import logging
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.format4 import name_golden_as_format_5
from piflow_edge.bundle.manifest import GOLDEN, Manifest
from piflow_edge.bundle.sections import ToleranceSpec
from piflow_edge.conditioning import ConditionRequest, take
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import BundleError, CheckFailedError, EngineError, MissingExtraError, NotFiniteError
from piflow_edge.kernels.normal import philox_normal
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import Policy
from piflow_edge.policies.rounding import bound_velocities
from piflow_edge.sampling import Hooks, sample
from piflow_edge.sampling_settings import SamplingSettings

from .generator import Generator
from .graphs import read_graph

log = logging.getLogger(__name__)

# What was compared, what came out and what should have.
Pair = tuple[str, np.ndarray, np.ndarray]

# The golden images are numbers 0, 1, 2, ... of this seed.
GOLDEN_SEED = 0
# Images at a time that a network is checked with, beside all the golden ones.
BATCHES = (1, 3)
# Key of the golden images' prompts, where a bundle reads some.
PROMPTS = "prompts"


@dataclass(frozen=True)
class Row:
    """One layer's comparison. `error`: worst difference, relative to the largest golden value (images: in levels).

    `where`: the array it was found in, and the batch. `tolerance`: what the bundle accepts. `precision`: of the graphs.
    """

    layer: str
    error: float
    tolerance: float
    where: str
    precision: str = "fp32"

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN does not pass


def verify(generator: Generator) -> list[Row]:
    """Compare a bundle's engine and kernels with its golden samples: outputs, velocities, states, latents, images.

    Networks are run with all golden images, and with batches of `BATCHES`. Whole images, drawn from the golden noise,
    come last: their root mean square error, in levels; of latents where there are no images, relative to the largest.

    Sampler graphs, if there are any, are compared too; with the runtime in the same precision.

    Files need no check here: opening the bundle has hashed them all.

    Raises:
        BundleError: the golden samples do not fit the bundle.
        CheckFailedError: a network gives NaN or infinity; the layer that gives it first is named.
    """
    bundle = generator.bundle
    golden, tolerances = read_golden(bundle), bundle.manifest.tolerances[generator.precision]
    outputs = _compare_calls(generator, golden)
    latents = _compare_latents(generator, golden)
    rows = [
        *_compare_prompts(generator, golden, tolerances),
        _worst("network outputs", outputs, tolerances.outputs),
        _compare_velocities(generator, golden, tolerances.velocities),
        _worst("trajectories", _compare_trajectory(generator, golden), tolerances.latents),
        _worst("latents", latents, tolerances.latents),
        *_compare_whole(generator, golden, latents, tolerances),
    ]
    if bundle.manifest.samplers:
        latents, images = _sampler_pairs(generator, golden)
        rows.append(_worst("sampler latents", latents, tolerances.samplers))
        if images:
            rows.append(_worst("sampler images", images, tolerances.images, measure=_levels))
    return [replace(row, precision=generator.precision) for row in rows]


def _compare_prompts(
    generator: Generator, golden: dict[str, np.ndarray], tolerances: ToleranceSpec
) -> list[Row]:
    """What comes before the network where prompts are read: token ids, exactly, and encodings."""
    if PROMPTS not in golden:
        return []
    condition_request = ConditionRequest(prompts=golden[PROMPTS].tolist())
    traced, encoded = (
        generator.conditioner.trace(condition_request),
        generator.conditioner.encode(condition_request),
    )
    ids = [(name, traced[name], golden[name]) for name in traced]
    theirs = golden_conditioning(generator.bundle.manifest, golden)
    encodings = [(name, encoded[name], theirs[name]) for name in theirs]
    return [
        _worst("tokens", ids, 0.0, measure=relative_error),
        _worst("encodings", encodings, tolerances.encodings),
    ]


def _batches(generator: Generator, golden: dict[str, np.ndarray]) -> list[int]:
    count = len(golden["noise"])
    largest = min(count, generator.engine.max_batch or count)
    return sorted({min(size, largest) for size in (*BATCHES, count)})


def _compare_calls(generator: Generator, golden: dict[str, np.ndarray]) -> list[Pair]:
    """What the network makes of the golden inputs of every call, beside what it should."""
    manifest, conditioning = generator.bundle.manifest, golden_conditioning(generator.bundle.manifest, golden)
    outputs = []
    segments, sizes = manifest.schedule.schedule().segments, _batches(generator, golden)
    for i, segment in enumerate(segments):
        x_t = golden[f"x_t.{i}"]
        theirs = _golden_outputs(generator.bundle, golden, i)
        for size in sizes:
            ours = _call(generator, x_t[:size], segment.sigma_src, take(conditioning, slice(size)))
            outputs += [(f"{name}.{i}, batch {size}", ours[name], theirs[name][:size]) for name in theirs]
    if manifest.has_several_lengths:
        size = sizes[-1]
        conditioning = take(golden_conditioning(generator.bundle.manifest, golden, "resized."), slice(size))
        x_t = golden["noise" if manifest.sizes is None else "resized.x_t"]
        ours = _call(generator, x_t[:size], segments[0].sigma_src, conditioning)
        outputs += [(f"{name}, resized", ours[name], golden[f"resized.{name}"][:size]) for name in ours]
    return outputs


def _compare_velocities(generator: Generator, golden: dict[str, np.ndarray], tolerance: float) -> Row:
    """The row of the policy alone, made of the golden outputs: of the call that is worst for what it may be."""
    manifest, rows = generator.bundle.manifest, []
    for i, segment in enumerate(manifest.schedule.schedule().segments):
        x_t, levels = golden[f"x_t.{i}"], golden[f"levels.{i}"].tolist()
        outputs = _golden_outputs(generator.bundle, golden, i)
        policy = generator.student.as_policy(outputs, x_t, segment.sigma_src)
        found = np.stack([policy.velocity(x_t, level) for level in levels])
        bound = bound_velocities(manifest.policy, outputs, x_t, segment.sigma_src, levels)
        pair = (f"velocities.{i}", found, golden[f"velocities.{i}"])
        rows.append(_worst("policy velocities", [pair], max(tolerance, bound)))
    return max(rows, key=lambda row: np.inf if np.isnan(row.error) else row.error / row.tolerance)


def _compare_trajectory(generator: Generator, golden: dict[str, np.ndarray]) -> list[Pair]:
    """Where the golden policies carry the golden state of every call, beside where they should."""
    noise, spec, pairs = golden["noise"], generator.bundle.manifest.schedule, []

    def enter(x_t: Any, i: int) -> Any:
        pairs.append((f"x_t.{i}", x_t, golden[f"x_t.{i}"]))
        return golden[f"x_t.{i}"]

    def call(x_t: Any, sigma: float) -> Policy:
        outputs = _golden_outputs(generator.bundle, golden, len(pairs) - 1)
        return generator.student.as_policy(outputs, x_t, sigma)

    def renoise(draw: int) -> np.ndarray:
        return philox_normal(GOLDEN_SEED, range(len(noise)), noise.shape[1:], draw=draw)

    schedule = spec.schedule()
    settings = SamplingSettings(temperature=spec.temperature_of(schedule.nfe))
    latents = sample(call, noise, schedule, settings, Hooks(enter, integrate, renoise))
    return [*pairs, ("latents", latents, golden["latents"])]


def _compare_latents(generator: Generator, golden: dict[str, np.ndarray]) -> list[Pair]:
    """Latents drawn from the seed, so that the noise is compared too."""
    conditioning, pairs = golden_conditioning(generator.bundle.manifest, golden), []
    for size in _batches(generator, golden):
        wanted: dict[str, Any] = {"count": size}
        if conditioning:
            wanted = {"arrays": take(conditioning, slice(size))}
        result = generator(**wanted, seed=GOLDEN_SEED, output="latent")
        pairs.append((f"latents, batch {size}", result.latents, golden["latents"][:size]))
    return pairs


def _compare_whole(
    generator: Generator, golden: dict[str, np.ndarray], latents: list[Pair], tolerances: ToleranceSpec
) -> list[Row]:
    """Rows of decoded and of drawn images; of drawn latents where there are no images."""
    if not generator.bundle.manifest.makes_images:
        whole = rms_of_psnr(tolerances.psnr, peak=1)
        return [_worst("drawn latents", latents, whole, measure=peak_error)]
    # From the golden latents, so that this row speaks of the decoder alone.
    images = [("images", _decode(generator, golden["latents"]), golden["images"])]
    drawn = [(name, _decode(generator, ours), golden["images"][: len(ours)]) for name, ours, _ in latents]
    return [
        _worst("images", images, tolerances.images, measure=_levels),
        _worst("drawn images", drawn, rms_of_psnr(tolerances.psnr), measure=rms_levels),
    ]


def _call(generator: Generator, x_t: np.ndarray, sigma: float, conditioning) -> dict[str, np.ndarray]:
    """One network call, whose outputs are finite."""
    outputs = generator.student.outputs(x_t, sigma, conditioning)
    _check_finite(generator, outputs, x_t, sigma, conditioning)
    return outputs


def _check_finite(generator: Generator, outputs: dict[str, np.ndarray], x_t, sigma, conditioning) -> None:
    odd = [name for name, value in outputs.items() if not np.isfinite(value).all()]
    if not odd:
        return
    bundle, precision = generator.bundle, generator.precision
    inputs = generator.student.inputs(x_t, sigma, conditioning)
    layer = _first_non_finite(read_graph(bundle, "student", precision), inputs)
    raise CheckFailedError(
        f"bundle {bundle.name!r} in {precision} gives NaN or infinity in {odd[0]} at noise level {sigma:.3g}; the "
        f"first layer to do so: {layer}"
    )


def _decode(generator: Generator, latents: np.ndarray) -> np.ndarray:
    try:
        return generator.decode(latents)
    except NotFiniteError as error:
        bundle, precision = generator.bundle, generator.precision
        layer = _first_non_finite(
            read_graph(bundle, "decoder", precision), generator.decoding.inputs(latents)
        )
        raise CheckFailedError(
            f"bundle {bundle.name!r} in {precision} gives NaN or infinity in its decoder; the first layer to do so: "
            f"{layer}"
        ) from error


def _first_non_finite(graph: Graph, inputs: dict[str, np.ndarray]) -> str:
    from piflow_edge.engines.layers import first_non_finite  # needs onnx, of which the runtime is free

    try:
        layer = first_non_finite(graph, inputs)
    except MissingExtraError as error:
        return f"unknown, because {error}"
    return layer or "none on its own, only the layers as the engine joins them"


def _sampler_pairs(generator: Generator, golden: dict[str, np.ndarray]):
    """What each sampler graph makes of the golden noise, and what it should: latents, then images."""
    bundle, spec = generator.bundle, generator.bundle.manifest.schedule
    latents, images = [], []
    for nfe in bundle.manifest.samplers:
        with closing(_sampler_engine(generator, nfe)) as graph:
            limits = [
                engine.max_batch for engine in (generator.engine, graph) if engine.max_batch is not None
            ]
            size = min([len(golden["noise"]), *limits])
            noise, steered = (
                golden["noise"][:size],
                take(golden_conditioning(bundle.manifest, golden), slice(size)),
            )
            found = graph.run({"noise": noise, **steered})
        if not np.isfinite(found["latents"]).all():
            raise CheckFailedError(
                f"the sampler graph nfe{nfe} of bundle {bundle.name!r} in {generator.precision} gives NaN or "
                "infinity; export it again, or use another precision"
            )
        expected = sample(
            lambda x_t, sigma, steered=steered: generator.student.policy(x_t, sigma, steered),
            noise,
            spec.schedule(nfe=nfe),
            SamplingSettings(temperature=spec.temperature_of(nfe)),
            Hooks(integrate=integrate),
        )
        latents.append((f"latents of nfe{nfe}", found["latents"], expected))
        if bundle.manifest.makes_images:  # of the graph's own latents, as above
            images.append((f"images of nfe{nfe}", found["images"], _decode(generator, found["latents"])))
    return latents, images


def _sampler_engine(generator: Generator, nfe: int):
    """The sampler graph in the generator's engine, or where that knows no loops (OpenVINO) in ONNX Runtime's own."""
    engine, graph = generator.engine, read_graph(generator.bundle, f"sampler.nfe{nfe}", generator.precision)
    try:
        return open_engine(graph, engine=engine.name, device=engine.device, options=generator.options)
    except EngineError as error:
        if engine.name == "ort-cpu":
            raise
        log.warning("sampler graphs are checked in 'ort-cpu', for engine %r: %s", engine.name, error)
        return open_engine(graph, engine="ort-cpu", options=generator.options)


def check(rows: list[Row], name: str) -> None:
    """Nothing, if every row passed.

    Args:
        rows: of `verify`.
        name: the bundle's, for the message.

    Raises:
        CheckFailedError: a row did not pass; the first is told, with its precision and where its worst error is.
    """
    failed = [row for row in rows if not row.passed]
    if failed:
        row = failed[0]
        raise CheckFailedError(
            f"bundle {name!r} does not reproduce its golden samples in {row.precision}: {row.layer} differ "
            f"by {row.error:.3g} in {row.where}, {row.tolerance:.3g} is allowed{_explain(row, rows)}"
        )


# What to do about a row that did not pass.
_REMEDIES = {
    "tokens": "the tokenizer reads prompts otherwise than at export: take the release of tokenizers of then",
    "encodings": "the engine computes the text encoder otherwise than PyTorch did: take another engine or precision",
    "network outputs": "the engine computes the network otherwise than PyTorch did: take another engine or precision",
    "policy velocities": "the policy's formula is another one than when the bundle was exported: export it again",
    "trajectories": "the policies are integrated otherwise than when the bundle was exported: export it again",
    "latents": "small differences add up from call to call: take another precision, or fewer calls",
    "images": "the engine computes the decoder otherwise than PyTorch did: take another engine or precision",
}


def _explain(row: Row, rows: list[Row]) -> str:
    """Whether it matters in an image, and what to do; for the end of a message."""
    whole = [one for one in rows if one.layer.startswith("drawn") and one.precision == row.precision]
    seen = ""
    if whole:
        unit = " grey levels" if whole[0].layer == "drawn images" else " of the largest latent"
        verdict = "it does not show in an image" if whole[0].passed else "it shows in an image"
        seen = f"; {verdict}: whole ones differ by {whole[0].error:.3g}{unit}, {whole[0].tolerance:.3g} are allowed"
    remedy = _REMEDIES.get(row.layer)
    return f"{seen}. {remedy[0].upper()}{remedy[1:]}" if remedy else seen


def read_golden(bundle: Bundle) -> dict[str, np.ndarray]:
    """The bundle's golden samples, with every array that `verify` needs."""
    calls = range(bundle.manifest.schedule.nfe)
    outputs = [spec.name for spec in bundle.manifest.student.outputs]
    wanted = {"noise", "latents"} | ({"images"} if bundle.manifest.makes_images else set())
    wanted |= {f"conditioning.{spec.name}" for spec in bundle.manifest.conditioner.inputs}
    if bundle.manifest.has_several_lengths:
        steering = [f"conditioning.{spec.name}" for spec in bundle.manifest.conditioner.inputs]
        states = [] if bundle.manifest.sizes is None else ["x_t"]
        wanted |= {f"resized.{name}" for name in (*outputs, *steering, *states)}
    wanted |= {f"{name}.{i}" for i in calls for name in ("x_t", "levels", "velocities", *outputs)}
    encoders = bundle.manifest.conditioner.networks
    if encoders and set(encoders) <= bundle.manifest.networks.keys():
        wanted |= {PROMPTS, *(name.replace("encoder.", "ids.", 1) for name in encoders)}
    try:
        with np.load(io.BytesIO(bundle.read(GOLDEN)), allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
        if bundle.manifest.format_version == 4:
            golden = name_golden_as_format_5(golden)
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{GOLDEN} in {bundle.folder} cannot be read: {error}; export again") from error
    if golden.keys() != wanted:
        raise BundleError(
            f"{GOLDEN} in {bundle.folder} does not fit: {sorted(golden.keys() ^ wanted)[0]}; export again"
        )
    return golden


def golden_conditioning(
    manifest: Manifest, golden: Mapping[str, np.ndarray], prefix: str = ""
) -> dict[str, np.ndarray]:
    """What the golden images are steered by; `prefix`: "resized." for that of other lengths."""
    names = [spec.name for spec in manifest.conditioner.inputs]
    return {name: golden[f"{prefix}conditioning.{name}"] for name in names}


def _golden_outputs(bundle: Bundle, golden: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """What the network made in call `i`, by name."""
    return {spec.name: golden[f"{spec.name}.{i}"] for spec in bundle.manifest.student.outputs}


def relative_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference over the largest golden magnitude; NaN if either holds NaN, infinite for another shape."""
    if ours.shape != golden.shape:
        return float("inf")
    scale = max(float(np.abs(golden).max()), 1e-12)
    return float(np.abs(ours.astype(np.float64) - golden).max()) / scale


def _worst(layer: str, pairs, tolerance: float, measure=relative_error) -> Row:
    errors = {name: measure(ours, golden) for name, ours, golden in pairs}
    where = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return Row(layer, errors[where], float(tolerance), where)


def rms_levels(ours: np.ndarray, golden: np.ndarray) -> float:
    """Root mean square difference between uint8 images in grey levels; infinite for another shape."""
    if ours.shape != golden.shape:
        return float("inf")
    return float(np.sqrt(np.mean((ours.astype(float) - golden) ** 2)))


def peak_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Root mean square difference over the largest golden magnitude; infinite for another shape."""
    if ours.shape != golden.shape:
        return float("inf")
    difference = ours.astype(np.float64) - golden
    return float(np.sqrt(np.mean(difference**2)) / max(np.abs(golden).max(), 1e-12))


def rms_of_psnr(psnr: float, peak: float = 255) -> float:
    """The root mean square difference that a PSNR in dB stands for, in units of which `peak` is the largest value."""
    return peak / 10 ** (psnr / 20)


def _levels(ours: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference between images in grey levels; infinite for another shape."""
    if ours.shape != golden.shape:
        return float("inf")
    return float(np.abs(ours.astype(int) - golden.astype(int)).max())
