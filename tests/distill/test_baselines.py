"""The benchmark's other methods, on Gaussian data, where their exact answers are known.

With x_0 ~ N(m, s^2) at every place, the flow keeps z = (x_t - alpha m) / sqrt(alpha^2 s^2 + sigma^2) as it is.
"""

import numpy as np
import pytest
import torch

from benchmarks import baselines
from benchmarks.baselines import ConsistencyConfig, MeanFlowConfig, level
from piflow_edge.distill.loop.training import IterationRandom
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork

MEAN, STD = 0.3, 0.6
SHAPE = (1, 4, 4)
# PyTorch's own, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

TINY = DiTConfig(sample_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=2)


def spread(sigma):
    return ((1 - sigma) ** 2 * STD**2 + sigma**2) ** 0.5


def move(x_t, sigma_t, sigma):
    """Where the flow carries `x_t`; levels are tensors that broadcast with it."""
    return (1 - sigma) * MEAN + spread(sigma) * (x_t - (1 - sigma_t) * MEAN) / spread(sigma_t)


def velocity(x_t, sigma):
    return velocity_at(x_t, level(sigma, x_t))


def velocity_at(x_t, sigma):
    z = (x_t - (1 - sigma) * MEAN) / spread(sigma)
    return -MEAN + z * (sigma - (1 - sigma) * STD**2) / spread(sigma)


def mean_velocity(x_t, sigma, span=None):
    """The exact MeanFlow network; without `span` the mean is over all levels below, the consistency model's."""
    sigma = sigma.view(-1, 1, 1, 1)
    span = sigma if span is None else span.view(-1, 1, 1, 1)
    mean = (x_t - move(x_t, sigma, sigma - span)) / span.clamp(min=1e-9)
    return torch.where(span > 1e-9, mean, velocity_at(x_t, sigma))


def noise(count=64, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator, dtype=dtype)


def data(count=64, seed=1):
    return MEAN + STD * noise(count, seed)


def levels(steps, start=1.0, stop=0.0):
    return np.linspace(start, stop, steps + 1).tolist()


def order(solver, coarse, start, stop):
    """Measured from the errors at `coarse` steps and at twice as many."""
    x_t = noise()
    exact = move(x_t, torch.tensor(start), torch.tensor(stop))
    errors = [
        (solver(velocity, x_t, levels(n, start, stop)) - exact).abs().max().item()
        for n in (coarse, 2 * coarse)
    ]
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    "solver, expected",
    [(baselines.euler, 1), (baselines.heun, 2), (baselines.dpm_solver_2m, 2)],
    ids=["euler", "heun", "dpm"],
)
def test_solvers_converge_in_their_order(solver, expected):
    # Within [0.1, 0.9], where the log-SNR is smooth.
    assert order(solver, 64, 0.9, 0.1) == pytest.approx(expected, abs=0.1)


def test_few_steps_of_dpm_solver_are_eulers():
    for steps in (1, 2):
        ours, theirs = (
            solver(velocity, noise(), levels(steps)) for solver in (baselines.dpm_solver_2m, baselines.euler)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(
        baselines.dpm_solver_2m(velocity, noise(), levels(4)), baselines.euler(velocity, noise(), levels(4))
    )


def test_pairs_are_the_teachers_trajectory(tmp_path):
    sigmas = np.array([1.0, 0.5, 0.0])
    labels = torch.zeros(64, dtype=torch.int64)
    pairs = baselines.teacher_pairs(velocity, noise(), labels, sigmas, substeps=25)
    torch.testing.assert_close(pairs.states[2], baselines.euler(velocity, noise(), levels(50)))
    torch.testing.assert_close(pairs.states[1], baselines.euler(velocity, noise(), levels(25, 1.0, 0.5)))
    pairs.save(tmp_path / "pairs.npz")
    torch.testing.assert_close(baselines.Pairs.load(tmp_path / "pairs.npz").states, pairs.states)


def test_regression_ends_where_a_segment_ends():
    # 2,000 substeps stand for the exact flow; Euler's error over them is about 1 / 2,000.
    labels = torch.zeros(64, dtype=torch.int64)
    pairs = baselines.teacher_pairs(velocity, noise(), labels, np.array([1.0, 0.4, 0.0]), substeps=2000)
    down = {1.0: 0.4, 0.4: 0.0}

    def exact(x_t, sigma, labels):
        dst = torch.tensor([down[round(s, 3)] for s in sigma.tolist()], dtype=x_t.dtype).view(-1, 1, 1, 1)
        src = sigma.view(-1, 1, 1, 1)
        return (move(x_t, src, dst) - x_t) / (dst - src)

    loss = baselines.regression_loss(exact, pairs, 64, IterationRandom(0, 0), torch.device("cpu"))
    assert loss < 1e-6
    worse = baselines.regression_loss(
        lambda *a, **k: exact(*a, **k) + 0.1, pairs, 64, IterationRandom(0, 0), torch.device("cpu")
    )
    assert worse == pytest.approx(0.01, rel=0.05)


def test_a_consistency_model_leaves_data_as_they_are():
    network = DiTNetwork(TINY)
    x_0, labels = torch.randn(5, *SHAPE), torch.zeros(5, dtype=torch.int64)
    torch.nn.init.normal_(network.module.head.out.weight)
    assert torch.equal(baselines.consistency(network, x_0, 0.0, labels=labels), x_0)
    assert not torch.equal(baselines.consistency(network, x_0, 0.1, labels=labels), x_0)


def test_the_exact_consistency_model_has_the_least_loss():
    config = ConsistencyConfig(steps=200)  # so that Heun's step is close to exact

    def loss(off):
        def network(x_t, sigma):
            return mean_velocity(x_t, sigma) + off

        random = IterationRandom(0, 0)
        return baselines.consistency_loss(network, network, velocity, data(), {}, random, config).item()

    assert loss(0.0) < 1e-9
    # sigma * off differs by off / steps between neighbours.
    assert loss(1.0) == pytest.approx(1 / 200**2, rel=0.05)


def test_consistency_sampling_gives_the_data_again():
    # However often it is noised in between, what comes out has the data's mean and spread.
    for steps in (1, 2, 4):
        x_0 = baselines.consistency_sample(
            mean_velocity, noise(4000), levels(steps), lambda draw: noise(4000, seed=10 + draw)
        )
        assert x_0.mean().item() == pytest.approx(MEAN, abs=0.01)  # 64,000 values: four standard errors
        assert x_0.std().item() == pytest.approx(STD, abs=0.01)


def test_the_target_follows_the_network():
    target, network = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = target.weight.clone()
    baselines.follow(target, network, 0.75)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * network.weight)


def mean_flow_network():
    torch.manual_seed(0)
    teacher = DiTNetwork(TINY)
    for parameter in teacher.parameters():  # adaLN-zero starts at 0, where bugs hide
        torch.nn.init.normal_(parameter, std=0.3)
    return teacher, baselines.MeanFlowNetwork(teacher).double()


def test_the_change_of_the_mean_velocity_is_what_finite_differences_say():
    _, network = mean_flow_network()
    torch.nn.init.normal_(network.module.span_mlp[-1].weight)
    network.module.double()
    x_t, u_t = noise(3), noise(3, seed=1)
    t, span = torch.tensor([0.9, 0.5, 0.3]).double(), torch.tensor([0.4, 0.5, 0.0]).double()
    labels = {"labels": torch.tensor([0, 1, 2])}
    found = baselines.velocity_change(network, x_t, t, span, u_t, labels)
    h = 1e-4
    with torch.no_grad():
        ahead, behind = (network(x_t + d * u_t, t + d, span=span + d, **labels) for d in (h, -h))
    # Time features are made in float32, whose rounding 1 / h amplifies; the largest change is near 10.
    torch.testing.assert_close(found, (ahead - behind) / (2 * h), atol=0.02, rtol=0.01)
    assert found.abs().max() > 1


def test_the_exact_mean_velocity_has_the_least_loss():
    config = MeanFlowConfig(mean=0.0, std=1.0, share=1.0, power=0.0)

    def loss(off):
        def network(x_t, sigma, span):
            return mean_velocity(x_t, sigma, span) + off

        return baselines.mean_flow_loss(network, velocity, data(), {}, IterationRandom(0, 0), config).item()

    assert loss(0.0) < 1e-12  # forward-mode derivatives, so exact
    assert loss(0.1) == pytest.approx(
        0.01 * 16, rel=1e-6
    )  # summed over 16 places; a constant's derivative is 0


def test_the_adaptive_weight_carries_no_gradient():
    off = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    config = MeanFlowConfig(mean=0.0, std=1.0, share=1.0, power=1.0, floor=0.0)
    loss = baselines.mean_flow_loss(
        lambda x_t, sigma, span: mean_velocity(x_t, sigma, span) + off,
        velocity,
        data(),
        {},
        IterationRandom(0, 0),
        config,
    )
    assert loss.item() == pytest.approx(1)
    loss.backward()
    assert off.grad.item() == pytest.approx(2 / 0.1)  # d(16 off^2) / (16 off^2)


def test_mean_flow_levels_are_ordered_and_apart_as_often_as_asked():
    r, t = baselines.mean_flow_times(4000, IterationRandom(0, 0), MeanFlowConfig(share=0.25))
    assert np.all((r >= 0) & (r <= t) & (t < 1))
    assert np.mean(r < t) == pytest.approx(0.25, abs=0.03)  # four standard errors


@pytest.mark.parametrize("steps", [1, 3])
def test_mean_flow_sampling_is_exact_with_the_exact_mean_velocity(steps):
    x_0 = baselines.mean_flow_sample(mean_velocity, noise(), levels(steps))
    torch.testing.assert_close(x_0, move(noise(), torch.tensor(1.0), torch.tensor(0.0)))


def test_mean_flow_starts_as_its_teacher_whatever_the_span():
    teacher, _ = mean_flow_network()
    for half in (0, 128):  # only features that turn by less than 10 radians from noise to data
        teacher.module.time_mlp[0].weight.data[:, half : half + 64] = 0
    student = baselines.mean_flow_from(teacher, steps=200)
    x_t, labels = torch.randn(32, *SHAPE), torch.zeros(32, dtype=torch.int64)
    sigma = torch.linspace(0.02, 0.98, 32)
    with torch.no_grad():
        u_t = teacher(x_t, sigma, labels=labels)
        spans = [student(x_t, sigma, labels=labels, span=s * sigma) for s in (0.0, 0.5, 1.0)]
    assert torch.equal(spans[0], spans[1]) and torch.equal(spans[0], spans[2])
    assert (spans[0] - u_t).square().mean() < 0.05 * u_t.square().mean()


@pytest.mark.parametrize("method", ["regression", "consistency", "meanflow"])
def test_training_brings_one_call_towards_the_exact_flow(method):
    torch.manual_seed(0)
    network = baselines.MeanFlowNetwork(DiTNetwork(TINY)) if method == "meanflow" else DiTNetwork(TINY)
    x_1 = noise(256, seed=5, dtype=torch.float32)
    labels = torch.zeros(256, dtype=torch.int64)
    sigmas = np.array([1.0, 0.0])
    pairs = baselines.teacher_pairs(
        velocity, noise(500, dtype=torch.float32), labels[:1].expand(500), sigmas, 20
    )
    everywhere = MeanFlowConfig(mean=0.0, std=1.0, share=1.0, power=0.5)
    target = network
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)

    def loss(random):
        x_0 = MEAN + STD * torch.from_numpy(random.normal((32, *SHAPE)))
        given = {"labels": labels[:32]}
        if method == "regression":
            return baselines.regression_loss(network, pairs, 32, random, torch.device("cpu"))
        if method == "consistency":
            return baselines.consistency_loss(
                network, target, velocity, x_0, given, random, ConsistencyConfig(steps=8)
            )
        return baselines.mean_flow_loss(network, velocity, x_0, given, random, everywhere)

    def error():
        span = {"span": torch.ones(256)} if method == "meanflow" else {}
        with torch.no_grad():
            x_0 = x_1 - network(x_1, torch.ones(256), labels=labels, **span)
        return (x_0 - move(x_1, torch.tensor(1.0), torch.tensor(0.0))).square().mean().item()

    before = error()
    for iteration in range(150):
        value = loss(IterationRandom(0, iteration))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert error() < 0.3 * before
