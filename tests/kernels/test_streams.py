"""A missing wait between streams, or between a stream and the host, gives wrong results on the pretended driver.

Each case is right as the code stands, and wrong once one wait is taken out: so a test would find that it is missing.
"""

import pytest

from tests.helpers.pretended_gpu import fake_driver, run_on_fake_driver

LATE, OTHERS_FIRST, IN_TURN = range(3)  # see fake_streams.h

CODE = """
import ctypes, sys
import numpy as np
from piflow_edge.kernels import device_arrays, gpu_arrays as xp, nvidia
from piflow_edge.kernels.gpu_arrays import DeviceArray
from tests.helpers.pretended_gpu import compile_for_fake_driver

order, taken_out = int(sys.argv[1]), sys.argv[2]
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_set_order(order)
nvidia.compile_source = compile_for_fake_driver
whole = {"wait_for": nvidia.wait_for, "after": nvidia.after}
if taken_out:
    setattr(nvidia, taken_out, lambda *arguments: None)
place = xp.place(0)
rng = np.random.default_rng(0)


def copies(ordinal, stream, *pairs):
    for to, source, size in pairs:
        nvidia.copy(ordinal, to, source, size, stream)


def finish(found, expected, stream):
    whole["wait_for"](stream)
    right = bool(np.allclose(found, expected, rtol=0, atol=1e-5))
    sys.exit(0 if right else 3)

"""

# What is copied back is looked at only after the host has waited for it.
TO_HOST = """
x = xp.asarray(np.arange(4, dtype=np.float32), device=place)
found = xp.to_host(x + 1)
sys.exit(0 if np.array_equal(found, [1, 2, 3, 4]) else 3)
"""

# Noise levels are copied to the GPU on the default stream, and read on another.
LEVELS = """
from piflow_edge import GMPolicy
from piflow_edge.kernels import cuda
from tests.helpers.rollout_cases import gm_case, levels
from piflow_edge.integrator import integrate

case, sigmas = gm_case(0, K=5, C=3), levels(1.0)
policy = GMPolicy(**case)
on_gpu = lambda a: DeviceArray(a.ctypes.data, "float32", a.shape, 0, a, place.stream)
arrays = (policy.means, policy.logweights, policy.x_0_variance, policy.x_src, policy.x_src)
x_dst = np.zeros_like(policy.x_src)
cuda.gm_rollout(*map(on_gpu, (*arrays, x_dst)), sigmas, 1.0)
finish(x_dst, integrate(policy, policy.x_src, sigmas), place.stream)
"""

# Another library's array, still being written on its stream, is read by us on ours.
VIEW = """
theirs, back = nvidia.Stream(0), np.zeros(4, np.float32)
memory = nvidia.Memory(0, 16)
array = DeviceArray(memory.pointer, "float32", (4,), 0, memory, theirs.handle)
values = np.arange(4, dtype=np.float32)
nvidia.copy(0, memory.pointer, values.ctypes.data, 16, theirs.handle)
found = device_arrays.view("x", array, place.stream)
nvidia.copy(0, back.ctypes.data, found.pointer, 16, place.stream)
finish(back, values, place.stream)
"""

# Two streams call one engine, whose inputs, scratch and context both use.
ENGINE = """
from tests.helpers import pretended_tensorrt, small_network
pretended_tensorrt.install("10.3.0")
from piflow_edge.engines import EngineOptions, Graph
from piflow_edge.engines.trt import plans as trt_build
from piflow_edge.engines.trt.engine import TensorRTEngine

graph = Graph(small_network.model().SerializeToString())
profile = small_network.profile(1, 2, 4)
plan = trt_build.build_plan(graph, "float32", profile, ordinal=0, workspace=None, timing_cache=None)
engine = TensorRTEngine(graph, "cuda", EngineOptions(), plan=plan)
one, other = nvidia.Stream(0), nvidia.Stream(0)
calls = []
for seed, stream in enumerate((one, other, one, other)):
    given, expected = small_network.inputs(2, seed)
    on_gpu = {
        n: DeviceArray(a.ctypes.data, str(a.dtype), a.shape, 0, a, stream.handle) for n, a in given.items()
    }
    calls.append((engine.run(on_gpu), expected, given))
found, wanted = [], []
for outputs, expected, _ in reversed(calls):
    for name, array in outputs.items():
        whole["wait_for"](array.stream)
        values = (ctypes.c_float * array.size).from_address(array.pointer)
        found += [np.frombuffer(values, np.float32).reshape(array.shape)]
        wanted += [expected[name]]
finish(np.stack(found), np.stack(wanted), one.handle)
"""

CASES = [
    pytest.param(TO_HOST, "wait_for", LATE, id="to_host"),
    pytest.param(LEVELS, "wait_for", LATE, id="noise-levels"),
    pytest.param(VIEW, "wait_for", LATE, id="another-librarys-array"),
    pytest.param(ENGINE, "after", IN_TURN, id="engine-on-two-streams"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_driver(tmp_path_factory.mktemp("driver"))
    return lambda code, *arguments, status=0: run_on_fake_driver(
        folder, "-c", CODE + code, *arguments, code=status
    )


@pytest.mark.parametrize(("code", "wait", "order"), CASES)
def test_a_wait_that_is_taken_out_is_found_out(run, code, wait, order):
    if code == ENGINE:
        pytest.importorskip("onnx", reason="the small network is made with onnx")
    for each in (LATE, OTHERS_FIRST, IN_TURN):
        run(code, each, "")
    run(code, order, wait, status=3)


def test_streams_wait_for_nothing_but_events_and_the_host(run):
    run(
        """
one, other = nvidia.Stream(0), nvidia.Stream(0)
memory, back = nvidia.Memory(0, 4), np.zeros(1, np.float32)
seven, nine = np.float32([7]), np.float32([9])


def read_after_write(wait):
    nvidia.fill(0, memory.pointer, 0, 4, one.handle)
    nvidia.wait_for(one.handle)
    nvidia.copy(0, memory.pointer, seven.ctypes.data, 4, one.handle)
    if wait:
        nvidia.after(0, other.handle, one.handle)
    nvidia.copy(0, back.ctypes.data, memory.pointer, 4, other.handle)
    nvidia.wait_for(other.handle)
    nvidia.wait_for(one.handle)
    return back[0]


def write_after_read(wait):
    nvidia.copy(0, memory.pointer, seven.ctypes.data, 4, one.handle)
    nvidia.wait_for(one.handle)
    nvidia.copy(0, back.ctypes.data, memory.pointer, 4, one.handle)
    if wait:
        nvidia.after(0, other.handle, one.handle)
    nvidia.copy(0, memory.pointer, nine.ctypes.data, 4, other.handle)
    nvidia.wait_for(one.handle)
    nvidia.wait_for(other.handle)
    return back[0]


assert (read_after_write(True), read_after_write(False)) == (7, 0)
fake.fake_set_order(1)
assert (write_after_read(True), write_after_read(False)) == (7, 9)
assert read_after_write(True) == 7
""",
        LATE,
        "",
    )


def test_memory_given_back_while_work_is_queued_stays_until_it_is_done_and_no_longer(run):
    run(
        """
stream, memory, back = nvidia.Stream(0), nvidia.Memory(0, 4), np.zeros(1, np.float32)
at = memory.pointer
nvidia.fill(0, at, 0, 4, stream.handle)
nvidia.copy(0, back.ctypes.data, at, 4, stream.handle)
memory.free()
nvidia.wait_for(stream.handle)
nvidia.copy(0, back.ctypes.data, at, 4, stream.handle)
nvidia.wait_for(stream.handle)
""",
        LATE,
        "",
        status=-11,
    )


def test_memory_that_goes_while_work_is_recorded_is_given_back_afterwards(run):
    # Giving it back at once would spoil the recording; and Python collects circles whenever it likes.
    run(
        """
stream, to = nvidia.Stream(0), nvidia.Memory(0, 4)
circle = [nvidia.Memory(0, 1 << 20)]
circle.append(circle)


def work():
    circle.clear()
    nvidia.fill(0, to.pointer, 1, 4, stream.handle)


recording = nvidia.Recording(0, stream.handle, work)
assert fake.fake_count(0) == 4, fake.fake_count(0)
recording.launch(stream.handle)
nvidia.wait_for(stream.handle)
assert ctypes.string_at(to.pointer, 4) == bytes([1] * 4)
""",
        LATE,
        "",
    )
