"""What a manifest says of a student before its files are written."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from piflow_edge.bundle.manifest import (
    DECODER,
    ENCODER,
    FORMAT_VERSION,
    STUDENT,
    Manifest,
    sampler_name,
    sampler_tensors,
)
from piflow_edge.bundle.parsing import check_draft
from piflow_edge.bundle.precisions import join_tolerances
from piflow_edge.bundle.sections import AxisSpec, LatentSpec, NetworkSpec, ScheduleSpec, ToleranceSpec
from piflow_edge.bundle.sizes import HEIGHT, IMAGE_HEIGHT, IMAGE_WIDTH, WIDTH
from piflow_edge.conditioning import Conditioner, TensorSpec
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.distill.networks.text_encoders import TextEncoder
from piflow_edge.distill.sources import StudentModel
from piflow_edge.errors import BundleError, DataError
from piflow_edge.export.export_settings import ExportSettings
from piflow_edge.export.onnx_graphs.decoder_graph import describe_decoder, measure_scale
from piflow_edge.export.onnx_graphs.encoder_graph import describe_encoder, tokens_axis


def draft_manifest(
    student: StudentModel,
    name: str,
    settings: ExportSettings,
    autoencoder: Autoencoder | None,
    encoders: Sequence[TextEncoder] = (),
) -> Manifest:
    """Return the manifest of a student's bundle, without files.

    Raises:
        BundleError: ranges of axes that the student has not, a precision for a network that there is not, or numbers
            and names that no bundle may have.
        DataError: another autoencoder than the student's latents are of.
        ScheduleError: a number of `settings.samplers` out of range.
    """
    check_autoencoder(student, autoencoder)
    conditioner = student.conditioner
    network, head = student.network, student.network.head
    assert head is not None, "it is a student"
    latent = _latent(student)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        policy=head if settings.eps is None else replace(head, eps=settings.eps),
        schedule=_schedule(student, settings),
        conditioning=conditioner.to_json(),
        latent=latent,
        axes=_axes(student, settings),
        networks={STUDENT: _describe_student(student, conditioner, settings.opset)},
        assets={},
        precisions=list(settings.precisions),
        tolerances={},
        license=settings.license_name,
        provenance={
            **student.provenance,
            **({"autoencoder": autoencoder.sha256} if autoencoder else {}),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
        },
        files={},
    )
    if autoencoder is not None:
        _add_decoder(manifest, student, autoencoder, settings.opset)
    for encoder in encoders:
        manifest.networks[encoder.spec.network] = describe_encoder(encoder, settings.opset)
        manifest.axes[tokens_axis(encoder)] = AxisSpec(1, encoder.spec.max_tokens, 1)
        manifest.assets[encoder.spec.tokenizer_asset] = encoder.spec.tokenizer_asset
    manifest.tolerances.update(_tolerances(manifest.networks, settings))
    for nfe in settings.samplers:
        schedule = manifest.schedule.schedule(nfe=nfe)
        tensors = sampler_tensors(schedule, latent.shape, manifest.image_shape, conditioner.inputs)
        manifest.networks[sampler_name(nfe)] = NetworkSpec("", *tensors, {}, settings.opset, {})
    check_draft(manifest)
    return manifest


def _schedule(student: StudentModel, settings: ExportSettings) -> ScheduleSpec:
    return ScheduleSpec(
        nfe=student.nfes[-1],  # of several it was trained for, the best
        shift=student.shift,
        final_step_size_scale=student.final_step_size_scale,
        total_substeps=student.total_substeps,
        h=0.0,
        temperature=settings.temperature,
        substep_rule=student.substep_rule,
        good_nfes=list(student.nfes),
        or_more=student.or_more,
        shift_by_size=student.shift_by_size,
    )


def _add_decoder(manifest: Manifest, student: StudentModel, autoencoder: Autoencoder, opset: int) -> None:
    shape = manifest.latent.restored_shape
    manifest.networks[DECODER] = describe_decoder(autoencoder, shape, opset, manifest.axes)
    if student.sides is not None:
        _, factor = measure_scale(autoencoder, shape)
        for side, image_side in ((HEIGHT, IMAGE_HEIGHT), (WIDTH, IMAGE_WIDTH)):
            manifest.axes[image_side] = manifest.axes[side].scaled(factor)


def _tolerances(networks: Iterable[str], settings: ExportSettings) -> dict[str, ToleranceSpec]:
    """What `verify` allows in each of the bundle's precisions, by what each network is in then."""
    known = {*networks, *(name.partition(".")[0] for name in networks)}
    if unknown := settings.network_precisions.keys() - known:
        raise BundleError(f"the bundle has no network {min(unknown)!r}; it has {', '.join(networks)}")
    found = {}
    for precision in settings.precisions:
        inside = {name: settings.precision_of(name, precision) for name in networks}
        encoders = [one for name, one in inside.items() if name.startswith(ENCODER)]
        found[precision] = join_tolerances(inside[STUDENT], inside.get(DECODER), encoders)
    return found


def check_autoencoder(student: StudentModel, autoencoder: Autoencoder | None) -> None:
    """Raise DataError unless the student's latents are of this autoencoder, where there is one."""
    latent = student.latent
    if autoencoder is None:
        return
    if latent is None:
        raise DataError("the student makes pixels, which need no decoder; leave --autoencoder out")
    moments = {name: list(getattr(autoencoder, name)) for name in ("mean", "deviation")}
    ours = vars(autoencoder.latent) | moments | {"channels": autoencoder.latent_channels}
    theirs = {**latent, "channels": student.network.sample_shape[0]}
    # The hash of an autoencoder that precomputed the latents is not known.
    odd = [key for key, value in theirs.items() if value is not None and value != ours[key]]
    if odd:
        raise DataError(
            f"the student was trained on latents of another autoencoder: {odd[0]} was {theirs[odd[0]]}, this one's is "
            f"{ours[odd[0]]}; give the one they were made with"
        )


def _describe_student(student: StudentModel, conditioner: Conditioner, opset: int) -> NetworkSpec:
    network = student.network
    state: tuple[Any, ...] = (
        network.sample_shape if student.sides is None else (network.sample_shape[0], HEIGHT, WIDTH)
    )
    inputs = [
        TensorSpec("x_t", "float32", ("batch", *state)),
        TensorSpec("t", "float32", ("batch",)),
        *conditioner.inputs,
    ]
    assert network.head is not None, "it is a student"
    shapes = zip(network.head.outputs, network.head.output_shapes(state), strict=True)
    outputs = [TensorSpec(output, "float32", ("batch", *shape)) for output, shape in shapes]
    return NetworkSpec(type(network).__name__, inputs, outputs, {}, opset, {})


def _axes(student: StudentModel, settings: ExportSettings) -> dict[str, AxisSpec]:
    named = {n for spec in student.conditioner.inputs for n in spec.shape if isinstance(n, str)} - {"batch"}
    usual = dict.fromkeys(sorted(named), AxisSpec(1, None, 1))
    if student.sides is not None:
        usual |= {HEIGHT: AxisSpec(*student.sides), WIDTH: AxisSpec(*student.sides)}
    if unknown := settings.axes.keys() - usual.keys():
        raise BundleError(
            f"the student has no axis {min(unknown)!r}; its named axes are: {', '.join(usual) or 'none'}"
        )
    axes = {"batch": AxisSpec(1, None, 1)} | usual | dict(settings.axes)
    if student.sides is None:
        return axes
    *_, multiple = student.sides
    for name, length in zip((HEIGHT, WIDTH), student.network.sample_shape[1:], strict=True):
        if axes[name].multiple_of % multiple or not axes[name].has(length):
            raise BundleError(
                f"{name} of the latents is a multiple of {multiple}, and {length} where nothing is said; got "
                f"{axes[name]}"
            )
    return axes


def _latent(student: StudentModel) -> LatentSpec:
    latent = LatentSpec("pixels", list(student.network.sample_shape), 1.0, 0.0)
    if student.latent is None:
        return latent
    moments = {name: list(student.latent.get(name, ())) for name in ("mean", "deviation")}
    scale, shift = student.latent["scale"], student.latent["shift"]
    return replace(latent, kind="latents", scale=scale, shift=shift, **moments)
