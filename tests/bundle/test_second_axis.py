"""A student that is steered by arrays of any length: exported, verified at two lengths, drawn, built."""

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.sections import AxisSpec
from piflow_edge.conditioning import Arrays, TensorSpec
from piflow_edge.engines import open_engine
from piflow_edge.engines.building.targets import Batch
from piflow_edge.errors import BundleError, EngineError, ShapeError
from piflow_edge.policies import GMPolicySpec
from piflow_edge.runtime.graphs import find_targets, read_graph
from tests.commands.command_line import run

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from piflow_edge.distill.networks.flow_network import ModuleNetwork, attach_policy_head  # noqa: E402
from piflow_edge.distill.sources import StudentModel  # noqa: E402
from piflow_edge.export.to_bundle import export_bundle  # noqa: E402

WIDTH = 8
CONDITIONER = Arrays(
    (
        TensorSpec("encoder_hidden_states", "float32", ("batch", "tokens", WIDTH)),
        TensorSpec("encoder_attention_mask", "bool", ("batch", "tokens")),
        TensorSpec("pooled_projections", "float32", ("batch", WIDTH)),
    )
)


class SteeredNetwork(torch.nn.Module):
    """Pixels that attend to tokens, of which a mask hides some, and a pooled vector on top."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(2, WIDTH, 3, padding=1)
        self.keys, self.pooled = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.out = torch.nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x_t, t, encoder_hidden_states, encoder_attention_mask, pooled_projections):
        time = (t / 1000).view(-1, 1, 1, 1).expand_as(x_t)
        x = torch.tanh(self.first(torch.cat([x_t, time], dim=1)))
        queries = x.flatten(2).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries[:, None],
            self.keys(encoder_hidden_states)[:, None],
            encoder_hidden_states[:, None],
            attn_mask=encoder_attention_mask[:, None, None],
        )
        x = x + attended[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return self.out(torch.tanh(x + self.pooled(pooled_projections)[:, :, None, None]))


def make_steered_student():
    torch.manual_seed(0)
    network = attach_policy_head(
        ModuleNetwork(SteeredNetwork(), (1, 8, 8), entry=f"{__name__}:make_steered_student"), GMPolicySpec(3)
    )
    return StudentModel(network, nfe=2, total_substeps=16, conditioner=CONDITIONER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "steered"
    axes = {"tokens": AxisSpec(1, 32, 1)}
    rows = export_bundle(make_steered_student(), folder, precisions=("fp32", "fp16"), samplers=[2], axes=axes)
    assert all(row.passed for row in rows)
    return folder


def encodings(count, tokens, seed=0):
    random = np.random.default_rng(seed)
    mask = np.ones((count, tokens), bool)
    mask[:, tokens // 2 + 1 :] = False
    return {
        "encoder_hidden_states": random.standard_normal((count, tokens, WIDTH), np.float32),
        "encoder_attention_mask": mask,
        "pooled_projections": random.standard_normal((count, WIDTH), np.float32),
    }


def test_the_bundle_says_what_steers_and_how_long_it_may_be(folder):
    manifest = Bundle(folder).manifest
    assert manifest.axes == {"batch": AxisSpec(1, None, 1), "tokens": AxisSpec(1, 32, 1)}
    assert manifest.conditioner == CONDITIONER
    assert [spec.name for spec in manifest.student.inputs] == [
        "x_t",
        "t",
        *(spec.name for spec in CONDITIONER.inputs),
    ]
    shown = run("inspect", folder).stdout
    assert "tokens: 1 to 32" in shown and "encoder_hidden_states float32 (batch, tokens, 8)" in shown


def test_golden_samples_are_of_two_lengths(folder):
    import io

    with np.load(io.BytesIO(Bundle(folder).read("golden.npz"))) as golden:
        lengths = {name: golden[name].shape[1] for name in golden.files if "hidden_states" in name}
    assert len(set(lengths.values())) == 2 == len(lengths)


@pytest.mark.parametrize("tokens", [1, 7, 32])
def test_the_graph_is_the_network_at_every_length(folder, tokens):
    network, given = make_steered_student().network.eval(), encodings(2, tokens)
    x_t, t = torch.from_numpy(pf.philox_normal(0, range(2), (1, 8, 8))), torch.full((2,), 0.7)
    with torch.no_grad():
        expected = network(x_t, t, **{name: torch.from_numpy(array) for name, array in given.items()})
    found = open_engine(read_graph(Bundle(folder))).run({"x_t": x_t.numpy(), "t": t.numpy(), **given})
    for one, name in zip(expected, ("means", "logweights", "logstds"), strict=True):
        np.testing.assert_allclose(found[name], one.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 20])
def test_the_sampler_graph_takes_what_steers(folder, tokens):
    given, noise = encodings(3, tokens), pf.philox_normal(1, range(3), (1, 8, 8))
    found = open_engine(read_graph(Bundle(folder), "sampler.nfe2")).run({"noise": noise, **given})
    with pf.load(folder) as generator:
        expected = generator(arrays=given, noise=noise, output="latent").latents
    # Two float32 computations of 16 substeps, each call fed by the one before.
    np.testing.assert_allclose(found["latents"], expected, rtol=0, atol=2e-5)


def test_a_length_that_the_bundle_does_not_allow_is_refused(folder):
    with pf.load(folder) as generator, pytest.raises(ShapeError, match=r"'tokens' .* 1 to 32 .* got 33"):
        generator(arrays=encodings(1, 33))


def test_a_range_of_an_axis_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no axis 'words'; its named axes are: tokens"):
        export_bundle(make_steered_student(), tmp_path / "out", axes={"words": AxisSpec(1, 8, 1)})


def test_lengths_may_be_multiples_of_something(tmp_path):
    rows = export_bundle(
        make_steered_student(), tmp_path / "out", axes={"tokens": AxisSpec(8, 64, 8)}, samplers=[2]
    )
    assert all(row.passed for row in rows)
    with pf.load(tmp_path / "out") as generator:
        assert len(generator(arrays=encodings(2, 24)).images) == 2
        with pytest.raises(ShapeError, match="a multiple of 8"):
            generator(arrays=encodings(2, 25))


class TestBuilding:
    def test_the_profile_has_all_lengths_that_the_bundle_allows(self, folder):
        (target,) = find_targets(Bundle(folder))
        least, best, most = target.profile(Batch(1, 2, 4))["encoder_hidden_states"]
        assert (least, best, most) == ((1, 1, WIDTH), (2, 32, WIDTH), (4, 32, WIDTH))
        assert target.describe_profile(Batch(1, 2, 4)) == "1:2:4 tokens=1:32:32"

    def test_or_those_that_are_given(self, folder):
        (target,) = find_targets(Bundle(folder), lengths={"tokens": (4, 8, 16)})
        assert target.profile(Batch())["encoder_attention_mask"] == ((1, 4), (1, 8), (8, 16))

    @pytest.mark.parametrize(
        ("lengths", "words"),
        [
            ({"tokens": (4, 8, 64)}, "1 to 32; got 4:8:64"),
            ({"tokens": (8, 4, 16)}, "rise"),
            ({"words": (1, 1, 1)}, "no axis 'words'"),
        ],
    )
    def test_lengths_that_make_no_sense_are_refused(self, folder, lengths, words):
        with pytest.raises(EngineError, match=words):
            find_targets(Bundle(folder), lengths=lengths)

    def test_the_command_takes_them(self, folder):
        import json

        told = run("build", folder, "--axis", "tokens=1:8:16", "--dry-run", "--json").stdout
        (plan,) = json.loads(told)["plans"]
        assert plan["profile"]["encoder_hidden_states"]["opt"] == [1, 8, WIDTH]
