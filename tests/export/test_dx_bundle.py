"""A DX student from checkpoint to images: bundle, runtime, verification, the whole sampler as one graph."""

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.engines import open_engine
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import DXPolicySpec
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.runtime.verification import verify
from tests.conftest import make_student

HEADS = {
    "grid": DXPolicySpec(4, segment_size=0.5, shift=2.0),
    "polynomial": DXPolicySpec(3, segment_size=0.5, shift=2.0, mode="polynomial"),
}


@pytest.fixture(scope="module", params=HEADS)
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / request.param
    head = HEADS[request.param]
    return head, folder, export_bundle(make_student(head=head), folder, samplers=[2, 3])


def test_a_dx_bundle_reproduces_pytorch_in_every_layer(made):
    head, folder, rows = made
    assert [row.layer for row in rows] == [row.layer for row in verify(pf.load(folder))]
    assert all(row.passed for row in rows) and rows[0].error > 0
    spec = Bundle(folder).manifest.policy
    assert spec == DXPolicySpec(head.num_nodes, 0.5, 2.0, head.mode, 1e-4)


@pytest.mark.parametrize("nfe", [2, 3])
def test_its_sampler_graph_makes_what_the_runtime_makes(made, nfe):
    _, folder, _ = made
    labels, noise = np.arange(5), pf.philox_normal(7, range(5), (1, 8, 8))
    expected = pf.load(folder)(labels, noise=noise, nfe=nfe, output="numpy")
    found = open_engine(read_graph(Bundle(folder), f"sampler.nfe{nfe}")).run(
        {"noise": noise, "labels": labels}
    )
    np.testing.assert_allclose(found["latents"], expected.latents, rtol=0, atol=2e-5)
    assert np.abs(found["images"].astype(int) - expected.images).max() <= 1


def test_temperature_leaves_a_dx_policy_alone(made):
    generator = pf.load(made[1])
    cold, warm = (generator([1, 2], temperature=t, output="latent").latents for t in (0.1, 1.0))
    np.testing.assert_array_equal(cold, warm)
