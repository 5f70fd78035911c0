"""What the numbers of a manifest's sections do."""

import numpy as np
import pytest

from piflow_edge.bundle.sections import AxisSpec, LatentSpec

STATES = np.random.default_rng(0).standard_normal((2, 8, 3, 2)).astype(np.float32)


def test_pixels_are_restored_as_they_are():
    assert LatentSpec("pixels", [8, 3, 2], 1.0, 0.0).restore(STATES) is STATES


def test_latents_are_scaled_back_then_spread_by_channel_then_unpacked():
    random = np.random.default_rng(1)
    mean, deviation = random.standard_normal((2, 8)).tolist()
    latent = LatentSpec("latents", [8, 3, 2], 0.5, 0.25, mean, deviation, 2)
    found = latent.restore(STATES)
    spread = (STATES / 0.5 + 0.25) * np.reshape(deviation, (8, 1, 1)) + np.reshape(mean, (8, 1, 1))
    assert latent.restored_shape == [2, 6, 4] and found.dtype == np.float32
    for channel in range(2):
        for row in range(2):
            for column in range(2):
                part = found[:, channel, row::2, column::2]
                np.testing.assert_allclose(part, spread[:, 4 * channel + 2 * row + column], rtol=0, atol=1e-5)


def test_the_sampler_graph_restores_them_alike():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("torch")
    from piflow_edge.export.onnx_graphs import sampler_graph

    latent = LatentSpec("latents", [8, 3, 2], 0.5, 0.25, list(range(8)), [0.5] * 8, 2)
    given, made = "float[batch, 8, 3, 2] shifted", "float[batch, 2, 6, 4] restored"
    text = f'<ir_version: 8, opset_import: ["": 18]> g ({given}) => ({made}) {{\n{sampler_graph._restore(latent)}\n}}'
    model = onnx.parser.parse_model(text)
    for name, value in sampler_graph._restore_constants(latent).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    from onnx.reference import ReferenceEvaluator

    (found,) = ReferenceEvaluator(model).run(None, {"shifted": STATES / np.float32(0.5) + np.float32(0.25)})
    np.testing.assert_allclose(found, latent.restore(STATES), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("axis", "length", "nearest"),
    [
        (AxisSpec(1, None, 1), 9, 9),
        (AxisSpec(1, 8, 1), 9, 8),
        (AxisSpec(10, 20, 1), 9, 10),
        (AxisSpec(1, 64, 8), 13, 8),
        (AxisSpec(9, 64, 8), 13, 16),
    ],
)
def test_an_allowed_length_near_another(axis, length, nearest):
    assert axis.nearest(length) == nearest and axis.nearest(nearest) == nearest
