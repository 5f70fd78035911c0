"""What a build would do, told without a GPU; and engines of ONNX Runtime's providers up to the call into it."""

import json
import sys

import numpy as np
import pytest

from piflow_edge.bundle.folder import Bundle
from piflow_edge.doctor.examination import identity_model
from piflow_edge.engines import EngineOptions, Graph
from piflow_edge.engines.building import engine_cache
from piflow_edge.engines.building import steps as building
from piflow_edge.engines.building.engine_cache import EngineKey
from piflow_edge.engines.building.memory import Memory
from piflow_edge.engines.building.steps import BuildSettings, plan
from piflow_edge.engines.building.targets import Batch
from piflow_edge.engines.ort import compiling as ort_compile
from piflow_edge.engines.ort import importing as ort_package
from piflow_edge.errors import EngineError, PiFlowError
from piflow_edge.kernels import cuda, nvidia
from piflow_edge.runtime.graphs import find_targets
from tests.commands.command_line import run
from tests.helpers.protobuf import FLOAT, OPSET, message, model, node, outside

no_gpu = pytest.mark.skipif(cuda.missing() is None, reason="there is a GPU")


@pytest.mark.parametrize(("text", "sizes"), [("1:2:8", (1, 2, 8)), ("4", (4, 4, 4)), ("1:1:1", (1, 1, 1))])
def test_batch_sizes_are_read(text, sizes):
    assert Batch.parse(text) == Batch(*sizes) and str(Batch(*sizes)) == ":".join(map(str, sizes))


@pytest.mark.parametrize("text", ["", "0", "1:2", "2:1:4", "1:8:4", "a:b:c", "1:1:8:9", "-1:1:1"])
def test_batch_sizes_that_make_no_sense_are_refused(text):
    with pytest.raises(EngineError, match="batch sizes"):
        Batch.parse(text)


@pytest.mark.parametrize(
    "wrong", [{"engine": "ort-cpu"}, {"device": "cpu"}, {"device": "cuda:x"}, {"workspace": 1000}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(EngineError, match=next(iter(wrong))):
        BuildSettings(**wrong)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Memory(2 * GIB, GIB, GIB, 8 * GIB), "needs 2,048 MiB .* the GPU has 1,024 MiB free"),
        (Memory(GIB, 3 * GIB, 8 * GIB, GIB), "needs 3,072 MiB .* this machine has 1,024 MiB free"),
        (Memory(GIB, GIB, GIB, GIB, True), "needs 2,048 MiB .* whose GPU shares it, has 1,024 MiB free"),
    ],
)
def test_a_build_without_memory_is_refused_with_what_it_needs_and_what_there_is(memory, words):
    with pytest.raises(EngineError, match=words):
        memory.check("student")


def test_memory_that_is_enough_or_unknown_is_no_reason():
    Memory(GIB, GIB, 2 * GIB, 2 * GIB, True).check("student")
    Memory(GIB, GIB).check("student")


@pytest.mark.torch
class TestOnABundle:
    def test_the_graphs_are_student_and_decoder_or_the_one_named(self, shared_bundle, latent_bundle):
        assert [t.name for t in find_targets(Bundle(shared_bundle))] == ["student"]
        latent = Bundle(latent_bundle)
        assert [t.file for t in find_targets(latent)] == ["student.fp32.onnx", "decoder.fp32.onnx"]
        (sampler,) = find_targets(latent, graph="sampler")
        assert (
            sampler.file == "sampler.nfe2.fp32.onnx"
            and sampler == find_targets(latent, graph="sampler", nfe=2)[0]
        )
        shape = tuple(latent.manifest.latent.shape)
        assert sampler.shapes(3) == {"noise": (3, *shape), "labels": (3,)}

    def test_the_shapes_are_those_of_the_graph(self, latent_bundle):
        onnx = pytest.importorskip("onnx")
        bundle = Bundle(latent_bundle)
        for target in (*find_targets(bundle), *find_targets(bundle, graph="sampler")):
            graph = onnx.load_from_string(target.graph.model).graph
            for value in graph.input:
                dims = tuple(d.dim_value or 5 for d in value.type.tensor_type.shape.dim)
                assert target.shapes(5)[value.name] == dims

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"graph": "teacher"}, "graph is one of"),
            ({"nfe": 2}, "graph 'sampler'"),
            ({"graph": "sampler", "nfe": 3}, "sampler graph of 3 "),
            ({"graph": "decoder"}, "has no decoder"),
            ({"graph": "sampler"}, "no sampler graph; export"),
            ({"precision": "int4"}, "holds fp32"),
        ],
    )
    def test_a_graph_that_is_not_there_is_refused(self, shared_bundle, wrong, words):
        with pytest.raises(PiFlowError, match=words):
            find_targets(Bundle(shared_bundle), **wrong)

    @no_gpu
    def test_a_plan_needs_neither_a_gpu_nor_the_library(self, shared_bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        (target,) = find_targets(Bundle(shared_bundle))
        planned = plan(target, BuildSettings(batch=Batch(1, 2, 4), workspace=GIB))
        assert planned.key is None and planned.obstacle
        assert planned.memory.device_needed > GIB + 2 * len(target.graph.model)
        assert planned.as_json()["profile"]["x_t"]["max"][0] == 4
        with pytest.raises(PiFlowError) as error:
            building.build(planned, BuildSettings())
        assert error.value is planned.obstacle

    @no_gpu
    def test_dry_run(self, shared_bundle):
        words = ("build", shared_bundle, "--batch", "1:1:4", "--dry-run")
        (told,) = json.loads(run(*words, "--json").stdout)["plans"]
        assert told["file"] == "student.fp32.onnx" and told["key"] is None and "NVIDIA" in told["obstacle"]
        text = run(*words).stdout
        assert "memory needed" in text and "not here" in text

    @no_gpu
    def test_without_a_gpu_a_build_says_so(self, shared_bundle):
        assert "NVIDIA" in run("build", shared_bundle, code=2).stderr
        assert "batch sizes are MIN:OPT:MAX" in run("build", shared_bundle, "--batch", "x", code=2).stderr


# --- ONNX Runtime's providers, of which none is here

PROFILE = {"x_t": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)), "t": ((1,), (2,), (4,))}
COMPILED = sorted(ort_compile.BACKENDS)


@pytest.mark.parametrize("engine", COMPILED)
def test_a_provider_is_given_the_profile_and_the_workspace(engine, tmp_path):
    options = ort_compile.provider_options(
        engine, "float16", PROFILE, ordinal=1, workspace=GIB, timing_cache=tmp_path / "times"
    )
    prefix = {"ort-tensorrt": "trt", "tensorrt-rtx": "nv"}[engine]
    assert options["device_id"] == "1" and options[f"{prefix}_max_workspace_size"] == str(GIB)
    assert options[f"{prefix}_profile_max_shapes"] == "x_t:4x3x8x8,t:4"
    assert options[f"{prefix}_profile_min_shapes"] == "x_t:1x3x8x8,t:1"
    if engine == "ort-tensorrt":
        assert options["trt_fp16_enable"] == "1" and options["trt_int8_enable"] == "0"
        assert options["trt_timing_cache_path"] == str(tmp_path / "times")
    else:  # types come from the graph alone
        assert not any("fp16" in name for name in options)


@pytest.fixture(params=COMPILED)
def on_cpu(request, monkeypatch):
    """An engine whose provider is the CPU's: ONNX Runtime itself runs, without a GPU."""
    pytest.importorskip("onnxruntime")
    backend = ort_compile.BACKENDS[request.param]
    monkeypatch.setattr(backend, "provider", "CPUExecutionProvider")
    monkeypatch.setattr(backend, "_provider_options", lambda self, graph: {})
    monkeypatch.setattr(ort_compile, "provider_options", lambda *_, **__: {})
    return request.param


@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_provider_that_takes_nothing_is_an_error(on_cpu, monkeypatch, has_compiler, tmp_path):
    """The real library compiles a graph whose weights lie beside it, and no node of it becomes an engine."""
    onnxruntime = ort_package.import_onnxruntime()
    if not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} takes no weights from memory")
    if not has_compiler:  # before 1.23
        monkeypatch.delattr(onnxruntime, "ModelCompiler", raising=False)
    graph = Graph(model((5, outside("w"))), {"w": np.ones(4, np.float32).tobytes()})
    with pytest.raises(EngineError, match=r"took no part of the graph|cannot build"):
        ort_compile.compile_graph(on_cpu, graph, "float16", PROFILE, device="cuda:1", workspace=GIB,
                             timing_cache=tmp_path / "times")  # fmt: skip


def four_to_six():
    """A network for batches of 4 or more: two rows of noise, whose batch comes second, are added to x."""

    def floats(name, *dims):
        named = (message((2, n) if isinstance(n, str) else (1, n)) for n in dims)
        shape = message(*((1, dim) for dim in named))
        return message((1, name), (2, message((1, message((1, FLOAT), (2, shape))))))

    def ints(name, *numbers):
        return 5, message((1, len(numbers)), (2, 7), (8, name), *((7, n) for n in numbers))

    graph = message(
        (2, "four_to_six"), ints("first", 0), ints("fourth", 3),
        (1, node("ReduceSum", ["noise", "first"], ["sum"], message((1, "keepdims"), (20, 2), (3, 0)))),
        (1, node("Mul", ["sum", "level"], ["scaled"])),
        (1, node("Add", ["x", "scaled"], ["found"])),
        (1, node("Gather", ["x", "fourth"], ["row"])),  # fails where there are fewer than four
        (1, node("Sub", ["found", "row"], ["less"])),
        (1, node("Add", ["less", "row"], ["y"])),
        (11, floats("x", "batch", 3)), (11, floats("noise", 2, "batch", 3)), (11, floats("level", 1)),
        (12, floats("y", "batch", 3)),
    )  # fmt: skip
    return message((1, 8), OPSET, (7, graph))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by its name, and an empty cache."""
    pytest.importorskip("filelock")
    monkeypatch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(nvidia, "driver_version", lambda: "12.6")
    monkeypatch.setattr(nvidia, "driver_cuda_version", lambda: (12, 6))
    monkeypatch.setattr(nvidia, "name", lambda ordinal: "Orin")
    monkeypatch.setattr(nvidia, "device", lambda ordinal: nvidia.Device("sm_87", 8, 0))


PLAN, NETWORK = four_to_six(), identity_model()


def fill_cache(engine, graph, profile="4:4:6"):
    release = ort_compile.BACKENDS[engine].describe_release()
    place = engine_cache.place(engine, release, "cuda")
    key = EngineKey(onnx=graph.sha256, precision="fp16", profile=profile, options="", **place)
    return engine_cache.get_or_build(key, lambda: (PLAN, {}))[0].path


def inputs_of(engine):
    return [value.name for value in engine._session.get_inputs()]


def test_a_compiled_engine_is_found_again_with_its_batches(on_cpu, gpu, caplog):
    backend, graph = ort_compile.BACKENDS[on_cpu], Graph(NETWORK, source="b --precision fp16")
    words = f"piflow-edge build b --precision fp16 --engine {on_cpu}"
    assert words in backend.opener(graph, "cuda", EngineOptions())
    found = backend(graph, "cuda", EngineOptions())
    assert (
        inputs_of(found) == ["x"] and words in caplog.text and (found.min_batch, found.max_batch) == (1, None)
    )
    fill_cache(on_cpu, graph)
    found = backend(graph, "cuda", EngineOptions())
    assert inputs_of(found) == ["x", "noise", "level"] and (found.min_batch, found.max_batch) == (4, 6)


def test_auto_reads_a_compiled_engine_once(on_cpu, gpu, monkeypatch):
    backend, graph, read = ort_compile.BACKENDS[on_cpu], Graph(NETWORK), []
    path, whole = fill_cache(on_cpu, graph), engine_cache.Entry.read
    monkeypatch.setattr(engine_cache.Entry, "read", lambda self: read.append(self.path) or whole(self))
    found = backend.opener(graph, "cuda", EngineOptions())()
    assert read == [path] and found.max_batch == 6 and inputs_of(found) == ["x", "noise", "level"]


def test_auto_neither_uses_a_damaged_engine_nor_builds_another(on_cpu, gpu):
    graph = Graph(NETWORK)
    path = fill_cache(on_cpu, graph)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reason = ort_compile.BACKENDS[on_cpu].opener(graph, "cuda", EngineOptions())
    assert "it would first build an engine" in reason


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_a_call_of_fewer_than_it_was_compiled_for_gives_what_was_asked_for(on_cpu, gpu, batch):
    fill_cache(on_cpu, Graph(NETWORK))
    found = ort_compile.BACKENDS[on_cpu](Graph(NETWORK), "cuda", EngineOptions())
    x, noise = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3), np.ones((2, batch, 3), np.float32)
    outputs = found.run({"x": x, "noise": noise, "level": np.array([0.5], np.float32)})
    np.testing.assert_array_equal(outputs["y"], x + 1)
