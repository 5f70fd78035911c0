"""Arrays on a GPU: arithmetic as NumPy does it, and a generator none of whose arrays leaves it on the way.

There is a GPU in no test: a process has the pretended driver, and in place of ONNX Runtime's CUDA its CPU, which reads
and writes the memory that the pretended GPU shares with it.
"""

import re

import numpy as np
import pytest

from piflow_edge.errors import EngineError
from piflow_edge.kernels import gpu_arrays, nvidia
from tests.helpers.pretended_gpu import HAS_BINDINGS, fake_driver, run_on_fake_driver

CODE = """
import ctypes, logging, sys, time
import numpy as np
from piflow_edge.errors import PiFlowError
from piflow_edge.kernels import gpu_arrays as xp, nvidia

from tests.helpers.pretended_gpu import compile_for_fake_driver

nvidia.compile_source = compile_for_fake_driver
nvidia.check_available = lambda: None
fake = ctypes.CDLL("libcuda.so.1")
COUNTS = "bytes", "streams", "graphs", "waits", "launches", "ins", "outs", "syncs"
counts = lambda: dict(zip(COUNTS, map(fake.fake_count, range(8))))
place = xp.place(0)
rng = np.random.default_rng(0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_driver(tmp_path_factory.mktemp("driver"))
    return lambda code, *arguments: run_on_fake_driver(folder, "-c", CODE + code, *arguments)


def test_arithmetic_is_numpys(run):
    run(
        """
def check(compute, *arrays, exact=True):
    expected = compute(np, *arrays)
    found = compute(xp, *(xp.asarray(array, device=place) for array in arrays))
    assert found.shape == expected.shape and found.dtype == str(expected.dtype), (found, expected.shape)
    np.testing.assert_allclose(xp.to_host(found), expected, rtol=0 if exact else 1e-6, atol=0)


x = rng.standard_normal((2, 3, 4, 5, 6), dtype=np.float32)
y = rng.standard_normal((2, 1, 4, 1, 6), dtype=np.float32)
special = np.array([np.nan, np.inf, -np.inf, 0.5, 1.5, -2.5], np.float32)
for compute in (
    lambda np, x, y: x + y, lambda np, x, y: x - y, lambda np, x, y: x * y, lambda np, x, y: x / y,
    lambda np, x, y: 2 - x, lambda np, x, y: 1 + x * 3 - 0.5, lambda np, x, y: x**2,
    lambda np, x, y: np.max(x, axis=1, keepdims=True), lambda np, x, y: np.max(x, axis=-1),
    lambda np, x, y: np.permute_dims(x, (0, 2, 3, 4, 1)), lambda np, x, y: np.expand_dims(x, axis=1),
    lambda np, x, y: np.squeeze(y, axis=1), lambda np, x, y: np.reshape(x, (6, -1)), lambda np, x, y: x[1:2],
    lambda np, x, y: np.clip(x, min=0.1), lambda np, x, y: np.clip(x, -0.5, 0.5),
):
    check(compute, x, y)
check(lambda np, x: np.exp(x), x, exact=False)
check(lambda np, x: np.sum(x, axis=2), x, exact=False)
check(lambda np, s: np.round(s), special)
check(lambda np, s: np.clip(s, 0, 1), special)
check(lambda np, s: np.max(np.reshape(s, (1, 6)), axis=1), special)
check(lambda np, s: np.astype(np.round(s), np.uint8), np.array([0.4, 254.6, 3.5], np.float32))

from piflow_edge.runtime.images import decode

for odd in (np.nan, np.inf, -np.inf, 3e38, 0):
    for place_of_it in ((0, 0, 0, 0), (1, 2, 3, 4)):
        numbers = np.full((2, 3, 4, 5), 3e38, np.float32)  # whose sum is infinite, and not theirs
        numbers[place_of_it] = odd
        expected = bool(np.isfinite(odd))
        assert xp.all_finite(numbers) == xp.all_finite(xp.asarray(numbers, device=place)) == expected, odd

latents = rng.standard_normal((2, 3, 4, 5), dtype=np.float32)
np.testing.assert_array_equal(decode(xp.asarray(latents, device=place)), decode(latents))

for mistake, words in [
    (lambda x: x + xp.reshape(x, (3, 2, 4, 5, 6)), "do not go together"),
    (lambda x: xp.reshape(x, (7, -1)), "cannot become"),
    (lambda x: xp.squeeze(x, axis=0), "not of length 1"),
    (lambda x: x[::2], "one after the other"),
    (lambda x: xp.astype(x, "int64"), "float32 or uint8"),
    (lambda x: xp.asarray(np.arange(3), device=place) + 1, "float32"),
]:
    try:
        mistake(xp.asarray(x, device=place))
    except PiFlowError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
"""
    )


def test_memory_is_used_again_and_given_back(run):
    run(
        """
x = xp.asarray(np.ones((4, 4), np.float32), device=place)
y = x + 1
before = counts()["bytes"]
for _ in range(10):
    y = y * 2
assert counts()["bytes"] <= before + 64, counts()
pointer = y.pointer
del x, y
xp.release(0)
assert counts()["bytes"] == 0, counts()
"""
    )


def test_an_array_may_be_collected_where_memory_is_handed_out(run):
    run(
        """
x, y = (xp.empty((1 << 10,), device=place) for _ in range(2))
pointers = {x.pointer, y.pointer}
with xp._lock:  # Python collects cycles wherever a thread happens to be
    del x, y
assert {xp.empty((1 << 10,), device=place).pointer} < pointers
xp._MOST_KEPT = 4 << 10
before = counts()["bytes"]
big = xp.empty((1 << 12,), device=place)
del big
assert counts()["bytes"] < before, counts()
"""
    )


def test_memory_that_nobody_uses_is_given_back_before_there_is_too_little(run):
    run(
        """
unused = xp.empty((200 << 18,), device=place)
del unused
assert counts()["bytes"] >= 200 << 20
x = xp.empty((900 << 18,), device=place)  # of 1 GiB
try:
    xp.empty((200 << 18,), device=place)
except PiFlowError as error:
    assert "use smaller batches" in str(error), error
else:
    raise AssertionError("there was not as much")
"""
    )


def test_policies_run_there_as_they_stand(run):
    run(
        """
from piflow_edge import DXPolicy, GMPolicy
from piflow_edge.kernels.rollout import integrate

def gm(K, C):
    shapes = (2, K, C, 3, 5), (2, K, 1, 3, 5), (2, 1, 1, 1, 1), (2, C, 3, 5)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]

sigmas = np.linspace(1.0, 0.25, 9)
for K, C in [(5, 3), (8, 1)]:
    arrays = gm(K, C)
    there = [xp.asarray(array, device=place) for array in arrays]
    ours, theirs = GMPolicy(*there, 1.0).temper(0.5), GMPolicy(*arrays, 1.0).temper(0.5)
    for level in (1.0, 0.4):
        velocity = xp.to_host(ours.velocity(there[-1], level))
        np.testing.assert_allclose(velocity, theirs.velocity(arrays[-1], level), rtol=0, atol=2e-5)
    expected = integrate(theirs, arrays[-1], sigmas, kernel="reference")
    for kernel in ("reference", "cuda", "auto"):
        x_end = integrate(ours, there[-1], sigmas, kernel=kernel)
        np.testing.assert_allclose(xp.to_host(x_end), expected, rtol=0, atol=5e-5)
grid, x_src = (rng.standard_normal((2, *shape, 3, 5), dtype=np.float32) for shape in [(4, 1), (1,)])
settings = dict(segment_size=1.0)
expected = DXPolicy(grid, x_src, 1.0, **settings).velocity(x_src, np.array([1.0, 0.5]))
there = [xp.asarray(array, device=place) for array in (grid, x_src)]
found = DXPolicy(*there, 1.0, **settings).velocity(there[1], np.array([1.0, 0.5]))
np.testing.assert_allclose(xp.to_host(found), expected, rtol=0, atol=2e-5)
"""
    )


GENERATOR = """
import piflow_edge as pf
from piflow_edge.engines.ort import cuda_sessions as ort_cuda

class OnHost(ort_cuda.OrtCUDA):
    provider, memory = "CPUExecutionProvider", "cpu"
    _provider_options = lambda self, graph: {}

ort_cuda.OrtCUDA = OnHost
assert callable(OnHost.opener(None, "cuda", None))
bundle = sys.argv[1]
expected = pf.load(bundle, engine="ort-cpu")
on_the_cpu, outputs = sys.modules["onnxruntime"].InferenceSession.run_with_iobinding, []
recorded, runs = {}, []

def run_on_our_stream(self, binding, options):  # there it queues, and waits for the stream of its own accord
    fake.fake_finish(ctypes.c_void_p(place.stream))
    number = -1 if options is None else int(options.get_run_config_entry("gpu_graph_id"))
    runs.append(number)
    if number > 0:  # a graph has the addresses of the call that was recorded, whatever is bound later
        binding = recorded.setdefault((self, number), binding)
    on_the_cpu(self, binding)
    if number < 0:
        outputs.extend(binding.get_outputs())  # memory that a GPU's arena would not hand out before the stream is done

sys.modules["onnxruntime"].InferenceSession.run_with_iobinding = run_on_our_stream
generator = pf.load(bundle, engine="ort-cuda")
arguments = dict(labels=[3, 7, 1], seed=5, temperature=0.5)
theirs = expected(**arguments, output="numpy")
for image in range(5):
    before, runs[:] = counts(), []
    ours = generator(**arguments, output="numpy")
    moved = {name: counts()[name] - before[name] for name in ("ins", "outs", "bytes", "syncs")}
    # The student is called twice per image, the decoder once: the first calls as they come, then as recorded.
    assert runs == [[-1, 1, -1], [1, 1, 1]][image > 0], (image, runs)
assert (ours.engine, ours.device) == ("ort-cuda", "cuda")
# An option that left calls unsynchronised ended processes on an H100 with signal 6.
calls = generator.engine._recorded._recorded.values()
for options in (generator.engine._run_options, *(call.options for call in calls)):
    try:
        options.get_run_config_entry("disable_synchronize_execution_providers")
        raise AssertionError("calls are not synchronised")
    except RuntimeError:
        pass
np.testing.assert_allclose(ours.latents, theirs.latents, rtol=0, atol=1e-4)
assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
# The noise goes there; image, latents and whether all is finite come back. Noise levels and labels are there already.
# Each of these copies is waited for, and nothing else.
assert moved == {"ins": 1, "outs": 3, "bytes": 0, "syncs": 4}, moved
assert theirs.timings["transfer"] == 0 < ours.timings["transfer"]

# Asked for, the wait is at the end of every stage, and of its time.
wait_for, queued = nvidia.wait_for, []

def slow(stream):
    assert stream == place.stream
    queued.append(stream)
    time.sleep(0.02)
    wait_for(stream)

nvidia.wait_for = slow
staged = generator(**arguments, output="numpy", synchronize=True).timings
nvidia.wait_for = wait_for
# Noise, 2 calls, 2 policies, the decoder which asks whether all is finite, 3 copies which wait once more themselves,
# the total.
assert len(queued) == 1 + 2 + 2 + 2 + 2 * 3 + 1, len(queued)
for stage, waits in {"noise": 1, "network": 2, "policy": 2, "decode": 2, "transfer": 6}.items():
    assert staged[stage] >= 20 * waits, staged
again = generator(**arguments, output="float", h=0.5)
there = expected(**arguments, output="float", h=0.5)
np.testing.assert_allclose(again.images, there.images, rtol=0, atol=1e-4)

from piflow_edge.bench.benchmark import bench
from piflow_edge.bench.config import BenchConfig
from piflow_edge.conditioning import ConditionRequest
calls, call = [], pf.Generator.__call__

def noted(self, *arguments, synchronize=False, **more):
    calls.append((self.engine.name, synchronize))
    return call(self, *arguments, synchronize=synchronize, **more)

pf.Generator.__call__ = noted
config = BenchConfig(engines=["ort-cuda", "ort-cpu"], rounds=3, warmup=1, cold_starts=0)
rows = bench([bundle], config).rows
# A GPU's split comes from rounds of its own, which wait; its latency from those that do not.
assert sorted(calls) == sorted(2 * 2 * [("ort-cuda", False), ("ort-cpu", False)] + 3 * [("ort-cuda", True)])
assert [row.split["transfer"] > 0 for row in rows] == [True, False] and [len(row.rounds) for row in rows] == [3, 3]
pf.Generator.__call__ = call
seen = []
generator(**arguments, callback=lambda done: seen.append((type(done.x_t), type(done.x_0))))
assert seen == [(np.ndarray, np.ndarray)] * 2
STEERED = generator.conditioner.encode(ConditionRequest(labels=[1, 2, 3]))
network = generator.engine.run(generator.student.inputs(xp.asarray(theirs.latents, device=place), 0.5, STEERED))
assert all(value.stream == place.stream for value in network.values())
decode = generator.decoder.run
generator.decoder.run = lambda inputs: {name: value / 0 for name, value in decode(inputs).items()}
for output in ("pil", "numpy", "float"):
    try:
        generator(**arguments, output=output)
        raise AssertionError("an image of infinity")
    except PiFlowError as error:
        assert "the decoder of bundle 'bundle' in fp32 on ort-cuda made NaN or infinity" in str(error), error
assert np.isfinite(generator(**arguments, output="latent").latents).all()
plain = generator.engine.run(generator.student.inputs(theirs.latents, 0.5, STEERED))
for name, value in plain.items():
    np.testing.assert_array_equal(xp.to_host(network[name]), value)

class Built(ort_cuda.OrtTensorRT):  # for 4 to 8 samples, and asked for 3
    provider, memory = "CPUExecutionProvider", "cpu"
    _provider_options = lambda self, graph: {}

from piflow_edge.runtime.graphs import read_graph
graph = read_graph(generator.bundle, "student", "fp32")
built = Built(graph, "cuda", pf.EngineOptions(), plan=graph.model, profile="4:4:8")
filled = built.run(generator.student.inputs(xp.asarray(theirs.latents, device=place), 0.5, STEERED))
for name, value in plain.items():
    assert filled[name].shape == value.shape and filled[name].stream == place.stream
    np.testing.assert_allclose(xp.to_host(filled[name]), value, rtol=0, atol=1e-5)
generator.close()
try:
    generator.engine.run({"x_t": xp.asarray(theirs.latents, device=place)})
    raise AssertionError("closed, and runs")
except PiFlowError as error:
    assert "closed" in str(error)
"""

UNRECORDED = """
import piflow_edge as pf
from piflow_edge.engines.ort import cuda_sessions as ort_cuda
from piflow_edge.engines.ort.importing import import_onnxruntime

ort, asked, told, outputs = import_onnxruntime(), [], [], []
of_the_cpu = ort.InferenceSession

class Session(of_the_cpu):
    # Of a provider that takes no graphs of this network, or fails while it records one.
    takes_graphs = False

    def __init__(self, model, settings, *, providers, enable_fallback):
        ((_, options),) = providers
        asked.append("enable_cuda_graph" in options)
        if asked[-1] and not self.takes_graphs:
            raise RuntimeError("This session cannot use the graph capture feature")
        super().__init__(model, settings, providers=["CPUExecutionProvider"])

    def run_with_iobinding(self, binding, options):
        fake.fake_finish(ctypes.c_void_p(place.stream))
        if options is not None and options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("CUDA failure 900")
        super().run_with_iobinding(binding)
        outputs.extend(binding.get_outputs())  # as above

class OnHost(ort_cuda.OrtCUDA):
    provider, memory = "CPUExecutionProvider", "cpu"

class Handler(logging.Handler):
    emit = lambda self, record: told.append(record.getMessage())

logging.getLogger("piflow_edge").addHandler(Handler())
ort.InferenceSession, ort_cuda.OrtCUDA = Session, OnHost
expected = pf.load(sys.argv[1], engine="reference")([3, 7], seed=5, output="latent").latents
for Session.takes_graphs, opened, words in ((False, [True, False] * 2, "capture"), (True, [True] * 2, "900")):
    asked.clear(), told.clear()
    with pf.load(sys.argv[1], engine="ort-cuda") as generator:
        for _ in range(3):
            found = generator([3, 7], seed=5, output="latent").latents
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert asked == opened, asked
    assert len([line for line in told if "without CUDA graphs" in line and words in line]) == 1, told
"""

TENSORRT = """
import piflow_edge as pf
from tests.helpers import pretended_tensorrt
from piflow_edge.bundle.folder import Bundle
from piflow_edge.engines.building import steps as building
from piflow_edge.runtime.graphs import find_targets

pretended_tensorrt.install("10.3.0")
settings = building.BuildSettings(batch=building.Batch(1, 1, 4))
for target in find_targets(Bundle(sys.argv[1])):
    building.build(building.plan(target, settings), settings)
arguments = dict(labels=[3, 7, 1], seed=5, temperature=0.5, output="numpy")
theirs = pf.load(sys.argv[1], engine="ort-cpu")(**arguments)
with pf.load(sys.argv[1], engine="tensorrt") as generator:
    for image in range(4):
        before = counts()
        ours = generator(**arguments)
        assert (ours.engine, ours.device) == ("tensorrt", "cuda")
        np.testing.assert_allclose(ours.latents, theirs.latents, rtol=0, atol=1e-4)
        assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
    moved = {name: counts()[name] - before[name] for name in COUNTS}
    # Once recorded, an image is one launch, copies included, and one wait.
    assert moved == dict.fromkeys(COUNTS, 0) | {"launches": 1, "syncs": 1}, moved
    # With somebody who looks on it is two replays of the student and one of the decoder, and nothing new is taken.
    # Beside the noise, times and labels go there, a few bytes; image, latents and whether all is finite come back.
    for image in range(4):
        before = counts()
        generator(**arguments, synchronize=True)
    moved = {name: counts()[name] - before[name] for name in COUNTS}
    assert (moved["launches"], moved["outs"], moved["bytes"], moved["graphs"]) == (3, 3, 0, 0), moved
assert counts()["graphs"] == 0

# Engines for no fewer than 4: 10 images are made 5 at a time, 1 as one of 4; and checks ask for batches of 1.
from piflow_edge.runtime.verification import check, verify
settings = building.BuildSettings(batch=building.Batch(4, 4, 8))
for target in find_targets(Bundle(sys.argv[1])):
    building.build(building.plan(target, settings), settings)
with pf.load(sys.argv[1], engine="ort-cpu") as plain, pf.load(sys.argv[1], engine="tensorrt") as generator:
    assert (generator.engine.min_batch, generator.decoder.min_batch) == (4, 4)
    for count in (10, 1):
        arguments = dict(labels=list(range(count)), output="numpy")
        ours, theirs = generator(**arguments), plain(**arguments)
        np.testing.assert_allclose(ours.latents, theirs.latents, rtol=0, atol=1e-4)
        assert np.abs(ours.images.astype(int) - theirs.images).max() <= 1
    check(verify(generator), "small")
"""


RECORDED = """
import threading
import piflow_edge as pf
from piflow_edge.errors import Cancelled
from piflow_edge.runtime.drawing import recorded
from tests.helpers import pretended_tensorrt
from piflow_edge.bundle.folder import Bundle
from piflow_edge.engines.building import steps as building
from piflow_edge.runtime.graphs import find_targets

told = []
logging.getLogger("piflow_edge").addHandler(handler := logging.Handler())
handler.emit = lambda record: told.append(record.getMessage())
pretended_tensorrt.install("10.3.0")
settings = building.BuildSettings(batch=building.Batch(1, 1, 4))
for target in find_targets(Bundle(sys.argv[1])):
    building.build(building.plan(target, settings), settings)
plain, generator = (pf.load(sys.argv[1], engine=engine) for engine in ("ort-cpu", "tensorrt"))
graphs = generator._graphs._graphs


def check(launches=None, **arguments):
    before = counts()["launches"]
    ours, theirs = (one(**arguments) for one in (generator, plain))
    assert launches is None or counts()["launches"] - before == launches, (launches, before, counts())
    np.testing.assert_allclose(ours.latents, theirs.latents, rtol=0, atol=1e-4)
    if arguments["output"] != "latent":
        np.testing.assert_allclose(ours.images, theirs.images, rtol=0, atol=1 if ours.images.dtype == "uint8" else 1e-4)
    return ours


# Every order of work between streams gives the same, whatever changes from image to image.
for order in range(3):
    fake.fake_set_order(order)
    for seed, labels in enumerate(([3, 7, 1], [0, 0, 9], [2, 5, 5])):
        check(labels=labels, seed=seed, output="numpy", launches=1 if order or seed > 1 else None)
fake.fake_set_order(0)
assert len(graphs) == 1
from piflow_edge.runtime.drawing.recorded_memory import estimate_recorded_memory
for seed in range(2):
    generator(labels=[1, 2, 3, 4], seed=seed, output="numpy")  # as many as the engine takes: none is added inside
*_, graph = graphs.values()
assert graph.memory == estimate_recorded_memory(generator.bundle.manifest, 4), graph.memory
for output in ("float", "latent"):
    for seed in range(3):
        check(labels=[1, 2], seed=seed, output=output, temperature=0.3)
assert len(graphs) == 4

# Nothing is computed between network and rollout but in the kernel of the rollout.
before = fake.fake_count(8), fake.fake_count(9)
generator(labels=[1, 2], output="latent", temperature=0.3, synchronize=True)
assert (fake.fake_count(8) - before[0], fake.fake_count(9) - before[1]) == (0, 2)

# A result is the caller's own.
one, other = (generator(labels=[3, 7, 1], seed=seed, output="numpy") for seed in (0, 1))
assert not np.array_equal(one.latents, other.latents)
np.testing.assert_allclose(one.latents, plain(labels=[3, 7, 1], output="latent").latents, rtol=0, atol=1e-4)

# Only so many are kept, and their memory is given back.
held = []
for count in range(1, 5):
    for substeps in (3, 4):
        for seed in range(2):
            check(labels=list(range(count)), seed=seed, output="numpy", substeps=substeps)
    held.append(counts()["bytes"])
assert len(graphs) == recorded.MOST_GRAPHS and held[-1] < 2 * held[0], held

# Who looks on or stops cuts an image at its calls; noise between calls and masks are not recorded.
seen = []
for seed in range(3):
    check(labels=[1], seed=seed, output="numpy", callback=lambda done: seen.append(done.call), launches=None)
assert seen == [1, 2] * 6
stop = threading.Event()
stop.set()
for one in (generator, plain):
    try:
        one(labels=[1], cancel=stop)
        raise AssertionError("went on")
    except Cancelled:
        pass
for seed in range(3):
    check(labels=[1], seed=seed, output="numpy", h=0.5)
    check(labels=[1], seed=seed, output="numpy", image=np.zeros((2, 8, 8), np.float32), strength=0.4)

# Several threads at a time, some recorded and some not.
wrong = []


def work(seed):
    try:
        for n in range(4):
            check(labels=[seed % 10, n], seed=seed + n, output="numpy", h=[0, 0.5][seed % 2])
    except BaseException as error:
        wrong.append(error)


threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong

# A recorded image never comes between another call's copies of inputs and its kernels: they share that memory.
meanwhile = []
bring = generator.engine._bring


def bring_and_wait(*what):
    bring(*what)
    if threading.current_thread() is threading.main_thread() and not meanwhile:
        meanwhile.append(thread := threading.Thread(target=work, args=(2,)))  # whose images are recorded
        thread.start()
        thread.join(0.5)


generator.engine._bring = bring_and_wait
check(labels=[2, 0], seed=9, output="numpy", h=0.5)
meanwhile[0].join()
generator.engine._bring = bring
assert not wrong, wrong

# What an image takes of the interpreter, without what the pretended TensorRT does when the GPU's turn comes.
calls, inside = 0, 0


def count_calls(frame, event, argument):
    global calls, inside
    if frame.f_code is pretended_tensorrt._run.__code__:
        inside += {"call": 1, "return": -1}.get(event, 0)
    elif event == "call" and not inside:
        calls += 1


arguments = dict(labels=[3, 7, 1], output="numpy")
for seed in range(2):
    generator(**arguments, seed=seed)
sys.setprofile(count_calls)
generator(**arguments, seed=5)
sys.setprofile(None)
assert calls <= 300, calls

# An infinite image is an error here too.
decode = generator.decoder.run
generator.decoder.run = lambda inputs: {name: value / 0 for name, value in decode(inputs).items()}
for seed in range(3):
    try:
        generator(labels=[4], seed=seed, output="float", substeps=5)
        raise AssertionError("an image of infinity")
    except PiFlowError as error:
        assert "the decoder of bundle" in str(error) and "made NaN or infinity" in str(error), error
generator.decoder.run = decode
generator.close()
assert counts()["graphs"] == 0 and not any("call by call" in words for words in told), told

# What cannot be recorded runs call by call, and that is said once.
whole = nvidia.Recording.__init__


def broken(self, ordinal, stream, work):
    def fails():
        work()
        fake.fake_invalidate(ctypes.c_void_p(stream))
    whole(self, ordinal, stream, fails)


nvidia.Recording.__init__ = broken
with pf.load(sys.argv[1], engine="tensorrt") as generator:
    for seed in range(4):
        check(labels=[1, 2], seed=seed, output="numpy", launches=0)
assert sum("images are queued call by call" in words for words in told) == 1, told
"""


@pytest.mark.torch
def test_nothing_crosses_the_bus_between_noise_and_image(run, tmp_path):
    pytest.importorskip("diffusers", reason="autoencoders need the 'diffusers' extra")
    from piflow_edge.distill.data.autoencoder import load_autoencoder
    from piflow_edge.export.to_bundle import export_bundle
    from piflow_edge.policies import GMPolicySpec
    from tests.conftest import make_autoencoder, make_student

    # A mixture that the pretended driver has compiled: 3 components of 2 channels.
    folder = make_autoencoder("AutoencoderTiny", tmp_path / "autoencoder", latent_channels=2)
    autoencoder = load_autoencoder(folder)
    student = make_student(head=GMPolicySpec(3), latent=vars(autoencoder.latent), in_channels=2)
    export_bundle(student, tmp_path / "bundle", autoencoder=autoencoder)
    run(GENERATOR, tmp_path / "bundle")
    run(UNRECORDED, tmp_path / "bundle")
    pytest.importorskip("filelock")
    run(TENSORRT, tmp_path / "bundle")
    run(RECORDED, tmp_path / "bundle")


@pytest.mark.skipif(not HAS_BINDINGS, reason="cuda-bindings is not installed")
@pytest.mark.parametrize("arch", ["sm_87", "sm_90", "sm_120"])
def test_nvrtc_compiles_the_arithmetic(arch):
    try:
        code = nvidia.compile_source(arch, (), gpu_arrays.SOURCE)
    except EngineError as error:
        if re.search("needs NVIDIA|newer one may", str(error)):
            pytest.skip(str(error).splitlines()[0])
        raise
    assert b"piflow_elementwise" in code and b"piflow_reduce" in code


def test_a_gpu_without_our_kernels_is_said_to_be_slow(monkeypatch, caplog):
    monkeypatch.setattr(gpu_arrays.nvidia, "missing", lambda: "it lacks NVRTC")
    gpu_arrays.place_of.cache_clear()
    assert gpu_arrays.place_of("cuda") is None and gpu_arrays.place_of("cpu") is None
    assert "cross the bus" in caplog.text and "lacks NVRTC" in caplog.text
    gpu_arrays.place_of.cache_clear()


def test_numpy_arrays_pass_through():
    array = np.arange(3)
    assert gpu_arrays.to_host(array) is array
