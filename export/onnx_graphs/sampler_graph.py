"""The whole few-step sampler as one ONNX graph: noise and labels in, images out, no code of ours in between.

Segments are the steps of an outer `Scan`, substeps those of an inner one, so that the network stands in the file once
whatever the NFE.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from piflow_edge.bundle.manifest import Manifest
from piflow_edge.bundle.sections import LatentSpec
from piflow_edge.conditioning import TensorSpec
from piflow_edge.export.onnx_graphs.decoder_graph import DECODER_INPUTS, DECODER_OUTPUTS
from piflow_edge.export.onnx_graphs.rollout_graph import DOMAIN, ROLLOUT, build_rollout, inline
from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.schedule import segment_sigmas

# Without re-noising the lines in `renoise` are left out, and so is the input. Its last row is read again after the
# last segment, where it counts for nothing: a Scan's inputs are all of one length.
_SAMPLER = """
<ir_version: {ir_version}, opset_import: ["": {opset}, "{domain}": 1]>
sampler (float[batch, {state}] noise{conditioning}{renoise_input})
  => (float[batch, {state}] latents{images_output})
{{
  batch = Shape <start = 0, end = 1> (noise)
  zero = Constant <value_ints = [0]> ()
  latents = Scan <num_scan_inputs = {num_tables}, body = segment (
    float[] x_t, {table_inputs}
  ) => (float[] x_next) {{
    t = Expand (time, batch)
    {outputs} = {domain}.Student ({inputs})
    {x_dst} = {domain}.{rollout} ({outputs}, x_t, {rollout_tables})
    {renoise}
  }}> (noise, {tables})
{images}}}
"""

_RENOISE = """
    fresh = Gather (renoise, draw)
    kept_x = Mul (kept, x_dst)
    added_noise = Mul (added, fresh)
    x_next = Add (kept_x, added_noise)
"""

# `decoder` is Identity where the latents are pixels.
_IMAGES = """
  unscaled = Div (latents, latent_scale)
  shifted = Add (unscaled, latent_shift)
{restore}
  decoded = {decoder} (restored)
  one = Constant <value_float = 1.0> ()
  centred = Add (decoded, one)
  pixels = Mul (centred, half_range)
  black = Constant <value_float = 0.0> ()
  white = Constant <value_float = 255.0> ()
  clipped = Clip (pixels, black, white)
  rounded = Round (clipped)
  channels_last = Transpose <perm = [0, 2, 3, 1]> (rounded)
  images = Cast <to = {uint8}> (channels_last)
"""


def export_sampler(student: bytes, manifest: Manifest, nfe: int, decoder: bytes | None = None) -> bytes:
    """A bundle's student, with all that is done around it, as one ONNX model with a dynamic batch.

    Inputs: `noise` float32 (batch, C, H, W), the student's conditioning, and where the schedule re-noises `renoise`
    float32 (nfe - 1, batch, C, H, W); both kinds of noise are standard normal. Outputs:
    `latents` float32 (batch, C, H, W) and, where the bundle makes images, `images` uint8 (batch, H, W, C).

    Args:
        student: the network as `export_network` writes it.
        manifest: of its bundle; schedule, temperature, policy and latent are taken from it.
        nfe: student calls per image.
        decoder: the network that makes images of latents, as `export_decoder` writes it.

    Raises:
        ScheduleError: substeps below the policy's floor; see `PolicyKind.rollout_tables`.
    """
    network = onnx.load_from_string(student)
    rollout_tables = _rollout_tables(manifest, nfe)
    tables = _time_tables(manifest, nfe) | rollout_tables
    state = ", ".join(map(str, manifest.latent.shape))
    rollout = build_rollout(manifest.policy, rollout_tables)
    inputs = [spec.name for spec in manifest.student.inputs]
    functions = [_as_function(network, "Student", inputs, manifest.policy.outputs), rollout]
    images_output, images = _write_images(manifest)
    if manifest.decoder and decoder:
        functions.append(
            _as_function(onnx.load_from_string(decoder), "Decoder", DECODER_INPUTS, DECODER_OUTPUTS)
        )
    renoises = "draw" in tables
    text = _SAMPLER.format(
        ir_version=network.ir_version,
        opset=OPSET,
        domain=DOMAIN,
        state=state,
        images_output=images_output,
        images=images,
        inputs=", ".join(inputs),
        conditioning="".join(f", {_graph_type(spec)} {spec.name}" for spec in manifest.conditioner.inputs),
        renoise_input=f", float[{nfe - 1}, batch, {state}] renoise" if renoises else "",
        num_tables=len(tables),
        table_inputs=", ".join(f"{_onnx_type(table)}[] {name}" for name, table in tables.items()),
        tables=", ".join(f"{name}_of_segments" for name in tables),
        outputs=", ".join(manifest.policy.outputs),
        rollout=ROLLOUT,
        rollout_tables=", ".join(rollout_tables),
        x_dst="x_dst" if renoises else "x_next",
        renoise=_RENOISE if renoises else "",
    )
    model = onnx.parser.parse_model(text)
    constants = {f"{name}_of_segments": table for name, table in tables.items()}
    constants |= _restore_constants(manifest.latent) if images else {}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()
    )
    model.functions.extend(functions)
    return inline(model).SerializeToString()


def _write_images(manifest: Manifest) -> tuple[str, str]:
    """The graph's output of images, and the nodes that make them; empty where there are none."""
    if manifest.image_shape is None:
        return "", ""
    channels, height, width = manifest.image_shape
    decoder, restore = f"{DOMAIN}.Decoder" if manifest.decoder else "Identity", _restore(manifest.latent)
    nodes = _IMAGES.format(decoder=decoder, restore=restore, uint8=onnx.TensorProto.UINT8)
    return f", uint8[batch, {height}, {width}, {channels}] images", nodes


def _restore(latent: LatentSpec) -> str:
    """What follows scale and shift in `LatentSpec.restore`: per channel, then the unpacking."""
    lines, name = [], "shifted"
    if latent.mean:
        lines = [
            "  spread = Mul (shifted, channel_deviation)",
            "  centred_states = Add (spread, channel_mean)",
        ]
        name = "centred_states"
    if latent.packing > 1:
        lines += [
            f"  squares = Reshape ({name}, squares_shape)",
            "  rows = Transpose <perm = [0, 1, 4, 2, 5, 3]> (squares)",
            "  unpacked = Reshape (rows, unpacked_shape)",
        ]
        name = "unpacked"
    return "\n".join([*lines, f"  restored = Identity ({name})"])


def _restore_constants(latent: LatentSpec) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "latent_scale": np.float32(latent.scale),
        "latent_shift": np.float32(latent.shift),
        "half_range": np.float32(127.5),
    }
    if latent.mean:
        for name, values in (("mean", latent.mean), ("deviation", latent.deviation)):
            constants[f"channel_{name}"] = np.array(values, np.float32).reshape(1, -1, 1, 1)
    if latent.packing > 1:
        side, (channels, height, width) = latent.packing, latent.shape
        constants["squares_shape"] = np.array([0, channels // side**2, side, side, height, width])
        constants["unpacked_shape"] = np.array([0, *latent.restored_shape])
    return constants


def _time_tables(manifest: Manifest, nfe: int) -> dict[str, np.ndarray]:
    """What each segment must know of time, one row a segment, under the names it has in the graph."""
    segments = manifest.schedule.schedule(nfe=nfe).segments
    tables = {"time": _float32(segment.sigma_src for segment in segments)}
    if any(segment.renoises for segment in segments):
        tables["draw"] = np.minimum(np.arange(nfe, dtype=np.int64), nfe - 2)
        state_scales, noise_scales = zip(*(segment.renoise_scales for segment in segments), strict=True)
        tables |= {"kept": _float32(state_scales), "added": _float32(noise_scales)}
    return tables


def _rollout_tables(manifest: Manifest, nfe: int) -> dict[str, np.ndarray]:
    schedule, temperature = manifest.schedule.schedule(nfe=nfe), manifest.schedule.temperature_of(nfe)
    sigmas = [
        segment_sigmas(segment.sigma_src, segment.sigma_dst, segment.substeps, schedule.shift)
        for segment in schedule.segments
    ]
    return manifest.policy.rollout_tables(sigmas, [temperature] * (nfe - 1) + [1.0])


def _float32(values) -> np.ndarray:
    return np.array(list(values), np.float32)


def _graph_type(spec: TensorSpec) -> str:
    """An input's type in ONNX's text, such as "float[batch, tokens, 64]"."""
    element = {"float32": "float"}.get(spec.dtype, spec.dtype)
    return f"{element}[{', '.join(map(str, spec.shape))}]"


def _onnx_type(table: np.ndarray) -> str:
    return {"float32": "float", "int64": "int64"}[table.dtype.name]


def _as_function(
    network: onnx.ModelProto, name: str, inputs: Sequence[str], outputs: Sequence[str]
) -> onnx.FunctionProto:
    """The network as a function. Functions have no initialisers: weights become constants."""
    weights = [
        helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in network.graph.initializer
    ]
    nodes = [*weights, *network.graph.node]
    return helper.make_function(DOMAIN, name, list(inputs), list(outputs), nodes, network.opset_import)
