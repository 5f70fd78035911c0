"""The CUDA kernels: run on the CPU as C++, compiled for every GPU in question, run on one if there is one."""

import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piflow_edge import DXPolicy, GMPolicy, PiFlowError
from piflow_edge.errors import EngineError
from piflow_edge.kernels import cpu, cuda, device_arrays, nvidia
from piflow_edge.kernels.cuda import LOCAL, REGISTERS, SHARED
from piflow_edge.kernels.rollout import integrate
from tests.conftest import HAS_TORCH
from tests.helpers.pretended_gpu import (
    HAS_BINDINGS,
    HELPERS,
    ROOT,
    compile_on_host,
    fake_driver,
    run_on_fake_driver,
)
from tests.helpers.rollout_cases import dx_case, exact_and_allowed, gm_case, levels, takes_gram_form, wide

HAS_GPU = cuda.missing() is None and HAS_TORCH
NVCC = shutil.which("nvcc")
ARCHS = ("sm_87", "sm_89", "sm_90", "sm_120")  # Orin, Ada, Hopper, Blackwell

COMPILED = [(1, 1), (3, 2), (4, 16), (5, 3), (8, 1), (17, 17)]  # as MIXTURES in cuda_on_host.cpp
# Storage, and the shared memory of a pretended GPU that brings it about; with "narrow", a block has 32 threads, with
# "four threads" that many share a pixel.
STORAGES = {
    "registers": (REGISTERS, 0),
    "shared": (SHARED, 227 << 10),
    "local": (LOCAL, 0),
    "narrow": (SHARED, 0),
    "four threads": (REGISTERS, 0),
}


class OnHost:
    """A NumPy array that says it lies on a GPU: the kernels it comes to run on the CPU."""

    def __init__(self, array, stream=None):
        self.array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": stream}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """rollout.cu as a library for the CPU."""
    path = tmp_path_factory.mktemp("cuda") / "rollout.so"
    compile_on_host("cuda_on_host.cpp", path)
    library = ctypes.CDLL(str(path))
    library.widen.restype = ctypes.c_float
    library.run_gm.argtypes = (*(ctypes.c_int,) * 4, *(ctypes.c_uint,) * 2, ctypes.c_void_p)
    library.run_dx.argtypes = (*(ctypes.c_uint,) * 2, ctypes.c_void_p)
    return library


@pytest.fixture
def gpu_on_host(library, monkeypatch):
    """A GPU of 3 multiprocessors whose launches the CPU carries out; remembers them."""
    gpu = SimpleNamespace(shared_bytes=227 << 10, launches=[])

    def launch(ordinal, function, blocks, threads, shared_bytes, stream, problem):
        name, defines = function
        gpu.launches.append(
            SimpleNamespace(**defines, name=name, blocks=blocks, threads=threads, stream=stream)
        )
        if name == "piflow_dx":
            return library.run_dx(blocks, threads, ctypes.addressof(problem))
        sizes = (defines[f"PIFLOW_{name}"] for name in ("K", "C", "STORAGE", "LANES"))
        assert library.run_gm(*sizes, blocks, threads, ctypes.addressof(problem)) == 0
        return None

    def kernel(ordinal, name, defines, shared_bytes):
        return name, {key: int(value) for key, _, value in (define.partition("=") for define in defines)}

    def upload(ordinal, data):
        buffer = np.frombuffer(data, np.uint8)
        return SimpleNamespace(pointer=buffer.ctypes.data, keep=buffer)

    monkeypatch.setattr(nvidia, "device", lambda ordinal: nvidia.Device("sm_00", 3, gpu.shared_bytes))
    monkeypatch.setattr(nvidia, "kernel", kernel)
    monkeypatch.setattr(nvidia, "launch", launch)
    monkeypatch.setattr(nvidia, "upload", upload)
    monkeypatch.setattr(nvidia, "ordinal_of", lambda pointer: 0)
    monkeypatch.setattr(nvidia, "wait_for", lambda stream: gpu.launches.append(f"wait for {stream}"))
    return gpu


GM_INPUTS = ("means", "logweights", "variance", "x_src", "x_start")


def gm_inputs(policy, x_start):
    arrays = (policy.means, policy.logweights, policy.x_0_variance, policy.x_src, x_start)
    return dict(zip(GM_INPUTS, arrays, strict=True))


def carry_gm(policy, x_start, sigmas, replaced=None):
    """`gm_rollout` on a NumPy policy, with guards around the result. `replaced`: other inputs, by name."""
    inputs = gm_inputs(policy, x_start) | (replaced or {})
    guarded = np.full(x_start.size + 2, np.nan, np.float32)
    x_dst = guarded[1:-1].reshape(x_start.shape)
    on_gpu = {name: OnHost(np.ascontiguousarray(array)) for name, array in inputs.items()}
    cuda.gm_rollout(**on_gpu, x_dst=OnHost(x_dst), sigmas=sigmas, sigma_src=policy.sigma_src, eps=policy.eps)
    assert np.isnan(guarded[[0, -1]]).all()
    return x_dst


def find_fused_isa() -> str | None:
    """An instruction set of the CPU kernel that has fused multiply-add, as GPUs have."""
    return next((isa for isa in cpu.isas() if isa != "baseline"), None)


# --- run on the CPU


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # every example sets what it needs anew
)
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 3),
    mixture=st.sampled_from(COMPILED),
    size=st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 15)),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    ),
    storage=st.sampled_from(list(STORAGES)),
    per_sample=st.booleans(),
    offset=st.sampled_from([0.0, 0.1]),
    substeps=st.integers(0, 16),
    logstd=st.floats(-10.0, 2.0),
    sharpness=st.sampled_from([1.0, 100.0]),
)
@pytest.mark.skipif(find_fused_isa() is None, reason="no CPU kernel with fused multiply-add to compare with")
def test_any_gm_rollout_is_the_cpu_kernels_to_the_bit_or_as_good(
    gpu_on_host, seed, B, mixture, size, storage, per_sample, offset, substeps, logstd, sharpness
):
    # One header, the same operations in the same order: nothing may differ, where the CPU kernel does not take
    # Gram's form. It is itself held to the reference in float64, over more shapes than can be compiled here.
    (K, C), rng = mixture, np.random.default_rng(seed)
    sigma_src = rng.uniform(0.1, 1.0, B) if per_sample else float(rng.uniform(0.1, 1.0))
    sigmas = levels(sigma_src, sigma_src * rng.choice([0.0, 0.4]), substeps)
    if per_sample and substeps > 3:
        sigmas[3:, 0] = sigmas[3, 0]  # done early
    case = gm_case(seed, B=B, K=K, C=C, size=size, sigma_src=sigma_src, logstd=logstd, sharpness=sharpness)
    policy, x_start = GMPolicy(**case), case["x_src"] + np.float32(offset)

    kind, gpu_on_host.shared_bytes = STORAGES[storage]
    if storage == "narrow":
        gpu_on_host.shared_bytes = cuda._STEP_BYTES + 32 * 4 * 4 * -(-K // 4) * (C + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_MOST_IN_REGISTERS", 10**6 if kind == REGISTERS else 0)
        patch.setattr(cuda, "_FEW_PIXELS", 10**6 if storage == "four threads" else 0)
        x_end = carry_gm(policy, x_start, sigmas)
    launch = gpu_on_host.launches[-1]
    assert kind == launch.PIFLOW_STORAGE
    assert storage != "narrow" or launch.threads == 32
    shared_by = 4 if storage == "four threads" and K > 4 else 1
    assert shared_by == launch.PIFLOW_LANES
    if takes_gram_form(K, C) or shared_by == 4:
        exact, allowed = exact_and_allowed(case, x_start, sigmas)
        assert np.all(np.abs(x_end - exact) <= allowed)
    else:
        np.testing.assert_array_equal(x_end, cpu.rollout(policy, x_start, sigmas, isa=find_fused_isa()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_gm_rollout_is_the_reference(gpu_on_host, shift):
    case = gm_case(1, K=5, C=3, size=(5, 7))
    policy, sigmas = GMPolicy(**case), levels(1.0, 0.0, 300)  # more substeps than are worked out at a time
    exact = integrate(GMPolicy(**wide(case)), case["x_src"].astype(np.float64), sigmas, kernel="reference")
    # 300 steps that round a state of up to 4 about twice, in float32.
    np.testing.assert_allclose(carry_gm(policy, case["x_src"], sigmas), exact, rtol=0, atol=300 * 2**-24 * 4)


@pytest.mark.parametrize("name", GM_INPUTS)
def test_every_input_may_be_in_half_precision(gpu_on_host, name):
    case = gm_case(2)
    policy, x_start = GMPolicy(**case), case["x_src"] + np.float32(0.1)
    half = gm_inputs(policy, x_start)[name].astype(np.float16)
    narrow, wide = (
        carry_gm(policy, x_start, levels(1.0), {name: a}) for a in (half, half.astype(np.float32))
    )
    np.testing.assert_array_equal(narrow, wide)
    assert not np.array_equal(wide, carry_gm(policy, x_start, levels(1.0)))


@pytest.mark.parametrize("storage", list(STORAGES))
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_kernel_tempers_a_mixture_and_makes_its_variance_on_the_way(gpu_on_host, storage, temperature):
    case = gm_case(2, K=5, C=3, sigma_src=0.8, logstd=-1.5)
    policy, (kind, gpu_on_host.shared_bytes) = GMPolicy(**case), STORAGES[storage]
    raw = {"variance": np.full((2, 1), -1.5, np.float32)}
    x_dst = np.zeros_like(case["x_src"])
    given = gm_inputs(policy, case["x_src"]) | raw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_MOST_IN_REGISTERS", 10**6 if kind == REGISTERS else 0)
        patch.setattr(cuda, "_FEW_PIXELS", 10**6 if storage == "four threads" else 0)
        cuda.gm_rollout(
            **{name: OnHost(np.ascontiguousarray(a)) for name, a in given.items()},
            x_dst=OnHost(x_dst), sigmas=levels(0.8), sigma_src=0.8, eps=policy.eps, temperature=temperature,
            is_logstd=True,
        )  # fmt: skip
    # NumPy's exponential may round otherwise.
    expected = carry_gm(policy.temper(temperature), case["x_src"], levels(0.8))
    np.testing.assert_allclose(x_dst, expected, rtol=0, atol=1e-5)


def test_half_precision_is_widened_exactly(library):
    bits = np.arange(2**16, dtype=np.uint16)
    widened = np.array([[library.widen(int(b), form) for b in bits] for form in (1, 2)], np.float32)
    with np.errstate(invalid="ignore"):  # of signalling NaNs, which some processors tell of
        exact = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(widened[0], exact)
    np.testing.assert_array_equal(widened[1], (bits.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("mode", ["grid", "polynomial"])
@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("sigma_src", [1.0, np.array([1.0, 0.4])])
@pytest.mark.skipif(find_fused_isa() is None, reason="no CPU kernel with fused multiply-add to compare with")
def test_a_dx_rollout_is_the_cpu_kernels_to_the_bit(gpu_on_host, mode, offset, sigma_src):
    case = dx_case(3, N=6, C=3, size=(11, 13), sigma_src=sigma_src, mode=mode)
    policy, sigmas = DXPolicy(**case), levels(sigma_src, 0.0 * np.asarray(sigma_src), 64)
    x_start = case["x_src"] + np.float32(offset) if offset else policy.x_src
    x_dst = np.empty_like(x_start)
    arrays = (OnHost(array) for array in (policy.grid, policy.x_src, x_start, x_dst))
    cuda.dx_rollout(*arrays, policy.rollout_weights(sigmas))
    np.testing.assert_array_equal(x_dst, cpu.rollout(policy, x_start, sigmas, isa=find_fused_isa()))


def test_a_nan_stays_in_its_pixel(gpu_on_host):
    case = gm_case(4)
    clean = carry_gm(GMPolicy(**case), case["x_src"], levels(1.0))
    case["means"][1, 2, 0, 2, 3] = np.nan
    x_end = carry_gm(GMPolicy(**case), case["x_src"], levels(1.0))
    hit = np.zeros(x_end.shape, bool)
    hit[1, :, 2, 3] = True
    assert np.isnan(x_end[hit]).all()
    np.testing.assert_array_equal(x_end[~hit], clean[~hit])


def test_small_images_are_cut_small_enough_for_every_multiprocessor(gpu_on_host):
    for size, shared_by, threads in [((4, 4), 4, 32), ((8, 8), 4, 64), ((12, 8), 4, 128), ((40, 40), 1, 128)]:
        case = gm_case(5, B=1, size=size)
        carry_gm(GMPolicy(**case), case["x_src"], levels(1.0))
        launch = gpu_on_host.launches[-1]
        assert (launch.PIFLOW_LANES, launch.threads) == (shared_by, threads)


@pytest.mark.parametrize("size", [(3, 7), (32, 32), (33, 32)])
def test_an_image_is_the_same_in_every_batch(gpu_on_host, size):
    case, sigmas = gm_case(5, B=3, K=8, C=1, size=size), levels(1.0, substeps=3)
    together = carry_gm(GMPolicy(**case), case["x_src"], sigmas)
    for i in range(3):
        one = {name: a[i : i + 1] if isinstance(a, np.ndarray) else a for name, a in case.items()}
        np.testing.assert_array_equal(together[i : i + 1], carry_gm(GMPolicy(**one), one["x_src"], sigmas))
    assert len({launch.PIFLOW_LANES for launch in gpu_on_host.launches}) == 1


# --- where a pixel's numbers lie


@pytest.mark.parametrize(("K", "C"), [(8, 1), (32, 4), (8, 16)])
def test_the_mixtures_students_have_stay_in_registers(K, C):
    for pixels, shared_by in {8 * 8: 4, 32 * 32: 4, 64 * 64: 1}.items():
        plan = cuda.gm_plan(K, C, pixels, 99 << 10)
        assert (plan.storage, plan.lanes) == (REGISTERS, shared_by)


@pytest.mark.parametrize("shared_bytes", [99 << 10, 163 << 10, 227 << 10])
def test_a_block_never_asks_for_more_shared_memory_than_there_is(shared_bytes):
    for K in range(1, 130, 3):
        for C in (1, 3, 16, 64, 128):
            plan = cuda.gm_plan(K, C, 64 * 64, shared_bytes)
            assert plan.shared_bytes <= shared_bytes
            if plan.storage == SHARED:
                numbers = (K + 3) // 4 * 4 * (C + 3)
                assert plan.shared_bytes == cuda._STEP_BYTES + 4 * numbers * plan.threads
    assert cuda.gm_plan(128, 128, 64 * 64, shared_bytes).storage == LOCAL


# --- compiled for every GPU


MIXTURES = [(8, 1), (32, 4), (8, 16), (32, 16), (64, 32), (16, 512)]


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda-bindings is not installed")
@pytest.mark.parametrize("arch", ARCHS)
def test_nvrtc_compiles_every_storage(arch):
    try:
        storages = set()
        for (K, C), pixels in [*((mixture, 64 * 64) for mixture in MIXTURES), ((8, 1), 8 * 8)]:
            plan = cuda.gm_plan(K, C, pixels, 99 << 10)
            storages.add((plan.storage, plan.lanes))
            code = nvidia.compile_source(arch, plan.defines(K, C))
            assert code.startswith(b"\x7fELF") and b"piflow_gm" in code
        assert storages == {(REGISTERS, 1), (SHARED, 1), (LOCAL, 1), (REGISTERS, 4)}
        assert b"piflow_dx" in nvidia.compile_source(arch, ())
    except EngineError as error:
        if "run-time compiler NVRTC" in str(error):
            pytest.skip("NVRTC is not installed")
        raise


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_keeps_the_mixtures_students_have_in_registers(arch, tmp_path):
    # Which loops are unrolled hardly depends on the GPU: one is given all, the others what is hardest, each of seconds.
    published = [(mixture, 64 * 64) for mixture in MIXTURES[:3]] + [((32, 4), 32 * 32)]
    for (K, C), pixels in [*(published if arch == ARCHS[0] else []), ((8, 16), 32 * 32)]:
        plan = cuda.gm_plan(K, C, pixels, 99 << 10)
        defines = [f"-D{define}" for define in plan.defines(K, C)]
        flags = [*nvidia.OPTIONS, "-Werror", "all-warnings", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
        command = [NVCC, *flags, *defines, nvidia.SOURCE, "-o", tmp_path / "rollout.cubin"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (frame,) = re.findall(r"piflow_gm\n\s*(\d+) bytes stack frame", done.stderr)
        # Some numbers that are read once, at the end, may be spilled; an array that was not unrolled has 4 K C.
        assert int(frame) <= 128, f"K={K}, C={C}: {done.stderr}"


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda-bindings is not installed")
def test_an_unknown_gpu_is_named_with_the_compilers_words():
    with pytest.raises(EngineError, match=r"sm_1 .*newer(?s:.*)gpu-architecture|NVRTC"):
        nvidia.compile_source("sm_1", ())


# --- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(means=np.zeros((2, 5, 3, 5, 6), np.float32)), r"means .*shape"),
        (dict(means=np.zeros((2,), np.float32)), r"means .*shape"),
        (dict(logweights=np.zeros((2, 4, 1, 5, 7), np.float32)), r"logweights .*shape"),
        (dict(x_src=np.zeros((1, 3, 5, 7), np.float32)), r"x_src .*shape"),
        (dict(x_start=np.zeros((2, 3, 5, 7))), r"x_start .*float32, float16, bfloat16"),
        (dict(x_start=np.zeros((2, 3, 5, 7), np.int32)), "x_start must be"),
        (dict(variance=np.ones(3, np.float32)), "one number per sample"),
        (dict(x_dst=np.zeros((2, 3, 5, 7), np.float16)), "x_dst must be float32"),
        (dict(x_dst=np.zeros((0, 3, 5, 7), np.float32)), "none of it 0"),
        (dict(x_dst=np.zeros((2, 3, 7, 5), np.float32).swapaxes(2, 3)), "x_dst must be C-contiguous"),
        (dict(sigmas=np.array([1.0, np.nan])), r"\[0, 1\]"),
        (dict(sigmas=np.array([])), r"\(S \+ 1,\)"),
        (dict(sigmas=np.ones((3, 5))), r"\(S \+ 1,\)"),
        (dict(sigma_src=np.ones(3)), r"sigma_src is"),
        (dict(eps=0.0), "eps is above 0"),
        (dict(eps=float("nan")), "eps is above 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_launch(gpu_on_host, change, words):
    case = gm_case(6)
    arguments = gm_inputs(GMPolicy(**case), case["x_src"]) | dict(x_dst=np.zeros((2, 3, 5, 7), np.float32))
    arguments |= dict(sigmas=levels(1.0), sigma_src=1.0) | change
    for name in (*GM_INPUTS, "x_dst"):
        arguments[name] = OnHost(arguments[name])
    with pytest.raises(PiFlowError, match=words):
        cuda.gm_rollout(**arguments)
    assert not gpu_on_host.launches


def test_weights_of_another_policy_are_refused(gpu_on_host):
    arrays = [OnHost(array) for array in (dx_case(7)["grid"], *(dx_case(7)["x_src"] for _ in range(3)))]
    with pytest.raises(PiFlowError, match="N = 4"):
        cuda.dx_rollout(*arrays, np.ones(5))


def test_arrays_in_host_memory_are_refind_fused_isa():
    case = gm_case(6)
    arrays = gm_inputs(GMPolicy(**case), case["x_src"])
    with pytest.raises(EngineError, match=r"GPU memory; means .*ndarray"):
        cuda.gm_rollout(**arrays, x_dst=np.zeros_like(case["x_src"]), sigmas=levels(1.0), sigma_src=1.0)
    with pytest.raises(EngineError, match="GPU memory"):
        integrate(GMPolicy(**case), case["x_src"], levels(1.0), kernel="cuda")


def test_arrays_on_two_gpus_are_refused(gpu_on_host, monkeypatch):
    case = gm_case(6)
    x_dst = np.zeros_like(case["x_src"])
    monkeypatch.setattr(nvidia, "ordinal_of", lambda pointer: int(pointer == x_dst.ctypes.data))
    arrays = gm_inputs(GMPolicy(**case), case["x_src"]) | dict(x_dst=x_dst)
    with pytest.raises(EngineError, match=r"x_dst .*1, means .*0"):
        cuda.gm_rollout(**{k: OnHost(v) for k, v in arrays.items()}, sigmas=levels(1.0), sigma_src=1.0)


def without_nvidia(blocked):
    """Runs in a fresh interpreter in which `blocked` cannot be imported; prints what `missing` says."""
    code = (
        "import sys\n"
        f"sys.modules[{blocked!r}] = None\n"
        "from piflow_edge.kernels import cuda\n"
        "assert not {'torch', 'cuda'} & set(sys.modules) - {" + repr(blocked) + "}\n"
        "print(cuda.missing())"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_without_nvidias_packages_the_message_says_how_to_get_them():
    assert "pip install cuda-bindings nvidia-cuda-nvrtc" in without_nvidia("cuda")


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda-bindings is not installed")
@pytest.mark.skipif(HAS_GPU, reason="there is a driver")
def test_without_a_driver_the_message_says_so():
    assert "NVIDIA" in cuda.missing()
    with pytest.raises(EngineError, match="needs an NVIDIA"):
        nvidia.ordinal_of(0)


# --- arrays of other libraries


class DLPackOnHost:
    """An array that speaks DLPack only, as ONNX Runtime's, and says that it lies on a GPU."""

    def __init__(self, array):
        self.array, self.streams = array, []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        return self.array.__dlpack__()


def test_dlpack_arrays_are_read_where_they_lie():
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    on_gpu = DLPackOnHost(array)
    found = device_arrays.view("x", on_gpu, 0)
    assert (found.pointer, found.dtype, found.shape) == (array.ctypes.data, "float16", (3, 4))
    assert device_arrays.view("x", on_gpu, 77).ordinal == 0
    assert on_gpu.streams == [1, 77]  # 1 is DLPack's name for CUDA's stream 0
    column = device_arrays.view("x", DLPackOnHost(array[:, 2:3][:1]), 0)  # one number, whatever its strides
    assert column.pointer == array.ctypes.data + 4
    with pytest.raises(PiFlowError, match="C-contiguous"):
        device_arrays.view("x", DLPackOnHost(array.T), 0)
    with pytest.raises(PiFlowError, match=r"float32, float16, bfloat16 .*int64"):
        device_arrays.view("x", DLPackOnHost(np.zeros(3, np.int64)), 0)


@pytest.mark.torch
def test_dlpack_brings_bfloat16():
    torch = pytest.importorskip("torch")
    assert device_arrays.view("x", DLPackOnHost(torch.zeros(3, dtype=torch.bfloat16)), 0).dtype == "bfloat16"


def test_values_still_being_written_on_another_stream_are_waited_for(gpu_on_host):
    array = np.zeros(3, np.float32)
    for theirs, ours in [(None, 0), (None, 5), (1, 0), (5, 5)]:
        device_arrays.view("x", OnHost(array, stream=theirs), ours)
    assert not gpu_on_host.launches
    device_arrays.view("x", OnHost(array, stream=5), 0)
    device_arrays.view("x", OnHost(array, stream=1), 5)
    assert gpu_on_host.launches == ["wait for 5", "wait for 1"]


def test_work_goes_to_the_stream_of_the_result(gpu_on_host):
    case = gm_case(8)
    policy, x_dst = GMPolicy(**case), np.zeros_like(case["x_src"])
    arrays = {name: OnHost(a) for name, a in gm_inputs(policy, case["x_src"]).items()}
    for theirs, asked, expected in [(None, None, 0), (1, None, 0), (9, None, 9), (9, 4, 4)]:
        out = OnHost(x_dst, stream=theirs)
        cuda.gm_rollout(**arrays, x_dst=out, sigmas=levels(1.0), sigma_src=1.0, stream=asked)
        launches = [launch for launch in gpu_on_host.launches if not isinstance(launch, str)]
        assert launches[-1].stream == expected


def test_the_driver_is_called_as_it_wants_to_be(tmp_path):
    # Through NVIDIA's bindings, in a process that takes fake_driver.cpp for CUDA's driver.
    done = run_on_fake_driver(fake_driver(tmp_path), HELPERS / "run_on_fake_driver.py")
    assert done.stdout.split("\n")[:2] == ["launched on stream (nil)", "launched on stream 0x2a"]
    assert "the driver, of CUDA 12.6, cannot load what NVRTC" in done.stdout
    assert "cuda-bindings==12.*" in done.stdout


# --- policies


@pytest.fixture
def torch_on_host(gpu_on_host, monkeypatch):
    """torch, all of whose tensors count as lying on that GPU."""
    torch = pytest.importorskip("torch")
    for module in (device_arrays, cuda):
        monkeypatch.setattr(module, "is_on_gpu", lambda array: isinstance(array, torch.Tensor))
    monkeypatch.setattr(cuda, "stream_of", lambda array: 3)
    monkeypatch.setattr(nvidia, "check_available", lambda: None)
    return torch


def tensors_of(torch, case):
    return {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.ndim > 1 else v for k, v in case.items()
    }


@pytest.mark.torch
@pytest.mark.parametrize("kernel", ["auto", "cuda"])
@pytest.mark.parametrize("make", [lambda: (GMPolicy, gm_case(10)), lambda: (DXPolicy, dx_case(10))])
def test_tensors_on_a_gpu_reach_the_kernel_in_one_launch(torch_on_host, gpu_on_host, make, kernel):
    kind, case = make()
    policy = kind(**tensors_of(torch_on_host, case))
    for x_start in (policy.x_src, policy.x_src.half(), policy.x_src.mT.contiguous().mT):
        gpu_on_host.launches.clear()
        x_end = integrate(policy, x_start, levels(1.0), kernel=kernel)
        (launch,) = gpu_on_host.launches
        assert launch.stream == 3
        assert (x_end.dtype, x_end.shape) == (x_start.dtype, x_start.shape)
        widened = x_start.float().contiguous().numpy()
        expected = cpu.rollout(kind(**case), widened, levels(1.0), isa=find_fused_isa())
        # The result is rounded to the state's format. DX adds two weights up where it starts at the very tensor
        # it came from, and the CPU kernel got a copy.
        rounding = 2**-11 if x_start.dtype == torch_on_host.float16 else 0
        np.testing.assert_allclose(x_end.float().numpy(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda policy, x: (policy, x.double()), "state is in float64"),
        (lambda policy, x: (SimpleNamespace(velocity=None), x), r"GMPolicy and DXPolicy; .*SimpleNamespace"),
        (lambda policy, x: (policy, x.clone().requires_grad_()), "no gradients"),
    ],
)
def test_what_the_kernels_cannot_carry_is_an_error_by_name(torch_on_host, gpu_on_host, change, words):
    case = tensors_of(torch_on_host, gm_case(11))
    policy, x_start = change(GMPolicy(**case), case["x_src"])
    with pytest.raises(EngineError, match=f"kernel 'cuda' cannot run: .*{words}"):
        integrate(policy, x_start, levels(1.0), kernel="cuda")
    double = GMPolicy(**{k: v.double() if hasattr(v, "double") else v for k, v in case.items()})
    with pytest.raises(EngineError, match="float64"):
        integrate(double, case["x_src"], levels(1.0), kernel="cuda")
    assert not gpu_on_host.launches


@pytest.mark.torch
def test_auto_leaves_gradients_to_the_reference(torch_on_host, gpu_on_host):
    case = tensors_of(torch_on_host, gm_case(11))
    case["means"].requires_grad_()
    integrate(GMPolicy(**case), case["x_src"], levels(1.0)).square().sum().backward()
    assert torch_on_host.count_nonzero(case["means"].grad) > 0
    assert not gpu_on_host.launches
    integrate(GMPolicy(**case).detach(), case["x_src"], levels(1.0))
    assert len(gpu_on_host.launches) == 1


@pytest.mark.torch
def test_auto_says_once_what_is_missing_on_a_gpu_and_goes_on(torch_on_host, monkeypatch, caplog):
    def nothing_there():
        raise EngineError("it needs this: pip install that")

    monkeypatch.setattr(nvidia, "check_available", nothing_there)
    case = tensors_of(torch_on_host, gm_case(12))
    policy = GMPolicy(**case)
    cpu.warn_once.cache_clear()
    x_end = [integrate(policy, policy.x_src, levels(1.0)) for _ in range(2)]
    assert torch_on_host.equal(x_end[1], integrate(policy, policy.x_src, levels(1.0), kernel="reference"))
    assert [record.message for record in caplog.records if "pip install that" in record.message]
    assert len(caplog.records) == 1
    with pytest.raises(EngineError, match=r"'cuda' .*: pip install that"):
        integrate(policy, policy.x_src, levels(1.0), kernel="cuda")


# --- the benchmark that runs on a GPU


@pytest.fixture
def gpu_check(monkeypatch):
    pytest.importorskip("torch")
    return importlib.import_module("benchmarks.gpu_check")


@pytest.mark.torch
def test_the_benchmarks_formula_is_the_reference(gpu_check):
    import torch

    rng = np.random.default_rng(0)
    inputs, sigmas, sigma_src = gpu_check.random_gm(rng, torch.device("cpu"))
    inputs = {name: tensor.double() for name, tensor in inputs.items()}
    variance = inputs["variance"] / torch.as_tensor(sigma_src).reshape(inputs["variance"].shape) ** 2
    arrays = (inputs["means"], inputs["logweights"], variance.log() / 2, inputs["x_src"])
    exact = integrate(GMPolicy(*arrays, sigma_src), inputs["x_start"], sigmas, kernel="reference")
    torch.testing.assert_close(gpu_check.gm_exact(inputs, sigmas, sigma_src), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.torch
def test_the_benchmark_tells_a_right_kernel_from_a_wrong_one(gpu_check, torch_on_host, monkeypatch):
    torch, device = torch_on_host, torch_on_host.device("cpu")
    case = {k: v for k, v in tensors_of(torch, gm_case(13, sigma_src=0.8)).items() if k != "sigma_src"}
    variance = torch.exp(2 * case.pop("logstds")) * 0.8**2
    inputs = case | dict(variance=variance, x_start=case["x_src"] + 0.1)
    sigmas, sigma_src = levels(np.full(2, 0.8), np.zeros(2)), np.full(2, 0.8)
    for seed in range(5):
        assert gpu_check.dx_error(np.random.default_rng(seed), device) <= 1
    assert gpu_check.gm_error(inputs, sigmas, sigma_src) <= 1
    right = cuda.gm_rollout

    def wrong(sigmas, **others):
        right(sigmas=sigmas * (1 - 1e-4), **others)

    monkeypatch.setattr(cuda, "gm_rollout", wrong)
    assert gpu_check.gm_error(inputs, sigmas, sigma_src) > 1


@pytest.mark.torch
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_the_benchmark_says_in_one_line_that_there_is_no_gpu():
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpu_check: ") and done.stderr.count("\n") == 1


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@pytest.mark.parametrize(("K", "C"), [(5, 3), (8, 1), (32, 4), (8, 16), (32, 16), (64, 32)])
def test_the_gpu_computes_what_the_reference_does(K, C):
    import torch

    case = gm_case(9, K=K, C=C, size=(17, 19), sigma_src=np.array([1.0, 0.6]))
    sigmas = levels(np.array([1.0, 0.6]), np.array([0.0, 0.2]), 32)
    exact = integrate(GMPolicy(**wide(case)), case["x_src"].astype(np.float64), sigmas, kernel="reference")
    tensors = {k: v if k == "sigma_src" else torch.from_numpy(v).cuda() for k, v in case.items()}
    policy = GMPolicy(**tensors)
    x_end = [integrate(policy, policy.x_src, sigmas, kernel=kernel).cpu() for kernel in ("auto", "cuda")]
    assert torch.equal(*x_end)
    np.testing.assert_allclose(x_end[0].numpy(), exact, rtol=0, atol=1e-4)
    if find_fused_isa() and not takes_gram_form(K, C) and cuda.gm_plan(K, C, 17 * 19, 99 << 10).lanes == 1:
        np.testing.assert_array_equal(
            x_end[0].numpy(), cpu.rollout(GMPolicy(**case), case["x_src"], sigmas, isa=find_fused_isa())
        )


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_gradients_on_a_gpu_go_through_the_reference():
    import torch

    tensors = {k: v if k == "sigma_src" else torch.from_numpy(v).cuda() for k, v in gm_case(9).items()}
    tensors["means"].requires_grad_()
    policy = GMPolicy(**tensors)
    with pytest.raises(PiFlowError, match="gradients"):
        integrate(policy, policy.x_src, levels(1.0), kernel="cuda")
    integrate(policy, policy.x_src, levels(1.0)).square().sum().backward()
    assert torch.count_nonzero(tensors["means"].grad) > 0
