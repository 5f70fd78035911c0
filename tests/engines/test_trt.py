"""The native TensorRT engine: every call to the library and to the driver, where there is neither.

The driver is fake_driver.cpp, TensorRT the stand-in of pretended_tensorrt.py: memory is the host's and ONNX Runtime
computes, but addresses, streams, recordings and what is given back are real.
"""

import json

import pytest

from tests.helpers.pretended_gpu import ROOT, fake_driver, run_on_fake_driver
from tests.helpers.pretended_tensorrt import START

pytest.importorskip("onnx", reason="the small network is made with onnx")
pytest.importorskip("filelock")

SETUP = """
import ctypes, gc, sys, threading
import numpy as np
from tests.helpers import pretended_tensorrt, small_network
trt = pretended_tensorrt.install({release!r})
from piflow_edge.engines import EngineOptions, Graph, open_engine
from piflow_edge.engines.building import steps as building
from piflow_edge.engines.trt import plans as trt_build
from piflow_edge.engines.trt.engine import TensorRTEngine
from piflow_edge.errors import EngineError, EngineNotBuiltError, PiFlowError
from piflow_edge.kernels import nvidia
from piflow_edge.kernels.gpu_arrays import DeviceArray

fake = ctypes.CDLL("libcuda.so.1")
count = lambda what: fake.fake_count(["bytes", "streams", "graphs", "waits", "launches"].index(what))
runs = lambda: pretended_tensorrt.COUNTS["runs"]
graph = Graph(small_network.model().SerializeToString(), source="bundles/small --precision fp32")


def opened(least=1, best=2, most=4):
    plan = trt_build.build_plan(graph, "float32", small_network.profile(least, best, most), ordinal=0, workspace=None,
                                timing_cache=None)
    return TensorRTEngine(graph, "cuda", EngineOptions(), plan=plan)


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)


def refused(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError("nothing was refused")


class OnGpu:
    # Another library's array; the pretended GPU's memory is the host's.
    def __init__(self, array, stream=None):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": stream}


def seen(array):
    nvidia.wait_for(array.stream)
    interface = array.__cuda_array_interface__
    count = int(np.prod(interface["shape"]))
    buffer = (ctypes.c_float * count).from_address(interface["data"][0])
    return np.frombuffer(buffer, np.float32).reshape(interface["shape"])

"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def run(driver):
    def run(code, release="10.3.0"):
        return run_on_fake_driver(driver, "-c", SETUP.replace("{release!r}", repr(release)) + code)

    return run


@pytest.mark.parametrize("release", ["8.5.3.1", "8.6.1", "10.0.1", "10.3.0", "11.4.0.106"])
def test_every_batch_is_right_before_while_and_after_it_is_recorded(run, release):
    run(
        """
engine = opened()
assert (engine.name, engine.device, engine.min_batch, engine.max_batch) == ("tensorrt", "cuda", 1, 4)
for seed, batch in enumerate((1, 1, 4, 1, 4, 4, 3)):
    given, expected = small_network.inputs(batch, seed)
    check(engine.run(given), expected)
assert runs() == 7
# Batches 1 and 4 were recorded when they came again, 3 came once. Where one context at a time may use the profile, a
# batch is recorded when it comes twice in a row.
alone = engine._api.profile_sharing == "never"
assert (count("graphs"), count("launches")) == ((0, 2) if alone else (2, 4))
""",
        release,
    )


def test_arrays_on_the_gpu_come_back_there_on_the_callers_stream_and_keep_their_values(run):
    run(
        """
engine = opened()
stream = nvidia.Stream(0)
kept = []
for seed in range(5):
    given, expected = small_network.inputs(2, seed)
    for names in (("x_t",), tuple(given)):  # the others stay NumPy arrays
        inputs = {name: OnGpu(a, stream.handle) if name in names else a for name, a in given.items()}
        found = engine.run(inputs)
        assert all(type(a) is DeviceArray and a.stream == stream.handle for a in found.values())
        check({name: seen(array) for name, array in found.items()}, expected)
    kept.append((found, expected))
for found, expected in kept:  # none was written over
    check({name: seen(array) for name, array in found.items()}, expected)
held = count("bytes")
del kept, found, array, a
""".replace("del kept, found, array, a", "del kept, found\ngc.collect()")
        + """
given, expected = small_network.inputs(2)
for _ in range(8):
    check({n: seen(a) for n, a in engine.run({n: OnGpu(a, stream.handle) for n, a in given.items()}).items()}, expected)
assert count("bytes") == held  # memory taken once is used again
"""
    )


def test_a_stream_waits_for_the_call_before_on_another(run):
    run(
        """
engine = opened()
one, other = nvidia.Stream(0), nvidia.Stream(0)
given, _ = small_network.inputs(1)
engine.run({n: OnGpu(a, one.handle) for n, a in given.items()})
before = count("waits")
engine.run({n: OnGpu(a, other.handle) for n, a in given.items()})
assert count("waits") == before + 2  # for what was there, and to be waited for
"""
    )


def test_what_does_not_fit_is_refused_in_words(run):
    run(
        """
engine = opened(2, 2, 4)
given, expected = small_network.inputs(2)
refused(EngineError, "built for batches of 2 to 4; got 5: split it, or build with --batch 2:5:5",
        lambda: engine.run(small_network.inputs(5)[0]))
refused(PiFlowError, "one sample or more", lambda: engine.run(small_network.inputs(0)[0]))
refused(PiFlowError, "the network takes class_labels, t, x_t; got t", lambda: engine.run({"t": given["t"]}))
refused(PiFlowError, "x_t must be (batch, 2, 3); got (2, 3, 2)",
        lambda: engine.run(given | {"x_t": np.zeros((2, 3, 2), np.float32)}))
refused(PiFlowError, "x_t must be float32; got float64", lambda: engine.run(given | {"x_t": np.zeros((2, 2, 3))}))
refused(PiFlowError, "inputs of one call have the same batch",
        lambda: engine.run(given | {"t": np.ones(3, np.float32)}))
refused(PiFlowError, "x_t must be C-contiguous on a GPU",
        lambda: engine.run(given | {"x_t": OnGpu(np.zeros((2, 3, 2), np.float32).transpose(0, 2, 1))}))
check(engine.run(given), expected)
"""
    )


def test_fewer_samples_than_an_engine_takes_are_filled_up_and_give_what_was_asked_for(run):
    run(
        """
engine = opened(4, 4, 8)
assert (engine.min_batch, engine.max_batch) == (4, 8)
stream = nvidia.Stream(0)
for batch in (1, 3, 4, 1, 8):
    given, expected = small_network.inputs(batch, seed=batch)
    check(engine.run(given), expected)
    for names in (("x_t",), tuple(given)):
        found = engine.run({n: OnGpu(a, stream.handle) if n in names else a for n, a in given.items()})
        assert all(type(a) is DeviceArray and a.stream == stream.handle for a in found.values())
        check({name: seen(array) for name, array in found.items()}, expected)
assert {shapes[0][0] for shapes, _ in engine._calls} == {4, 8}
"""
    )


def test_a_failure_tells_of_itself_alone(run):
    run(
        """
from types import SimpleNamespace
engine = opened()
given, _ = small_network.inputs(2)
say = lambda words: engine._log.log(SimpleNamespace(name="ERROR"), words)
say("of a call that went well")
trt_build.trt_versions.create_context = lambda *arguments: say("no memory")
for _ in range(2):
    try:
        engine.run(given)
    except EngineError as error:
        assert str(error) == "TensorRT cannot prepare a call of 2: no memory", error
    else:
        raise AssertionError("it ran")
"""
    )


def test_class_ids_become_int32_where_tensorrt_has_no_int64(run):
    run(
        """
engine = opened()
given, expected = small_network.inputs(2)
check(engine.run(given), expected)
refused(PiFlowError, "class_labels must fit into int32",
        lambda: engine.run(given | {"class_labels": np.array([1, 2**40])}))
""",
        "8.6.1",
    )


def test_closing_gives_everything_back_but_what_is_still_held(run):
    run(
        """
engine = opened()
given, expected = small_network.inputs(2)
stream = nvidia.Stream(0)
for _ in range(3):
    engine.run(given)
    kept = engine.run({n: OnGpu(a, stream.handle) for n, a in given.items()})
engine.close()
engine.close()
refused(EngineError, "is closed", lambda: engine.run(given))
check({name: seen(array) for name, array in kept.items()}, expected)
assert count("bytes") > 0 and count("graphs") == 0 and count("streams") == 2  # this one and that of all engines
del kept
gc.collect()
assert count("bytes") == 0
"""
    )


def test_a_process_that_leaves_an_engine_open_ends_without_a_word(run):
    done = run(
        """
engine = opened()
for seed in range(3):
    kept = engine.run({n: OnGpu(a, 0) for n, a in small_network.inputs(2, seed)[0].items()})
"""
    )
    assert done.stderr == ""


def test_many_batch_sizes_and_threads_leave_memory_bounded(run):
    run(
        """
engine = opened(1, 1, 64)
wrong = []


def work(seed):
    for n in range(30):
        given, expected = small_network.inputs(1 + (7 * n + seed) % 64, n)
        try:
            check(engine.run(given), expected)
        except Exception as error:
            wrong.append(error)


threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not wrong, wrong
assert count("graphs") <= 8 and len(engine._calls) <= 8 and len(engine._outputs) == 1
"""
    )


def test_a_network_that_cannot_be_recorded_runs_all_the_same_and_says_so(run):
    done = run(
        """
import logging
logging.basicConfig(level=logging.WARNING)
whole = nvidia.Recording.__init__


def broken(self, ordinal, stream, work):
    def fails():
        work()
        fake.fake_invalidate(ctypes.c_void_p(stream))
    whole(self, ordinal, stream, fails)


nvidia.Recording.__init__ = broken
engine = opened()
for seed in range(4):
    given, expected = small_network.inputs(2, seed)
    check(engine.run(given), expected)
assert count("graphs") == 0
"""
    )
    assert done.stderr.count("runs without a CUDA graph") == 1


def test_an_engine_of_another_release_is_told_apart(run):
    run(
        """
plan = trt_build.build_plan(graph, "float32", small_network.profile(), ordinal=0, workspace=None, timing_cache=None)
other = plan.replace(b'"release": "10.3.0"', b'"release": "10.0.1"')
refused(EngineError, "TensorRT 10.3.0 cannot open the engine: engine of 10.0.1; build it again on this device",
        lambda: TensorRTEngine(graph, "cuda", EngineOptions(), plan=other))
refused(EngineError, "magic tag", lambda: TensorRTEngine(graph, "cuda", EngineOptions(), plan=b"no engine"))
assert count("bytes") == 0 and count("streams") == 0
"""
    )


def test_without_an_engine_the_error_is_the_command_that_builds_it(run, tmp_path):
    run(
        """
refused(EngineNotBuiltError, "build it, once: piflow-edge build bundles/small --precision fp32 --engine tensorrt",
        lambda: open_engine(graph, engine="tensorrt"))
assert "there is no TensorRT engine" in TensorRTEngine.opener(graph, "cuda", EngineOptions())
"""
    )


@pytest.mark.torch
def test_from_a_bundle_to_images_by_the_commands_a_user_gives(driver, latent_bundle, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(START)
    settings = {
        "PIFLOW_EDGE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": f"{site}:{ROOT}",
    }

    def command(*words, code=0):
        return run_on_fake_driver(driver, "-m", "piflow_edge.cli", *words, code=code, **settings)

    draw = ("sample", latent_bundle, "--labels", "3,7,1", "--engine", "tensorrt", "--out", tmp_path / "a.png")
    told = command(*draw, code=2).stderr
    assert f"piflow-edge build {latent_bundle} --precision fp32 --engine tensorrt" in told
    words = ("build", latent_bundle, "--engine", "tensorrt", "--batch", "1:1:4", "--json")
    first, second = (json.loads(command(*words).stdout)["engines"] for _ in range(2))
    assert [e["graph"] for e in first] == ["student", "decoder"]
    assert all(e["built"] for e in first) and not any(e["built"] for e in second)
    assert first[0]["miss"].startswith("no tensorrt engine") and "another onnx" in first[1]["miss"]
    inspection = first[0]["build"]["inspection"]
    assert inspection["layers"]["float32"] > 1 and not inspection["complaints"]
    assert inspection["engine_bytes"] == first[0]["engine_bytes"]
    assert first[0]["build"]["seconds"] > 0 and first[0]["build"]["peak_host_bytes"] > 1 << 20
    assert first[0]["key"]["gpu"] == "Pretended GPU" and first[0]["key"]["compute_capability"] == "8.7"
    assert (
        "another profile"
        in json.loads(command("build", latent_bundle, "--graph", "decoder", "--json").stdout)["engines"][0][
            "miss"
        ]
    )
    sampler = command("build", latent_bundle, "--graph", "sampler").stdout
    assert sampler.strip().endswith(".engine")
    command("build", latent_bundle, "--batch", "1:1:64", "--workspace", "2000", code=2)

    assert "tensorrt on cuda" in command(*draw).stderr
    draw = [tmp_path / "b.png" if word == tmp_path / "a.png" else word for word in draw]
    draw[draw.index("tensorrt")] = "ort-cpu"
    command(*draw)
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in "ab"]
    assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.parametrize("release", ["8.5.3.1", "10.3.0", "11.4.0.106"])
def test_inputs_and_outputs_may_vary_in_a_second_axis(run, release):
    run(
        """
import onnx
model = onnx.parser.parse_model('''
<ir_version: 8, opset_import: ["": 18]>
net (float[batch, 3] x_t, float[batch, tokens, 3] text) => (float[batch, 3] u, float[batch, tokens, 3] v)
{
  middle = Constant <value_ints = [1]> ()
  mean = ReduceMean <keepdims = 0> (text, middle)
  u = Add (x_t, mean)
  v = Mul (text, text)
}
''')
graph = Graph(model.SerializeToString())
profile = {"x_t": ((1, 3), (2, 3), (4, 3)), "text": ((1, 2, 3), (2, 4, 3), (4, 8, 3))}
plan = trt_build.build_plan(graph, "float32", profile, ordinal=0, workspace=None, timing_cache=None)
engine = TensorRTEngine(graph, "cuda", EngineOptions(), plan=plan)
assert (engine.min_batch, engine.max_batch) == (1, 4)
random = np.random.default_rng(0)
for batch, tokens in ((1, 2), (4, 8), (1, 5), (1, 5), (1, 5), (3, 8), (1, 2)):
    given = {"x_t": random.standard_normal((batch, 3), np.float32),
             "text": random.standard_normal((batch, tokens, 3), np.float32)}
    expected = {"u": given["x_t"] + given["text"].mean(1), "v": given["text"] ** 2}
    check(engine.run(given), expected)
    on_gpu = engine.run({name: OnGpu(array) for name, array in given.items()})
    check({name: seen(array) for name, array in on_gpu.items()}, expected)
refused(EngineError, "text of 2 to 8 along axis 1; got 9",
        lambda: engine.run({"x_t": np.zeros((1, 3), np.float32), "text": np.zeros((1, 9, 3), np.float32)}))
# Fewer samples than the engine was built for are filled up along the batch alone.
plan = trt_build.build_plan(graph, "float32",
                            profile | {"x_t": ((2, 3),) * 3, "text": ((2, 2, 3), (2, 2, 3), (2, 8, 3))},
                            ordinal=0, workspace=None, timing_cache=None)
engine = TensorRTEngine(graph, "cuda", EngineOptions(), plan=plan)
check(engine.run({"x_t": given["x_t"], "text": given["text"]}), expected)
""",
        release,
    )
