"""A student that nothing steers: images are asked for by their number."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import Unconditional
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.networks.flow_network import ModuleNetwork, attach_policy_head, describe
from piflow_edge.engines import open_engine
from piflow_edge.errors import ConditioningError
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import GMPolicySpec
from piflow_edge.runtime.graphs import read_graph


class Plain(nn.Module):
    """Two convolutions, and the time as one more channel."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x_t, t):
        time = (t / 1000).view(-1, 1, 1, 1).expand_as(x_t)
        return self.out(torch.tanh(self.first(torch.cat([x_t, time], dim=1))))


def teacher():
    torch.manual_seed(0)
    return ModuleNetwork(Plain(), (1, 8, 8), entry=f"{__name__}:teacher")


def make_plain_student(**changes):
    student = attach_policy_head(teacher(), GMPolicySpec(3))
    settings = {
        "imitation": dict(nfe=2, shift=1.0, final_step_size_scale=1.0, total_substeps=16),
    }
    tensors = {f"ema.{name}": value for name, value in student.state_dict().items()}
    fields = dict(conditioner=Unconditional(), settings=settings) | changes
    return Checkpoint("student", 0, describe(student), tensors=tensors, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "plain"
    rows = export_bundle(make_plain_student(), folder, precisions=("fp32", "fp16"), samplers=[2])
    assert all(row.passed for row in rows) and {row.precision for row in rows} == {"fp32", "fp16"}
    return folder


def test_images_are_asked_for_by_number(folder):
    manifest = Bundle(folder).manifest
    assert manifest.conditioning == {"kind": "none"}
    assert [spec.name for spec in manifest.student.inputs] == ["x_t", "t"]
    result = pf.load(folder)(count=3, seed=5, output="numpy")
    assert result.images.shape == (3, 8, 8, 1) and np.ptp(result.images.astype(int)) > 30
    alone = pf.load(folder)(count=1, seed=[(5, 2)], output="latent")
    np.testing.assert_allclose(alone.latents[0], result.latents[2], rtol=0, atol=1e-5)


def test_its_sampler_graph_takes_noise_alone(folder):
    sampler = onnx.load_from_string(Bundle(folder).read_network("sampler.nfe2").model)
    assert [value.name for value in sampler.graph.input] == ["noise"]
    noise = pf.philox_normal(5, range(3), (1, 8, 8))
    found = open_engine(read_graph(Bundle(folder), "sampler.nfe2")).run({"noise": noise})
    expected = pf.load(folder)(count=3, seed=5, output="latent")
    np.testing.assert_allclose(found["latents"], expected.latents, rtol=0, atol=2e-5)


@pytest.mark.parametrize("given", [dict(labels=[1]), dict(), dict(count=0), dict(count=2, labels=[1, 2])])
def test_labels_and_no_count_are_refused(folder, given):
    with pytest.raises(ConditioningError, match="count"):
        pf.load(folder)(**given)
