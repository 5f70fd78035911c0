"""A policy that the authors do not have, from training to images: one file and a registry line carry it everywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.training import TrainingConfig
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork
from piflow_edge.distill.sources import TeacherModel
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import GuidanceConfig
from piflow_edge.engines import open_engine
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import GMKPolicySpec
from piflow_edge.runtime.graphs import read_graph
from piflow_edge.runtime.verification import verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gmk")
    torch.manual_seed(0)
    data = load_images("digits")
    network = DiTNetwork(DiTConfig(hidden_size=16, depth=1, num_heads=2))
    teacher = TeacherModel(network, data.conditioner, {})
    imitation = ImitationConfig(nfe=2, total_substeps=32, gm_dropout=0.2)
    run = TrainingConfig(iterations=3, batch_size=8)
    kind = GMKPolicySpec(3)
    guidance = GuidanceConfig(1.5)
    return distill(
        teacher, data, imitation, run, folder / "student", guidance=guidance, head=kind, integrate=integrate
    )


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "gmk"
    return folder, export_bundle(trained, folder, samplers=[1, 2])


def test_training_moves_each_width_on_its_own(trained):
    bias = trained.tensors["ema.module.head.out.bias"].reshape(4, -1)[:, -3:]  # the last planes of a patch
    assert len(np.unique(np.asarray(bias), axis=1).T) == 3


def test_a_bundle_reproduces_pytorch_in_every_layer(made):
    folder, rows = made
    assert [row.layer for row in rows] == [row.layer for row in verify(pf.load(folder))]
    assert all(row.passed for row in rows) and rows[0].error > 0
    assert replace(Bundle(folder).manifest.policy, eps=1e-4) == GMKPolicySpec(3)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_runtime_sharpens_it(made, temperature):
    latents = pf.load(made[0])([1, 2], temperature=temperature, output="latent").latents
    assert np.isfinite(latents).all()


@pytest.mark.parametrize("nfe", [1, 2])
def test_its_sampler_graph_makes_what_the_runtime_makes(made, nfe):
    labels, noise = np.arange(5), pf.philox_normal(7, range(5), (1, 8, 8))
    expected = pf.load(made[0])(labels, noise=noise, nfe=nfe, output="numpy")
    graph = open_engine(read_graph(Bundle(made[0]), f"sampler.nfe{nfe}"))
    found = graph.run({"noise": noise, "labels": labels})
    # The runtime computes in NumPy's float32, in coordinates that round more than the graph's.
    np.testing.assert_allclose(found["latents"], expected.latents, rtol=0, atol=2e-4)
    assert np.abs(found["images"].astype(int) - expected.images).max() <= 1
