"""Student checkpoint -> bundle: graph, manifest, golden samples and preview, checked before they are moved in place."""

import logging
import math
import numbers
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

import piflow_edge
from piflow_edge.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PRECISIONS,
    SIGNATURE,
    ConditioningSpec,
    DecoderSpec,
    DXPolicySpec,
    FileSpec,
    GMPolicySpec,
    LatentSpec,
    Manifest,
    NetworkSpec,
    ScheduleSpec,
    TensorSpec,
    ToleranceSpec,
    decoder_file,
    manifest_bytes,
    sampler_file,
)
from piflow_edge.bundle.signature import SigningKey
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.networks.heads import head_to_json
from piflow_edge.distill.sources import StudentModel, student_from_checkpoint
from piflow_edge.engines import Graph
from piflow_edge.engines.layers import first_non_finite
from piflow_edge.engines.ort_package import import_onnxruntime
from piflow_edge.errors import BundleError, CheckFailedError, DataError, ScheduleError
from piflow_edge.export.calibration import ENGINE, Calibration
from piflow_edge.export.decoder_graph import decoder_spec, export_decoder
from piflow_edge.export.fp16 import to_fp16
from piflow_edge.export.int8 import to_int8
from piflow_edge.export.large import named
from piflow_edge.export.opset import OPSETS, lowered
from piflow_edge.export.parity import golden_file, golden_images, golden_samples
from piflow_edge.export.sampler_graph import export_sampler
from piflow_edge.export.to_onnx import OPSET, network_graph
from piflow_edge.runtime.images import as_pil
from piflow_edge.runtime.loading import load
from piflow_edge.runtime.pictures import image_grid, png_bytes
from piflow_edge.runtime.verification import GOLDEN, Row, check, verify
from piflow_edge.schedule import check_temperature
from piflow_edge.system.files import new_folder, sha256, write_atomic

log = logging.getLogger(__name__)

# Relative to the largest golden value: an engine sums in another order than PyTorch, which costs some 1e-6 on a
# network of a few blocks; the policy divides by noise levels down to 1/128; one grey level may round the other way.
# A sampler graph is held to the runtime, which runs the same network.
FP32_TOLERANCES = ToleranceSpec(
    outputs=1e-4, velocities=1e-4, latents=1e-3, samplers=1e-4, images=1, psnr=50.0
)
# What is promised of fp16 and int8 is the PSNR of whole images. The largest single errors are bounded loosely: rounding
# of 11 or 7 bits adds up over the layers, and calls feed each other. Policies are float32 in every precision. Where a
# rounding falls the other way, a sampler graph and the runtime part by as much.
TOLERANCES = {
    "fp32": FP32_TOLERANCES,
    "fp16": ToleranceSpec(outputs=0.02, velocities=1e-4, latents=0.05, samplers=0.05, images=4, psnr=40.0),
    "int8": ToleranceSpec(outputs=0.2, velocities=1e-4, latents=0.5, samplers=0.1, images=1, psnr=30.0),
}
TOLERANCES["int8-qdq"] = TOLERANCES["int8"]
# Share of the tolerances that int8 may use on the calibration images. The largest error of the golden images, which
# are others, was up to 1.6 times as large on the digits.
_INT8_SHARE = 0.5

NO_LICENSE = (
    "No licence was stated for these weights. Ask whoever gave them to you what you may do with them.\n"
)


def export_bundle(
    student: Checkpoint | StudentModel,
    folder: Path,
    *,
    name: str | None = None,
    temperature: float | str = "auto",
    eps: float = 1e-4,
    samplers: Sequence[int] = (),
    precisions: Sequence[str] = ("fp32",),
    opset: int = OPSET,
    autoencoder: Autoencoder | None = None,
    license_text: str = NO_LICENSE,
    license_name: str = "unstated",
    signing_key: SigningKey | None = None,
    overwrite: bool = False,
) -> list[Row]:
    """Write the student as a bundle, and check it there against PyTorch before it is moved to `folder`.

    Args:
        student: its checkpoint, or a network with what must be known to run it.
        folder: where the bundle goes.
        name: of the bundle; None is the folder's.
        temperature: of GM policies at every call but the last, 0 or more, recorded as the bundle's default; "auto" is
            the published rule min(0.1 (nfe - 1), 1), 1 leaves the policies as they were trained.
        eps: floor inside the policy at run time.
        samplers: calls per image for which the whole sampler is written as one graph too.
        precisions: of `PRECISIONS`; the first is what the bundle runs in unless asked. The decoder of int8 is fp32.
        opset: of all graphs: 18, or 17 for TensorRT 8.5 and 8.6.
        autoencoder: of a student of latents; its decoder becomes part of the bundle, which makes images by it.
            Without it such a bundle makes latents only.
        license_text, license_name: content of LICENSE, and its short name for the manifest.
        signing_key: signs the bundle.
        overwrite: replace a bundle that is there.

    Returns:
        The comparison with PyTorch, layer by layer, in each precision.

    Raises:
        BundleError: `folder` exists and `overwrite` is False, or it is not a bundle.
        ScheduleError: `temperature`, `eps` or a number of `samplers` out of range.
        DataError: another autoencoder than the student's latents are of.
        CheckFailedError: the exported graph does not reproduce PyTorch, or gives NaN; nothing is left behind.
    """
    folder = Path(folder)
    import_onnxruntime()  # missing, it would be missed only after the work is done
    if not (isinstance(eps, numbers.Real) and 0 < eps < math.inf):
        raise ScheduleError(f"eps is above 0, and finite; got {eps!r}")
    check_temperature(temperature)
    if folder.exists() and not overwrite:
        raise BundleError(f"{folder} exists; give another place, or --overwrite to replace the bundle")
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BundleError(f"{folder} is not a bundle and will not be replaced; give another place")
    precisions = tuple(dict.fromkeys(precisions))
    if not precisions or not set(precisions) <= set(PRECISIONS):
        raise BundleError(f"precisions are of {', '.join(PRECISIONS)}; got {', '.join(precisions) or 'none'}")
    if opset not in OPSETS:
        raise BundleError(f"opset is {' or '.join(map(str, OPSETS))}; got {opset!r}")
    model = student if isinstance(student, StudentModel) else student_from_checkpoint(student)
    network = model.network
    _check_conditioning(model)
    _check_autoencoder(model, autoencoder)
    manifest = _manifest(
        model,
        name or folder.name,
        temperature,
        eps,
        samplers,
        precisions,
        license_name,
        autoencoder,
        opset,
    )
    exact = network_graph(network, model.conditioning)
    if exact.weights and manifest.samplers:
        raise BundleError(
            "a sampler graph is one file of less than 2 GiB, and the network alone is larger; leave --sampler-graph out"
        )
    golden = golden_samples(network, manifest)
    for key, array in golden.items():
        if not np.isfinite(array).all():
            raise CheckFailedError(
                f"the student gives NaN or infinity in {key}; it is not fit to be exported. The first layer to do so: "
                f"{_first_non_finite(exact, golden, manifest)}"
            )
    decoder = None if autoencoder is None else Graph(export_decoder(autoencoder, manifest.latent.shape))
    files: dict[str, bytes] = {}
    kept: dict[str, dict] = {}
    calibration = None
    if precisions != ("fp32",):
        calibration = Calibration(exact, manifest, model.nfes, decoder)
    for precision in precisions:
        graph, decoding, kept[precision] = _converted(precision, exact, decoder, calibration)
        files |= named(graph, f"student.{precision}.onnx")
        if decoding is not None:
            files[decoder_file(precision)] = decoding.model
        for calls in manifest.samplers:
            sampler = export_sampler(graph.model, manifest, calls, decoding.model if decoding else None)
            files[sampler_file(calls, precision)] = sampler
    if opset != OPSET:
        files = {name: lowered(data) if name.endswith(".onnx") else data for name, data in files.items()}
    manifest = replace(manifest, provenance={**manifest.provenance, "kept_in_fp32": kept})
    if manifest.makes_images:
        golden["images"] = golden_images(golden["latents"], manifest, autoencoder)
        files["preview.png"] = png_bytes(image_grid([as_pil(golden["images"])]))
    files |= {GOLDEN: golden_file(golden), "LICENSE": license_text.encode()}
    listed = {file: FileSpec(sha256(data), len(data)) for file, data in files.items()}
    manifest = replace(manifest, files=listed)
    with new_folder(folder) as work:
        for file, data in {**files, MANIFEST: manifest_bytes(manifest)}.items():
            write_atomic(work / file, data)
        if signing_key is not None:
            write_atomic(work / SIGNATURE, signing_key.sign(manifest_bytes(manifest)))
        rows = []
        for precision in precisions:
            with load(work, ENGINE, precision) as generator:
                rows += verify(generator)
        check(rows, manifest.name)
    return rows


def _converted(
    precision: str, student: Graph, decoder: Graph | None, calibration: Calibration | None
) -> tuple[Graph, Graph | None, dict]:
    """Student, decoder, and for the provenance what of both stays in float32 and why."""
    if precision == "fp32":
        return student, decoder, {}
    batches, latent = calibration.batches, calibration.manifest.latent
    if precision == "fp16":
        of_student = to_fp16(student, batches)
        kept = {"student": of_student.kept}
        if decoder is not None:
            states = batches[-1]["x_t"][:1] / latent.scale + latent.shift
            of_decoder = to_fp16(decoder, [{"latents": states.astype(np.float32)}])
            decoder, kept["decoder"] = of_decoder.graph, of_decoder.kept
        return of_student.graph, decoder, kept

    def off(converted: Graph) -> float:
        return calibration.share(converted, TOLERANCES[precision]) / _INT8_SHARE

    of_student = to_int8(student, batches, static=precision == "int8-qdq", accepts=off)
    return of_student.graph, decoder, {"student": of_student.kept, **({"decoder": "all"} if decoder else {})}


def _first_non_finite(student: Graph, golden: dict[str, np.ndarray], manifest: Manifest) -> str:
    for i, segment in enumerate(manifest.schedule.schedule().segments):
        x_t = golden[f"x_t.{i}"]
        inputs = manifest.network_inputs(x_t, segment.sigma_src, manifest.conditioner.example(len(x_t)))
        layer = first_non_finite(student, inputs)
        if layer:
            return layer
    return "none in ONNX Runtime, only in PyTorch or its policy"


def _check_conditioning(student: StudentModel) -> None:
    names = set(student.conditioning)
    if names - {"labels"}:
        raise BundleError(
            f"a bundle's student takes labels or nothing; this one takes {', '.join(sorted(names))}"
        )
    if bool(names) != bool(student.class_names):
        takes, has = ("labels", "no names of classes") if names else ("no labels", "names of classes")
        raise BundleError(f"the student takes {takes}, but there are {has}; distil it again")


def _policy_spec(head, eps: float) -> GMPolicySpec | DXPolicySpec:
    return {"gm": GMPolicySpec, "dx": DXPolicySpec}[head.kind](**head_to_json(head), eps=eps)


def _check_autoencoder(student: StudentModel, autoencoder: Autoencoder | None) -> None:
    latent = student.latent
    if autoencoder is None:
        if latent is not None:
            log.warning("the bundle will make latents, not images: no autoencoder was given for its decoder")
        return
    if latent is None:
        raise DataError("the student makes pixels, which need no decoder; leave --autoencoder out")
    ours = vars(autoencoder.latent) | {"channels": autoencoder.latent_channels}
    theirs = {**latent, "channels": student.network.sample_shape[0]}
    # The hash of an autoencoder that precomputed the latents is not known.
    odd = [key for key, value in theirs.items() if value is not None and value != ours[key]]
    if odd:
        raise DataError(
            f"the student was trained on latents of another autoencoder: {odd[0]} was {theirs[odd[0]]}, this one's is "
            f"{ours[odd[0]]}; give the one they were made with"
        )


def _manifest(
    student: StudentModel,
    name: str,
    temperature: float | str,
    eps: float,
    samplers: Sequence[int],
    precisions: Sequence[str],
    license_name: str,
    autoencoder: Autoencoder | None,
    opset: int,
) -> Manifest:
    labels = [TensorSpec("class_labels", "int64", ["batch"])] if student.class_names else []
    network, head, size = student.network, student.network.head, list(student.network.sample_shape)
    outputs = [
        TensorSpec(output, "float32", ["batch", *shape])
        for output, shape in zip(head.outputs, head.output_shapes(network.sample_shape), strict=True)
    ]
    decoder: DecoderSpec | None = None
    latent = LatentSpec("pixels", size, 1.0, 0.0)
    if student.latent is not None:
        latent = LatentSpec("latents", size, student.latent["scale"], student.latent["shift"])
    if autoencoder is not None:
        decoder = decoder_spec(autoencoder, size, opset)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        policy=_policy_spec(head, eps),
        schedule=ScheduleSpec(
            nfe=student.nfes[-1],  # of several it was trained for, the best
            shift=student.shift,
            final_step_size_scale=student.final_step_size_scale,
            total_substeps=student.total_substeps,
            h=0.0,
            temperature=temperature,
        ),
        network=NetworkSpec(
            inputs=[
                TensorSpec("x_t", "float32", ["batch", *size]),
                TensorSpec("t", "float32", ["batch"]),
                *labels,
            ],
            outputs=outputs,
            num_timesteps=1.0,  # the graph takes the noise level and knows the network's own time
            opset=opset,
        ),
        conditioning=ConditioningSpec("class" if labels else "none", list(student.class_names)),
        latent=latent,
        decoder=decoder,
        precisions=list(precisions),
        samplers=sorted(set(samplers)),
        files={},
        license=license_name,
        provenance={
            **student.provenance,
            **({"autoencoder": autoencoder.sha256} if autoencoder else {}),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "versions": {
                "piflow-edge": piflow_edge.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "onnx", "onnxscript")},
                "onnxruntime": import_onnxruntime().__version__,
            },
        },
        tolerances={precision: TOLERANCES[precision] for precision in precisions},
    )
