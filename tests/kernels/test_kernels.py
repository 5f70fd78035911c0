"""The compiled kernels and the closed form, held to the reference."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piflow_edge import DXPolicy, GMPolicy, PiFlowError, rollout
from piflow_edge.kernels import cpu
from piflow_edge.kernels.cpu import library as compiled_library
from piflow_edge.kernels.rollout import integrate
from piflow_edge.schedule import count_substeps, substep_sigmas
from tests.conftest import Library
from tests.helpers.golden_cases import case_id, cases
from tests.helpers.golden_policies import make_policy, sampler_shift
from tests.helpers.rollout_cases import (
    ROUNDING,
    dx_case,
    exact_and_allowed,
    gm_case,
    levels,
    takes_gram_form,
    wide,
)

HELPERS = Path(__file__).parents[1] / "helpers"
KERNELS = Path(cpu.__file__).parent

compiled = pytest.mark.skipif(cpu.missing() is not None, reason="the kernels were not compiled")
pytestmark = compiled


# --- correct


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("case", cases("rollout"), ids=case_id)
def test_rollout_is_the_authors(case, library, isa):
    params = case.params
    policy = make_policy(case, library, np.float32)
    if "temperature" in params:
        policy = policy.temper(params["temperature"])
    raw_t = [case[name].astype(np.float64) for name in ("raw_t_start", "raw_t_end")]
    sigmas = substep_sigmas(*raw_t, count_substeps(*raw_t, params["total_substeps"]), sampler_shift(case))
    x_end = cpu.rollout(policy, library.array(case["x_t_start"]), sigmas, isa=isa)
    case.check("x_t_end", library.numpy(x_end), np.float32)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("case", cases("rollout", lambda name: name.startswith("gm")), ids=case_id)
def test_rollout_among_empty_channels_is_the_authors(case, isa):
    # They bring nothing but the form for many channels: in them all means agree, and stay 0.
    raw_t = [case[name].astype(np.float64) for name in ("raw_t_start", "raw_t_end")]
    sigmas = substep_sigmas(
        *raw_t, count_substeps(*raw_t, case.params["total_substeps"]), sampler_shift(case)
    )
    C = case["x_t_start"].shape[1]

    def widened(array, axis):
        shape = list(array.shape)
        shape[axis] = 12 - C
        return np.concatenate([array, np.zeros(shape, array.dtype)], axis=axis)

    policy = make_policy(case, Library("numpy"), np.float32)
    policy = GMPolicy(
        widened(policy.means, 2),
        policy.logweights,
        case["logstds"],
        widened(policy.x_src, 1),
        policy.sigma_src,
        eps=policy.eps,
    ).temper(case.params.get("temperature", 1.0))
    assert takes_gram_form(policy.means.shape[1], 12)
    x_end = cpu.rollout(policy, widened(case["x_t_start"], 1), sigmas, isa=isa)
    case.check("x_t_end", x_end[:, :C], np.float32)
    assert not np.any(x_end[:, C:])


@pytest.mark.parametrize("case", cases("rollout", lambda name: name.startswith("dx")), ids=case_id)
def test_the_closed_form_is_the_authors(case, library, dtype):
    policy = make_policy(case, library, dtype)
    raw_t = [case[name].astype(np.float64) for name in ("raw_t_start", "raw_t_end")]
    counts = count_substeps(*raw_t, case.params["total_substeps"])
    sigmas = substep_sigmas(*raw_t, counts, sampler_shift(case))
    x_end = policy.closed_form(library.array(case["x_t_start"].astype(dtype)), sigmas)
    case.check("x_t_end", library.numpy(x_end), dtype)


def check_against_float64(inputs, x_start, sigmas, *, temperature=1.0, eps=1e-4):
    """Hold the kernel, on every instruction set, to the reference computed in float64 from the same numbers."""
    expected, allowed = exact_and_allowed(inputs, x_start, sigmas, temperature=temperature, eps=eps)
    policy = GMPolicy(**inputs, eps=eps).temper(temperature)
    for isa in cpu.isas():
        x_end = cpu.rollout(policy, x_start, sigmas, isa=isa)
        assert x_end.dtype == np.float32
        worst = np.max(np.abs(x_end - expected) / allowed)
        assert worst <= 1, f"{isa}: {worst:.2g} times the error allowed"


# One mixture for each form of the rollout; for Gram's also a single group of components, and one beyond the
# L1 cache whose tiles do not take turns.
MIXTURES = [dict(K=5, C=3), dict(K=3, C=8), dict(K=6, C=9), dict(K=17, C=20)]
mixtures = pytest.mark.parametrize("mixture", MIXTURES, ids="{0[K]} in {0[C]}".format)


def test_the_mixtures_tried_take_both_forms():
    assert [takes_gram_form(**mixture) for mixture in MIXTURES] == [False, True, True, True]


sizes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),  # with a frame axis
)


@settings(max_examples=160, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    mixture=st.one_of(  # the third: about where the form changes
        st.tuples(st.integers(1, 9), st.integers(1, 17)),
        st.tuples(st.integers(10, 40), st.integers(1, 40)),
        st.sampled_from([(1, 7), (1, 8), (5, 7), (5, 8), (8, 8), (9, 11), (9, 12), (16, 15), (16, 16)]),
    ),
    size=sizes,
    sigma_src=st.floats(0.01, 1.0),
    length=st.floats(0.05, 1.0),
    substeps=st.integers(1, 16),
    logstd=st.floats(-10.0, 2.0),
    spread=st.sampled_from([0.01, 1.0, 10.0]),
    sharpness=st.sampled_from([1.0, 100.0, 1e4]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    offset=st.sampled_from([0.0, 0.0, 0.1, 3.0]),
    eps=st.sampled_from([1e-4, 0.02]),
)
def test_any_gm_rollout_is_the_reference_in_float64(
    seed, B, mixture, size, sigma_src, length, substeps, logstd, spread, sharpness, temperature, offset, eps
):
    K, C = mixture
    inputs = gm_case(
        seed, B=B, K=K, C=C, size=size, sigma_src=sigma_src, logstd=logstd, spread=spread, sharpness=sharpness
    )
    sigmas = levels(sigma_src, sigma_src * (1 - length), substeps)
    x_start = inputs["x_src"] + np.float32(offset)
    check_against_float64(inputs, x_start, sigmas, temperature=temperature, eps=eps)


@mixtures
@pytest.mark.parametrize("sigma_src", [1.0, 1e-2, 1e-3, 2e-4])
@pytest.mark.parametrize("logstd", [-10.0, -3.0, 2.0])
def test_low_noise_levels_lose_no_digits(sigma_src, logstd, mixture):
    # Down to eps and through it to 0. The plain formula in float32 is off by up to 1e-3 here.
    inputs = gm_case(0, **mixture, sigma_src=sigma_src, logstd=logstd)
    x_end = cpu.rollout(GMPolicy(**inputs), inputs["x_src"], levels(sigma_src))
    exact = integrate(
        GMPolicy(**wide(inputs)), inputs["x_src"].astype(np.float64), levels(sigma_src), kernel="reference"
    )
    # Largest value is about 4; 16 steps.
    np.testing.assert_allclose(x_end, exact, rtol=0, atol=32 * ROUNDING * 4)


@mixtures
def test_levels_below_eps_are_floored_as_in_the_reference(mixture):
    inputs = gm_case(1, **mixture, sigma_src=0.05)
    sigmas = np.array([0.04, 0.02, 0.009, 0.004, 0.001, 0.0])  # eps = 0.01 acts from the third on
    x_start = inputs["x_src"] + np.float32(0.01)
    check_against_float64(inputs, x_start, sigmas, eps=0.01)
    # One step below eps leaves a share of g in the state, which the steps above it then see.
    check_against_float64(inputs, x_start, np.array([0.04, 0.004, 0.03, 0.02]), eps=0.01)
    below = inputs | {"sigma_src": 0.005}  # and on the source
    check_against_float64(below, x_start, np.array([0.005, 0.002, 0.0]), eps=0.01)


@mixtures
def test_going_up_in_noise_clips_the_denominator_as_the_reference_does(mixture):
    # Above the source, zeta < 0: with a wide component the denominator reaches its floor.
    inputs = gm_case(2, **mixture, sigma_src=0.5, logstd=1.0, spread=0.1)
    check_against_float64(inputs, inputs["x_src"], np.array([0.6, 0.7, 0.65]), eps=0.01)


@mixtures
def test_every_sample_has_its_own_levels_and_number_of_steps(mixture):
    sigma_src = np.array([1.0, 0.6, 0.3])
    inputs = gm_case(3, **mixture, B=3, sigma_src=sigma_src)
    raw_t_dst, counts = np.array([0.5, 0.1, 0.3]), np.array([16, 5, 1])  # the last is done before it began
    sigmas = substep_sigmas(sigma_src, raw_t_dst, counts, 1.0)
    check_against_float64(inputs, inputs["x_src"] + np.float32(0.1), sigmas)


@pytest.mark.parametrize("C", [3, 8])
def test_dropped_components_have_no_weight(C):
    inputs = gm_case(4, K=5, C=C)
    policy = GMPolicy(**inputs).drop_parts(np.array([[0, 1, 0, 1, 1]] * 2), 0.5)
    kept = [1, 3, 4]
    alone = GMPolicy(**inputs | {k: inputs[k][:, kept] for k in ("means", "logweights")})
    x_src = inputs["x_src"]
    # Not to the bit: sums over components run in another order, and three of three channels in another form.
    np.testing.assert_allclose(
        cpu.rollout(policy, x_src, levels(1.0)), cpu.rollout(alone, x_src, levels(1.0)), rtol=0, atol=2e-6
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    N=st.integers(1, 12),
    C=st.integers(1, 5),
    size=sizes,
    mode=st.sampled_from(["grid", "polynomial"]),
    shift=st.sampled_from([0.5, 1.0, 3.0]),
    per_sample=st.booleans(),
    substeps=st.integers(1, 128),
    offset=st.sampled_from([0.0, 0.5]),
)
def test_any_dx_rollout_in_closed_form_is_the_loop(
    seed, B, N, C, size, mode, shift, per_sample, substeps, offset
):
    rng = np.random.default_rng(seed)
    sigma_src = rng.uniform(0.2, 1.0, B) if per_sample else rng.uniform(0.2, 1.0)
    sigmas = levels(sigma_src, sigma_src * rng.choice([0.0, 0.4]), substeps)
    inputs = dx_case(seed, B=B, N=N, C=C, size=size, sigma_src=sigma_src, mode=mode, shift=shift)
    x_start = inputs["x_src"] + np.float32(offset)
    policy = DXPolicy(**wide(inputs))
    exact = integrate(policy, x_start.astype(np.float64), sigmas, kernel="reference")
    scale = np.abs(exact).max() + 10
    # 128 steps, each of which rounds float64 a few times.
    np.testing.assert_allclose(
        policy.closed_form(x_start.astype(np.float64), sigmas), exact, rtol=0, atol=1e-13 * scale
    )
    for isa in cpu.isas():
        x_end = cpu.rollout(DXPolicy(**inputs), x_start, sigmas, isa=isa)
        # N + 2 terms, each of which rounds twice: its weight and its product.
        np.testing.assert_allclose(x_end, exact, rtol=0, atol=2 * (N + 2) * ROUNDING * scale)


# --- the same to the bit


def big_gm_policy(C, B=3):
    # Large enough that the kernel does use the threads it may.
    inputs = gm_case(5, B=B, K=8, C=C, size=(37, 41), sigma_src=np.linspace(1.0, 0.5, B))
    return GMPolicy(**inputs), inputs, levels(np.linspace(1.0, 0.5, B), 0.0 * np.ones(B), 64)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(num_threads):
    for C in (4, 8):
        policy, inputs, sigmas = big_gm_policy(C)
        one = cpu.rollout(policy, inputs["x_src"], sigmas, num_threads=1)
        many = cpu.rollout(policy, inputs["x_src"], sigmas, num_threads=num_threads)
        np.testing.assert_array_equal(many, one)
    inputs = dx_case(5, B=3, N=10, C=4, size=(128, 129))
    policy = DXPolicy(**inputs)
    one = cpu.rollout(policy, inputs["x_src"], levels(1.0), num_threads=1)
    many = cpu.rollout(policy, inputs["x_src"], levels(1.0), num_threads=num_threads)
    np.testing.assert_array_equal(many, one)


@pytest.mark.parametrize("C", [4, 8])
def test_splitting_a_batch_does_not_change_a_bit(C):
    policy, inputs, sigmas = big_gm_policy(C)
    together = cpu.rollout(policy, inputs["x_src"], sigmas)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        alone = cpu.rollout(GMPolicy(**one), one["x_src"], sigmas[:, i : i + 1])
        np.testing.assert_array_equal(alone, together[i : i + 1])


@pytest.mark.parametrize("C", [5, 9])
@pytest.mark.parametrize("isa", cpu.isas())
def test_where_a_pixel_lies_does_not_change_a_bit(isa, C):
    # Cut anywhere, a pixel sits in another lane of another tile, or in the padded last one, alone or in turns.
    inputs = gm_case(6, B=1, K=6, C=C, size=(1, 150))
    whole = cpu.rollout(GMPolicy(**inputs), inputs["x_src"], levels(1.0), isa=isa)
    for part in (slice(0, 1), slice(3, 20), slice(60, 131), slice(149, 150)):
        cut = {k: v if k in ("logstds", "sigma_src") else v[..., part] for k, v in inputs.items()}
        x_end = cpu.rollout(GMPolicy(**cut), np.ascontiguousarray(cut["x_src"]), levels(1.0), isa=isa)
        np.testing.assert_array_equal(x_end, whole[..., part])


@mixtures
def test_where_the_state_to_start_from_lies_does_not_change_a_bit(mixture):
    # At the source itself the kernel leaves out terms that are 0 for a copy of it.
    inputs = gm_case(7, **mixture)
    policy, x_src = GMPolicy(**inputs), inputs["x_src"]
    np.testing.assert_array_equal(
        cpu.rollout(policy, x_src.copy(), levels(1.0)), cpu.rollout(policy, x_src, levels(1.0))
    )


@mixtures
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("array", ["means", "logweights", "x_src", "x_start", "logstds"])
def test_nan_stays_where_it_is(array, isa, mixture):
    inputs = gm_case(7, **mixture)
    x_start = inputs["x_src"] + np.float32(0.1)
    clean = cpu.rollout(GMPolicy(**inputs), x_start, levels(1.0), isa=isa)
    inputs["x_start"] = x_start
    inputs[array] = inputs[array].copy()
    where = (0, 0, 0, 0, 0) if array == "logstds" else (1, *(0,) * (inputs[array].ndim - 3), 2, 3)
    inputs[array][where] = np.nan
    x_start = inputs.pop("x_start")
    x_end = cpu.rollout(GMPolicy(**inputs), x_start, levels(1.0), isa=isa)
    hit = np.zeros(x_end.shape, bool)
    if array == "logstds":
        hit[0] = True  # the sample's own
    else:
        hit[1, :, 2, 3] = True
    assert np.isnan(x_end[hit]).all() if array != "x_start" else np.isnan(x_end[1, 0, 2, 3])
    np.testing.assert_array_equal(x_end[~hit], clean[~hit])


# --- what comes in, and which kernel runs


def test_arrays_lie_in_memory_as_they_like():
    inputs = gm_case(8)
    expected = cpu.rollout(GMPolicy(**inputs), inputs["x_src"], levels(1.0))

    def transpose(a):
        return np.ascontiguousarray(np.moveaxis(a, -1, 0)).transpose(*range(1, a.ndim), 0)

    def misalign(a):
        buffer = np.zeros(a.nbytes + 1, np.uint8)
        view = buffer[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view

    def read_only(a):
        a = a.copy()
        a.setflags(write=False)
        return a

    def big_endian(a):
        return a.astype(">f4")

    for change in (transpose, misalign, read_only, big_endian):
        changed = {k: change(v) if k != "sigma_src" else v for k, v in inputs.items()}
        x_end = integrate(
            GMPolicy(**changed), changed["x_src"].astype("=f4", copy=False), levels(1.0), kernel="cpu"
        )
        np.testing.assert_array_equal(x_end, expected, err_msg=change.__name__)


def test_the_source_is_left_as_it_was():
    inputs = gm_case(9)
    before = {k: np.copy(v) for k, v in inputs.items()}
    rollout(GMPolicy(**inputs), inputs["x_src"], 1.0, 0.0, 8, kernel="cpu")
    for name, value in before.items():
        np.testing.assert_array_equal(inputs[name], value)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_states_are_widened_and_come_back(half, library):
    inputs = gm_case(10)
    policy = GMPolicy(**{k: library.array(v) if k != "sigma_src" else v for k, v in inputs.items()})
    x_src = library.array(inputs["x_src"])
    if library.name == "torch":
        import torch

        x_half = x_src.to(getattr(torch, half))
        x_end, expected = (
            integrate(policy, x_half, levels(1.0), kernel=kernel) for kernel in ("cpu", "reference")
        )
        assert x_end.dtype == x_half.dtype
        x_end, expected = x_end.float(), expected.float()
    elif half == "bfloat16":
        pytest.skip("NumPy has no bfloat16")
    else:
        x_half = x_src.astype(half)
        x_end, expected = (
            integrate(policy, x_half, levels(1.0), kernel=kernel) for kernel in ("cpu", "reference")
        )
        assert x_end.dtype == x_half.dtype
    # One unit in the last place of the half format at 4: float32 results may round to either neighbour.
    unit = 2.0**-8 if half == "float16" else 2.0**-5
    np.testing.assert_allclose(library.numpy(x_end), library.numpy(expected), rtol=0, atol=unit)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(kernel="fast"), "kernel is one of"),
        (dict(kernel="cuda"), "GPU memory"),
        (dict(dtype=np.float64), "float32"),
        (dict(x_dtype=np.float64), "float32"),
        (dict(x_dtype=np.int32), "float32"),
        (dict(shape=(2, 3, 5, 6)), "shape"),
        (dict(sigmas=np.array([1.0, np.nan])), r"\[0, 1\]"),
        (dict(sigmas=np.array([1.0, 1.5])), r"\[0, 1\]"),
        (dict(sigmas=np.ones((3, 5))), "one per sample"),
        (dict(sigmas=np.float64(1.0)), "one per sample"),
        (dict(sigmas=np.empty(0)), "one per sample"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(change, words):
    inputs = gm_case(11)
    if "dtype" in change:
        inputs = wide(inputs)
    x_src = np.zeros(change.get("shape", inputs["x_src"].shape), change.get("x_dtype", np.float32))
    with pytest.raises(PiFlowError, match=words):
        integrate(
            GMPolicy(**inputs), x_src, change.get("sigmas", levels(1.0)), kernel=change.get("kernel", "cpu")
        )


def test_settings_the_library_refuses_raise_our_error():
    inputs = gm_case(11)
    policy, x_src = GMPolicy(**inputs), inputs["x_src"]
    with pytest.raises(PiFlowError, match="num_threads"):
        cpu.rollout(policy, x_src, levels(1.0), num_threads=-1)
    with pytest.raises(PiFlowError, match="this processor runs"):
        cpu.rollout(policy, x_src, levels(1.0), isa="mmx")


def test_an_unknown_policy_is_refused_by_name_and_left_to_the_reference_by_auto():
    class Straight:
        def velocity(self, x_t, sigma_t):
            return x_t / sigma_t

    x_src = np.ones((1, 1, 2, 2), np.float32)
    with pytest.raises(PiFlowError, match="GMPolicy and DXPolicy"):
        integrate(Straight(), x_src, levels(1.0, 0.5), kernel="cpu")
    np.testing.assert_allclose(integrate(Straight(), x_src, levels(1.0, 0.5)), 0.5 * x_src, rtol=1e-5)


def test_auto_takes_the_kernel_for_float32_and_the_reference_for_float64():
    inputs = gm_case(12)
    policy, x_src = GMPolicy(**inputs), inputs["x_src"]
    results = {k: integrate(policy, x_src, levels(1.0), kernel=k) for k in ("auto", "cpu", "reference")}
    np.testing.assert_array_equal(results["auto"], results["cpu"])
    assert not np.array_equal(results["auto"], results["reference"])  # they round differently
    policy, x_src = GMPolicy(**wide(inputs)), x_src.astype(np.float64)
    results = {k: integrate(policy, x_src, levels(1.0), kernel=k) for k in ("auto", "reference")}
    np.testing.assert_array_equal(results["auto"], results["reference"])


@pytest.mark.torch
def test_torch_memory_is_read_in_place_and_a_tensor_comes_back():
    torch = pytest.importorskip("torch")
    inputs = gm_case(14)
    tensors = {k: torch.from_numpy(v) if k != "sigma_src" else v for k, v in inputs.items()}
    assert cpu._host(tensors["means"]).ctypes.data == tensors["means"].data_ptr()
    x_end = integrate(GMPolicy(**tensors), tensors["x_src"], levels(1.0), kernel="cpu")
    assert isinstance(x_end, torch.Tensor)
    np.testing.assert_array_equal(
        x_end.numpy(), cpu.rollout(GMPolicy(**inputs), inputs["x_src"], levels(1.0))
    )
    expected = integrate(GMPolicy(**inputs), inputs["x_src"].copy(order="F"), levels(1.0), kernel="cpu")
    strided = tensors["x_src"].transpose(-1, -2).contiguous().transpose(-1, -2)
    assert not strided.is_contiguous()
    np.testing.assert_array_equal(
        integrate(GMPolicy(**tensors), strided, levels(1.0), kernel="cpu"), expected
    )


@pytest.mark.torch
@pytest.mark.parametrize("leaf", ["means", "x_src"])
def test_gradients_go_through_the_reference(leaf):
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) if k != "sigma_src" else v for k, v in gm_case(15).items()}
    tensors[leaf].requires_grad_()
    policy = GMPolicy(**tensors)
    with pytest.raises(PiFlowError, match="gradients"):
        integrate(policy, tensors["x_src"], levels(1.0), kernel="cpu")
    integrate(policy, tensors["x_src"], levels(1.0)).square().sum().backward()
    assert torch.count_nonzero(tensors[leaf].grad) > 0
    with torch.no_grad():
        without = integrate(policy, tensors["x_src"], levels(1.0))
    detached = integrate(policy.detach(), tensors["x_src"].detach(), levels(1.0), kernel="cpu")
    assert torch.equal(without, detached)


@pytest.mark.torch
def test_the_closed_form_has_the_gradients_of_the_loop():
    torch = pytest.importorskip("torch")
    inputs = wide(dx_case(16))
    gradients = []
    for kernel in ("auto", "reference"):
        leaves = [torch.from_numpy(inputs[name]).requires_grad_() for name in ("grid", "x_src")]
        policy = DXPolicy(leaves[0], leaves[1], 1.0, segment_size=0.5)
        integrate(policy, leaves[1], levels(1.0), kernel=kernel).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for closed, loop in zip(*gradients, strict=True):
        torch.testing.assert_close(closed, loop, rtol=1e-12, atol=1e-13)


# --- memory


def test_a_rollout_takes_the_memory_of_its_result():
    def roll_out(inputs):
        return integrate(GMPolicy(**inputs), inputs["x_src"], levels(1.0, 0.0, 2), kernel="cpu")

    roll_out(gm_case(17))  # modules are loaded once
    inputs = gm_case(17, B=1, K=8, C=16, size=(128, 128))
    tracemalloc.start()
    x_end = roll_out(inputs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x_end.nbytes == inputs["x_src"].nbytes
    assert peak <= 1.05 * x_end.nbytes


def test_a_rollout_grows_the_process_by_the_memory_of_its_result(library):
    if os.environ.get("PIFLOW_EDGE_EMULATED"):  # see aarch64.sh
        pytest.skip("a process's peak counts the emulator's own memory here")
    # What tracemalloc does not see counts too: torch's tensors, threads and their tiles.
    script = [sys.executable, "-m", "tests.helpers.rollout_memory", library.name]
    # For glibc: take from the system, and give back, what is larger; memory used again would not count.
    setting = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(
        script, capture_output=True, text=True, env=os.environ | setting, cwd=HELPERS.parents[1]
    )
    if done.returncode and "no peaks here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout) <= 1.25  # times 1 MiB; twice the state is what we promise


def test_importing_the_kernels_loads_no_torch():
    code = "import sys, piflow_edge.kernels.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the library itself


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("cc") is None or os.name == "nt", reason="no C compiler")
def test_a_c_program_can_link_the_library(tmp_path):
    path = compiled_library()._name
    program = tmp_path / "example"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-I", KERNELS, f"-Wl,-rpath,{KERNELS}"]
    run("cc", *flags, HELPERS / "rollout_example.c", path, "-lm", "-o", program)
    assert "agree" in run(program)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("c++") is None, reason="no C++ compiler"
)
def test_the_kernels_keep_to_their_memory_and_to_defined_behaviour(tmp_path):
    build = pytest.importorskip("piflow_edge.kernels.build", reason="setuptools is not installed")
    flags = [
        *build.GNU_FLAGS,
        "-O0",  # compiles faster, and optimises no check away
        "-I",
        KERNELS,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    empty = tmp_path / "empty"
    made = subprocess.run(["c++", *flags[-2:], "-x", "c++", "-", "-o", empty], input=b"int main() {}")
    if made.returncode:
        pytest.skip("this compiler has no sanitizers")
    if subprocess.run([empty]).returncode:
        pytest.skip("even an empty program does not start with sanitizers, as in an emulated process")
    flags_of = {"baseline": [], **build.isa_flags()}
    flags_of = {
        isa: flags_of[isa] for isa in cpu.isas()
    }  # what this processor runs; each takes seconds to compile
    defines = [f"-DPIFLOW_HAVE_{name}" for name in flags_of]
    objects = [tmp_path / f"{name}.o" for name in ("kernels", *flags_of)]
    run("c++", *flags, *defines, "-c", KERNELS / "kernels.cpp", "-o", objects[0])
    for name, more in flags_of.items():
        run(
            "c++",
            *flags,
            *more,
            f"-DPIFLOW_ISA={name}",
            "-c",
            KERNELS / "isa.cpp",
            "-o",
            tmp_path / f"{name}.o",
        )
    for isa in cpu.isas():  # each has its own exponential
        run("c++", *flags, *flags_of[isa], HELPERS / "kernels_check.cpp", *objects, "-o", tmp_path / "check")
        only = [] if isa == "baseline" else ["exponential"]
        assert "checked" in run(tmp_path / "check", *only)
