"""What a build would do, told without a GPU; and engines of ONNX Runtime's providers up to the call into it."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from piflow_edge.bundle.folder import Bundle
from piflow_edge.doctor.examination import identity_model
from piflow_edge.engines import (
    EngineOptions,
    Graph,
    building,
    engine_cache,
    ort_compile,
    ort_cuda,
    ort_package,
)
from piflow_edge.engines.build_memory import Memory
from piflow_edge.engines.build_targets import Batch
from piflow_edge.engines.building import BuildSettings, plan
from piflow_edge.engines.engine_cache import EngineKey
from piflow_edge.errors import EngineError, PiFlowError
from piflow_edge.kernels import cuda, nvidia
from piflow_edge.runtime.graphs import find_targets
from tests.commands.test_cli import run

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
        assert sampler.shapes(3) == {"noise": (3, *shape), "class_labels": (3,)}

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
            ({"nfe": 2}, "give it with graph 'sampler'"),
            ({"graph": "sampler", "nfe": 3}, "no sampler graph of 3 calls"),
            ({"graph": "decoder"}, "has no decoder"),
            ({"graph": "sampler"}, "has no sampler graph; export it with"),
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

MODEL = identity_model()
PROFILE = {"x_t": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)), "t": ((1,), (2,), (4,))}


class PretendedRuntime:
    """onnxruntime with a provider that compiles."""

    __version__ = "1.30.0"

    def __init__(self, provider, output=b"an EPContext node"):
        self.provider, self.output, self.seen = provider, output, SimpleNamespace(entries={})
        if self.output is not None:
            self.ModelCompiler = self._compiler

    def get_available_providers(self):
        return [self.provider]

    def SessionOptions(self):
        def add_provider(name, options):
            self.seen.provider, self.seen.options = name, options

        def add_weights(names, contents, sizes):
            self.seen.weights = dict(zip(names, contents, strict=True))

        return SimpleNamespace(
            add_provider=add_provider,
            add_external_initializers_from_files_in_memory=add_weights,
            add_session_config_entry=self.seen.entries.__setitem__,
        )

    def _compiler(self, settings, model, embed_compiled_data_into_model):
        assert embed_compiled_data_into_model
        self.seen.model = model
        return SimpleNamespace(compile_to_bytes=lambda: self.output)

    def InferenceSession(self, model, settings, providers, enable_fallback):
        ((self.seen.provider, self.seen.options),) = providers
        with open(self.seen.entries["ep.context_file_path"], "wb") as file:
            file.write(b"an EPContext node of " + model)


@pytest.fixture(params=["ort-tensorrt", "tensorrt-rtx"])
def provider(request, monkeypatch):
    def install(**settings):
        made = PretendedRuntime(ort_compile.BACKENDS[request.param].provider, **settings)
        monkeypatch.setattr(ort_package, "import_onnxruntime", lambda *names: made)
        return request.param, made

    return install


def compiled(engine, graph=None, precision="fp16", cache=None):
    graph = graph or Graph(MODEL, {"w": b"1"})
    return ort_compile.compiled(
        engine, graph, precision, PROFILE, device="cuda:1", workspace=GIB, timing_cache=cache
    )


def test_a_provider_compiles_with_the_profile_the_workspace_and_the_weights(provider, tmp_path):
    engine, made = provider()
    assert compiled(engine, cache=tmp_path / "times") == b"an EPContext node"
    options, prefix = made.seen.options, {"ort-tensorrt": "trt", "tensorrt-rtx": "nv"}[engine]
    assert options["device_id"] == "1" and options[f"{prefix}_max_workspace_size"] == str(GIB)
    assert options[f"{prefix}_profile_max_shapes"] == "x_t:4x3x8x8,t:4"
    assert options[f"{prefix}_profile_min_shapes"] == "x_t:1x3x8x8,t:1"
    assert made.seen.weights == {"w": b"1"} and made.seen.model == MODEL
    if engine == "ort-tensorrt":
        assert options["trt_fp16_enable"] == "1" and options["trt_int8_enable"] == "0"
        assert options["trt_timing_cache_path"] == str(tmp_path / "times")
    else:  # types come from the graph alone
        assert not any("fp16" in name for name in options)


def test_an_older_runtime_compiles_by_opening_a_session(provider):
    engine, made = provider(output=None)
    assert compiled(engine) == b"an EPContext node of " + MODEL
    assert made.seen.entries["ep.context_embed_mode"] == "1"


def test_a_provider_that_takes_nothing_is_an_error(provider):
    engine, _ = provider(output=b"the graph as it was")
    with pytest.raises(EngineError, match="took no part of the graph"):
        compiled(engine)


class PretendedSession:
    """Of a network compiled for batches of 4 to 6: two rows of noise, whose batch comes second, are added to x."""

    def get_inputs(self):
        shapes = {"x": ["batch", 3], "noise": [2, "batch", 3], "level": [1]}
        return [SimpleNamespace(name=name, shape=shape) for name, shape in shapes.items()]

    def get_outputs(self):
        return [SimpleNamespace(name="y")]

    def run(self, names, inputs):
        assert names == ["y"] and 4 <= len(inputs["x"]) == inputs["noise"].shape[1] <= 6
        return [inputs["x"] + inputs["noise"].sum(0) * inputs["level"]]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by its name, and an empty cache."""
    pytest.importorskip("filelock")
    monkeypatch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(nvidia, "driver_version", lambda: "12.6")
    monkeypatch.setattr(nvidia, "driver_cuda_version", lambda: (12, 6))
    monkeypatch.setattr(nvidia, "name", lambda ordinal: "Orin")
    monkeypatch.setattr(nvidia, "device", lambda ordinal: nvidia.Device("sm_87", 8, 0))


def cached(engine, graph, profile="4:4:6"):
    release = ort_compile.release(engine)
    place = engine_cache.place(engine, release, "cuda")
    key = EngineKey(onnx=graph.sha256, precision="fp16", profile=profile, options="", **place)
    return engine_cache.get_or_build(key, lambda: (b"an EPContext node", {}))[0].path


@pytest.fixture
def opened(monkeypatch):
    """Models that were given to ONNX Runtime."""
    seen = []
    opening = lambda self, module, graph: seen.append(graph.model) or PretendedSession()  # noqa: E731
    monkeypatch.setattr(ort_cuda.OrtCUDA, "_opened", opening)
    return seen


def test_a_compiled_engine_is_found_again_with_its_batches(provider, gpu, opened, caplog):
    engine, _ = provider()
    backend, graph = ort_compile.BACKENDS[engine], Graph(b"model", source="b --precision fp16")
    words = f"piflow-edge build b --precision fp16 --engine {engine}"
    assert words in backend.opener(graph, "cuda", EngineOptions())
    found = backend(graph, "cuda", EngineOptions())
    assert opened == [b"model"] and words in caplog.text and (found.min_batch, found.max_batch) == (1, None)
    cached(engine, graph)
    found = backend(graph, "cuda", EngineOptions())
    assert opened[-1] == b"an EPContext node" and (found.min_batch, found.max_batch) == (4, 6)


def test_auto_reads_a_compiled_engine_once(provider, gpu, opened, monkeypatch):
    engine, _ = provider()
    backend, graph, read = ort_compile.BACKENDS[engine], Graph(b"model"), []
    path, whole = cached(engine, graph), engine_cache.Entry.read
    monkeypatch.setattr(engine_cache.Entry, "read", lambda self: read.append(self.path) or whole(self))
    assert backend.opener(graph, "cuda", EngineOptions())().max_batch == 6
    assert read == [path] and opened == [b"an EPContext node"]


def test_auto_neither_uses_a_damaged_engine_nor_builds_another(provider, gpu, opened):
    engine, _ = provider()
    graph = Graph(b"model")
    path = cached(engine, graph)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    reason = ort_compile.BACKENDS[engine].opener(graph, "cuda", EngineOptions())
    assert "it would first build an engine" in reason and opened == []


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_a_call_of_fewer_than_it_was_compiled_for_gives_what_was_asked_for(provider, gpu, opened, batch):
    engine, _ = provider()
    cached(engine, Graph(b"model"))
    found = ort_compile.BACKENDS[engine](Graph(b"model"), "cuda", EngineOptions())
    x, noise = np.arange(3.0 * batch).reshape(batch, 3), np.ones((2, batch, 3))
    outputs = found.run({"x": x, "noise": noise, "level": np.array([0.5])})
    np.testing.assert_array_equal(outputs["y"], x + 1)
