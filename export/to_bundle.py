"""Student -> bundle: networks in every precision, manifest, golden samples, checked before they are moved in place."""

import logging
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from piflow_edge.bundle.manifest import (
    GOLDEN,
    LICENSE,
    MANIFEST,
    PREVIEW,
    SIGNATURE,
    Manifest,
    manifest_bytes,
)
from piflow_edge.bundle.precisions import EXACT
from piflow_edge.bundle.sections import FileSpec
from piflow_edge.bundle.signature import SigningKey
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.networks.text_encoders import TextEncoder
from piflow_edge.distill.sources import StudentModel, student_from_checkpoint
from piflow_edge.engines import EngineOptions, Graph
from piflow_edge.engines.layers import first_non_finite
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.errors import BundleError, CheckFailedError
from piflow_edge.export.bundle_graphs import Graphs, convert_networks, count_live, export_networks
from piflow_edge.export.conversions.calibration import ENGINE, Calibration, golden_calls
from piflow_edge.export.export_settings import ExportSettings
from piflow_edge.export.kept_work import keep_work
from piflow_edge.export.manifest_draft import draft_manifest
from piflow_edge.export.onnx_graphs.encoder_graph import example_inputs, join_encoders
from piflow_edge.export.onnx_graphs.large import is_on_demand
from piflow_edge.export.onnx_graphs.weight_files import WeightFile
from piflow_edge.export.parity import golden_file, golden_images, golden_samples
from piflow_edge.runtime.loading import load
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.runtime.verification import Row, check, verify
from piflow_edge.system.files import check_place, new_folder, sha256, write_atomic
from piflow_edge.system.sheets import as_pil, image_grid

log = logging.getLogger(__name__)


def export_bundle(
    student: Checkpoint | StudentModel,
    folder: Path,
    *,
    settings: ExportSettings | None = None,
    autoencoder: Autoencoder | None = None,
    encoders: Sequence[TextEncoder] = (),
    signing_key: SigningKey | None = None,
    overwrite: bool = False,
    **changes: Any,
) -> list[Row]:
    """Write the student as a bundle, and check it there against PyTorch before it is moved to `folder`.

    Args:
        student: its checkpoint, or a network with what must be known to run it.
        folder: where the bundle goes.
        settings: see `ExportSettings`; `changes` are fields of it by name, such as `precisions=("fp16",)`.
        autoencoder: of a student of latents; its decoder becomes part of the bundle, which makes images by it.
            Without it such a bundle makes latents only.
        encoders: text encoders of a student that is steered by what they make; they become part of the bundle, which
            reads prompts by them. Without them such a bundle takes encodings only.
        signing_key: signs the bundle.
        overwrite: replace a bundle that is there.

    Returns:
        The comparison with PyTorch, layer by layer, in each precision.

    Raises:
        BundleError: `folder` exists and `overwrite` is False, or it is not a bundle; as `ExportSettings`, or as
            `draft_manifest`.
        CheckpointError: torch cannot make a graph of the student's network.
        ScheduleError: as `ExportSettings`, or a number of `samplers` out of range.
        DataError: another autoencoder than the student's latents are of, or other text encoders than those that it was
            trained with.
        CheckFailedError: the exported graph does not reproduce PyTorch, or gives NaN; nothing is left behind.
    """
    folder = Path(folder)
    import_onnxruntime()  # missing, it would be missed only after the work is done
    settings = replace(settings or ExportSettings(), **changes)
    _check_place(folder, overwrite)
    model = student if isinstance(student, StudentModel) else student_from_checkpoint(student)
    if encoders:
        model = replace(model, conditioner=join_encoders(model.conditioner, encoders))
    if autoencoder is None and model.latent is not None:
        log.warning("the bundle will make latents, not images: no autoencoder was given for its decoder")
    manifest = draft_manifest(model, settings.name or folder.name, settings, autoencoder, encoders)
    manifest.provenance["versions"] = _read_versions()
    exact = export_networks(model, manifest, autoencoder, encoders)
    manifest.provenance["live_bytes"] = count_live(exact, manifest)
    is_large = any(map(is_on_demand, exact.values()))
    with keep_work(folder, _name_export(manifest, settings, encoders) if is_large else None) as work:
        golden = work.arrays(
            "golden samples", lambda: golden_samples(model.network, manifest, model.conditioner)
        )
        _check_golden(golden, exact["student"], manifest)
        if manifest.makes_images:
            golden["images"] = golden_images(golden["latents"], manifest, autoencoder)
        calibration = None
        if {*settings.precisions, *settings.network_precisions.values()} != {EXACT}:
            calibration = _calibrate(model, manifest, exact, encoders, golden, work.folder)
        manifest, files = convert_networks(exact, manifest, calibration, settings, work)
        files |= {encoder.spec.tokenizer_asset: encoder.tokenizer for encoder in encoders}
        files |= {GOLDEN: golden_file(golden), LICENSE: settings.license_text.encode()}
        if manifest.makes_images:
            files[PREVIEW] = png_bytes(image_grid([as_pil(golden["images"])]))
        listed = {file: FileSpec(_hash(data), len(data)) for file, data in files.items()}
        options = EngineOptions(keep="one" if is_large else "all")
        del exact, calibration  # whose weights the check of the files, which loads them again, needs no more
        return _write(folder, replace(manifest, files=listed), files, signing_key, options)


def _name_export(manifest: Manifest, settings: ExportSettings, encoders: Sequence[TextEncoder]) -> str:
    """What an export is of: another with the same name would make the same bundle."""
    return repr((manifest_bytes(manifest), settings, [encoder.fingerprint() for encoder in encoders]))


def _calibrate(
    model: StudentModel,
    manifest: Manifest,
    exact: Graphs,
    encoders,
    golden: dict[str, np.ndarray],
    room: Path,
) -> Calibration:
    calibration = Calibration(
        exact["student"],
        manifest,
        model.nfes,
        exact.get("decoder"),
        conditioner=model.conditioner,
        golden=golden if is_on_demand(exact["student"]) else None,
        room=room,
    )
    calibration.encoder_inputs = {e.spec.network: example_inputs(e, model.conditioner) for e in encoders}
    return calibration


def _hash(data: bytes | WeightFile) -> str:
    return data.sha256() if isinstance(data, WeightFile) else sha256(data)


def _read_versions() -> dict[str, str]:
    return {
        **{package: version(package) for package in ("piflow-edge", "torch", "onnx", "onnxscript")},
        "onnxruntime": import_onnxruntime().__version__,
        "python": platform.python_version(),
    }


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise BundleError(f"{folder} exists; give another place, or --overwrite to replace the bundle")
    if folder.exists() and not (folder / MANIFEST).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise BundleError(f"{folder} is not a bundle and will not be replaced; give another place")
    check_place(folder)


def _check_golden(golden: dict[str, np.ndarray], student: Graph, manifest: Manifest) -> None:
    for key, array in golden.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():  # prompts are text
            raise CheckFailedError(
                f"the student gives NaN or infinity in {key}; it is not fit to be exported. The first layer to do so: "
                f"{_first_non_finite(student, golden, manifest)}"
            )


def _first_non_finite(student: Graph, golden: dict[str, np.ndarray], manifest: Manifest) -> str:
    if is_on_demand(student):
        return "not looked for, since the network is too large"
    for inputs in golden_calls(manifest, golden):
        if layer := first_non_finite(student, inputs):
            return layer
    return "none in ONNX Runtime, only in PyTorch or its policy"


def _write(
    folder: Path,
    manifest: Manifest,
    files: dict[str, Any],
    signing_key: SigningKey | None,
    options: EngineOptions,
) -> list[Row]:
    """Write and verify a bundle at a temporary place, and move it to `folder`. It empties `files`."""
    with new_folder(folder) as work:
        write_atomic(work / MANIFEST, manifest_bytes(manifest))
        while files:
            file, data = files.popitem()
            if isinstance(data, WeightFile):
                data.move(work / file)
            else:
                write_atomic(work / file, data)
            del data
        if signing_key is not None:
            write_atomic(work / SIGNATURE, signing_key.sign(manifest_bytes(manifest)))
        rows = []
        for precision in manifest.precisions:
            with load(work, ENGINE, precision, options=options) as generator:
                rows += verify(generator)
        check(rows, manifest.name)
    return rows
