import numpy as np
import pytest

from piflow_edge import DXPolicy, GMPolicy, PiFlowError
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import make_policy


@pytest.mark.parametrize("case", cases("gmflow_policy") + cases("dx_policy"), ids=case_id)
def test_velocity_is_the_authors(case, library, dtype):
    policy = make_policy(case, library, dtype)
    u = [velocity(policy, case, query, library, dtype) for query in range(len(case["x_t"]))]
    case.check("u", u, dtype)


@pytest.mark.parametrize("case", cases("gmflow_policy"), ids=case_id)
def test_tempered_velocity_is_the_authors(case, library, dtype):
    for i, temperature in enumerate(case.params["temperatures"]):
        policy = make_policy(case, library, dtype).temper(temperature)
        u = [velocity(policy, case, query, library, dtype) for query in range(len(case["x_t"]))]
        case.check(f"u_temp{i}", u, dtype)


@pytest.mark.parametrize("case", cases("gmflow_policy", lambda name: "dropout" in name), ids=case_id)
def test_dropped_velocity_is_the_authors(case, library, dtype):
    uniforms = library.array(case["dropout_uniforms"])
    policy = make_policy(case, library, dtype).drop_parts(uniforms, float(case["dropout_p"]))
    u = [velocity(policy, case, query, library, dtype) for query in range(len(case["x_t"]))]
    case.check("u_drop", u, dtype)


def velocity(policy, case, query, library, dtype):
    x_t = library.array(case["x_t"][query].astype(dtype))
    return library.numpy(policy.velocity(x_t, case.source("sigma_t", dtype)[query]))


def gm_inputs(rng, *, B=2, K=3, C=4, size=(5, 6), dtype=np.float32):
    return dict(
        means=rng.standard_normal((B, K, C, *size)).astype(dtype),
        logweights=rng.standard_normal((B, K, 1, *size)).astype(dtype),
        logstds=rng.uniform(-3, 0, (B, 1, 1, *(1 for _ in size))).astype(dtype),
        x_src=rng.standard_normal((B, C, *size)).astype(dtype),
    )


@pytest.mark.parametrize("sigma_src", [1.0, 0.4, np.array([1.0, 0.3])], ids=["noise", "inner", "per-sample"])
def test_at_the_source_the_velocity_is_the_weighted_mean(sigma_src):
    inputs = gm_inputs(np.random.default_rng(0), dtype=np.float64)
    weights = np.exp(inputs["logweights"])
    mean = (weights * inputs["means"]).sum(1) / weights.sum(1)
    u = GMPolicy(**inputs, sigma_src=sigma_src).velocity(inputs["x_src"], sigma_src)
    np.testing.assert_allclose(u, mean, rtol=0, atol=1e-13)


@pytest.mark.torch
def test_at_the_source_logstds_have_no_gradient():
    torch = pytest.importorskip("torch")
    inputs = {k: torch.from_numpy(v) for k, v in gm_inputs(np.random.default_rng(1)).items()}
    inputs["logstds"].requires_grad_()
    GMPolicy(**inputs, sigma_src=0.7).velocity(inputs["x_src"], 0.7).square().sum().backward()
    assert torch.count_nonzero(inputs["logstds"].grad) == 0


@pytest.mark.torch
@pytest.mark.parametrize("first", ["no_grad", "inference_mode"])
def test_whoever_asks_a_policy_first_takes_no_gradients_from_the_next(first):
    # What a policy works out once and keeps must not depend on the mode of the first to ask.
    torch = pytest.importorskip("torch")
    grads = []
    for leaf in ("means", "logweights", "x_t"):
        inputs = {k: torch.from_numpy(v) for k, v in gm_inputs(np.random.default_rng(9)).items()}
        x_t = inputs["x_src"] * 0.5
        tensor = x_t if leaf == "x_t" else inputs[leaf]
        tensor.requires_grad_()
        for asked in (False, True):
            policy = GMPolicy(**inputs, sigma_src=0.9).temper(0.8)
            if asked:
                with getattr(torch, first)():
                    policy.velocity(x_t, 0.4)
            grads.append(torch.autograd.grad(policy.velocity(x_t, 0.4).square().sum(), tensor)[0])
    for alone, after in zip(grads[::2], grads[1::2], strict=True):
        assert torch.count_nonzero(alone) > 0
        assert torch.equal(alone, after)


@pytest.mark.torch
def test_a_policy_made_without_gradients_has_none_later():
    torch = pytest.importorskip("torch")
    inputs = {k: torch.from_numpy(v) for k, v in gm_inputs(np.random.default_rng(10)).items()}
    inputs["logweights"].requires_grad_()
    with torch.no_grad():
        policy = GMPolicy(**inputs, sigma_src=0.9)
    assert not policy.velocity(inputs["x_src"] * 0.5, 0.4).requires_grad


def test_one_component_at_every_level_is_a_gaussian_posterior():
    # K = 1 has a closed form: x_0 ~ N(m, v) at the source, then x_t = (1 - sigma) x_0 + sigma noise.
    inputs = gm_inputs(np.random.default_rng(2), K=1, dtype=np.float64)
    x_t = np.random.default_rng(3).standard_normal(inputs["x_src"].shape)
    sigma = 0.35
    m = inputs["x_src"] - inputs["means"][:, 0]
    v = np.exp(2 * inputs["logstds"][:, 0])
    gain = v * (1 - sigma) / (v * (1 - sigma) ** 2 + sigma**2)
    x_0 = m + gain * (x_t - (1 - sigma) * m)
    u = GMPolicy(**inputs, sigma_src=1.0).velocity(x_t, sigma)
    np.testing.assert_allclose(u, (x_t - x_0) / sigma, rtol=1e-10)


def test_log_weights_need_not_be_normalised():
    inputs = gm_inputs(np.random.default_rng(4), dtype=np.float64)
    shifted = inputs | {"logweights": inputs["logweights"] + 700.0}  # exp would overflow
    x_t = inputs["x_src"] * 0.5
    expected = GMPolicy(**inputs, sigma_src=0.9).velocity(x_t, 0.4)
    np.testing.assert_allclose(GMPolicy(**shifted, sigma_src=0.9).velocity(x_t, 0.4), expected, rtol=1e-10)


def test_half_precision_is_computed_in_float32(library):
    inputs = gm_inputs(np.random.default_rng(5))
    half = {k: v.astype(np.float16) for k, v in inputs.items()}
    policy = GMPolicy(**{k: library.array(v) for k, v in half.items()}, sigma_src=0.8)
    u = library.numpy(policy.velocity(library.array(half["x_src"] * np.float16(0.5)), 0.3))
    wide = {k: v.astype(np.float32) for k, v in half.items()}
    expected = GMPolicy(**wide, sigma_src=0.8).velocity(wide["x_src"] * 0.5, 0.3)
    assert u.dtype == np.float32
    np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-5)


def test_grid_nodes_are_hit_exactly():
    # Node i lies at raw time i / (N - 1) of the segment; there x_0 is the node itself.
    rng = np.random.default_rng(6)
    grid, x_src = rng.standard_normal((1, 5, 2, 3, 3)), rng.standard_normal((1, 2, 3, 3))
    policy = DXPolicy(grid, x_src, 1.0, segment_size=1.0)
    for node in range(1, 5):
        sigma = node / 4
        u = policy.velocity(x_src, sigma)
        np.testing.assert_allclose(u, (x_src - (x_src - grid[:, node])) / sigma, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(logweights=np.zeros((2, 3, 4, 5, 6), np.float32)), r"logweights .*shape"),
        (dict(logstds=np.zeros(2, np.float32)), r"logstds .*shape"),
        (dict(means=np.zeros((2, 3, 4, 5, 6), np.int64)), "floating point"),
        (dict(sigma_src=1.5), r"\[0, 1\]"),
        (dict(sigma_src=float("nan")), r"\[0, 1\]"),
        (dict(sigma_src=np.ones(3)), "one per sample"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, words):
    inputs = gm_inputs(np.random.default_rng(7)) | {"sigma_src": 1.0}
    with pytest.raises(PiFlowError, match=words):
        GMPolicy(**(inputs | change))


@pytest.mark.parametrize(
    "change", [dict(mode="cubic"), dict(segment_size=0.0), dict(segment_size=float("nan"))]
)
def test_dx_settings_that_make_no_sense_are_refused(change):
    settings = dict(segment_size=1.0, mode="grid") | change
    with pytest.raises(PiFlowError):
        DXPolicy(np.zeros((1, 2, 1, 2, 2)), np.zeros((1, 1, 2, 2)), 1.0, **settings)


def test_negative_temperature_is_refused():
    policy = GMPolicy(**gm_inputs(np.random.default_rng(8)), sigma_src=1.0)
    with pytest.raises(PiFlowError, match="temperature"):
        policy.temper(-0.1)
