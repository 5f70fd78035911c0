import numpy as np
import onnx
import pytest
from onnx import helper

from piflow_edge import DXPolicy, GMPolicy, Schedule
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import ScheduleError
from piflow_edge.export.onnx_graphs.rollout_graph import DOMAIN, build_rollout, inline
from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.kernels.rollout import integrate
from piflow_edge.policies import DXPolicySpec, GMKPolicy, GMKPolicySpec, GMPolicySpec
from piflow_edge.schedule import segment_sigmas


def run(kind, arrays, sigmas, temperature=1.0):
    """One call of the ONNX function for a kind of policy, as a model of nothing else."""
    tables = kind.rollout_tables([sigmas], [temperature])
    function = build_rollout(kind, tables)
    inputs = {name: np.asarray(value, np.float32) for name, value in arrays.items()}
    inputs |= {name: np.asarray(table[0]) for name, table in tables.items()}
    floats = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    end = helper.make_tensor_value_info("x_dst", onnx.TensorProto.FLOAT, inputs["x_src"].shape)
    call = helper.make_node(function.name, list(function.input), ["x_dst"], domain=DOMAIN)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([call], "one_call", floats, [end])
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    return open_engine(Graph(inline(model).SerializeToString())).run(inputs)["x_dst"]


def gm_case(rng, *, batch, components, state, logstd):
    return dict(
        means=rng.standard_normal((batch, components, *state)),
        logweights=2 * rng.standard_normal((batch, components, 1, *state[1:])),
        logstds=np.reshape(logstd + np.arange(batch) / 4, (batch, 1, *(1 for _ in state))),
        x_src=rng.standard_normal((batch, *state)),
    )


def gmk_error(arrays, sigmas, temperature, eps=1e-4):
    """Greatest difference between the graph and the same rollout in float64, with a width for each component."""
    K = arrays["means"].shape[1]
    widths = arrays["logstds"] + np.linspace(-1, 1, K).reshape(1, K, *(1,) * (arrays["means"].ndim - 2))
    arrays = arrays | {"logstds": widths}
    exact = GMKPolicy(*arrays.values(), sigmas[0], eps=eps).temper(temperature)
    expected = integrate(exact, arrays["x_src"], sigmas, kernel="reference")
    found = run(GMKPolicySpec(K, eps), arrays, sigmas, temperature)
    return np.abs(found - expected).max()


def gm_error(arrays, sigmas, temperature, eps=1e-4):
    """Greatest difference between the graph and the same rollout in float64."""
    exact = GMPolicy(*arrays.values(), sigmas[0], eps=eps).temper(temperature)
    expected = integrate(exact, arrays["x_src"], sigmas, kernel="reference")
    found = run(GMPolicySpec(arrays["means"].shape[1], eps), arrays, sigmas, temperature)
    return np.abs(found - expected).max()


@pytest.mark.parametrize("state", [(1, 8, 8), (4, 5, 3), (2, 3, 4, 5)], ids=["grey", "latent", "video"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("nfe", [1, 3])
@pytest.mark.parametrize(("temperature", "logstd"), [(1.0, -3.0), (0.3, 0.0)])
def test_a_gm_rollout_is_that_of_the_policy(state, batch, nfe, temperature, logstd):
    arrays = gm_case(np.random.default_rng(0), batch=batch, components=5, state=state, logstd=logstd)
    schedule = Schedule(nfe=nfe, shift=3.2, final_step_size_scale=0.5)
    for segment in schedule.segments:
        ends = (segment.sigma_src, segment.sigma_dst, segment.substeps)
        # States of about 3 are rounded to float32, and up to 128 times more on the way.
        assert gm_error(arrays, segment_sigmas(*ends, schedule.shift), temperature) < 2e-5


@pytest.mark.parametrize("state", [(1, 8, 8), (4, 5, 3), (2, 3, 4, 5)], ids=["grey", "latent", "video"])
@pytest.mark.parametrize(("temperature", "logstd"), [(1.0, -3.0), (0.3, 0.0)])
def test_a_gmk_rollout_is_that_of_the_policy(state, temperature, logstd):
    arrays = gm_case(np.random.default_rng(0), batch=3, components=5, state=state, logstd=logstd)
    for segment in Schedule(nfe=2, shift=3.2, final_step_size_scale=0.5).segments:
        ends = (segment.sigma_src, segment.sigma_dst, segment.substeps)
        # As above; evidence for the narrowest component is divided by its variance, a seventh of what it is above.
        assert gmk_error(arrays, segment_sigmas(*ends, 3.2), temperature) < 1e-4


def test_a_gm_rollout_is_steady_down_to_the_floor():
    # 1 / sigma^2 reaches 1e8 here; in x_0 coordinates float32 would have nothing left of the state.
    arrays = gm_case(np.random.default_rng(1), batch=2, components=4, state=(3, 4, 4), logstd=-4.0)
    sigmas = np.append(np.geomspace(1.0, 1.001e-4, 60), 0.0)
    assert gm_error(arrays, sigmas, 1.0) < 2e-5


def test_a_rollout_below_the_floor_is_refused():
    with pytest.raises(ScheduleError, match=r"eps, 0\.01; .*0\.005"):
        GMPolicySpec(3, eps=0.01).rollout_tables([np.array([1.0, 0.005, 0.0])], [1.0])


@pytest.mark.parametrize("state", [(1, 8, 8), (2, 3, 4, 5)], ids=["grey", "video"])
@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("num_nodes", [1, 6])
def test_a_dx_rollout_is_that_of_the_policy(state, mode, num_nodes):
    rng = np.random.default_rng(2)
    grid, x_src = rng.standard_normal((3, num_nodes, *state)), rng.standard_normal((3, *state))
    policy = DXPolicy(grid, x_src, 0.8, segment_size=0.6, shift=1.7, mode=mode)
    sigmas = segment_sigmas(0.8, 0.1, 77, 3.2)
    expected = integrate(policy, x_src, sigmas, kernel="reference")
    found = run(DXPolicySpec(num_nodes, 0.6, 1.7, mode), {"grid": grid, "x_src": x_src}, sigmas)
    # One weighted sum of seven float32 numbers of up to 4.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)
