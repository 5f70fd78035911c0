"""TensorRT's releases: that the table fits what each really offers, up to the call into the library."""

import base64
import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from piflow_edge.engines import Graph
from piflow_edge.engines.trt import plans as trt_build
from piflow_edge.engines.trt import versions as trt_versions
from piflow_edge.errors import EngineError, MissingExtraError
from piflow_edge.kernels import nvidia
from tests.helpers import small_network
from tests.helpers.pretended_tensorrt import RELEASES, SURFACE, pretend

# What `run` and `build` need of every release, whatever it is called with.
NEEDED = {
    "ICudaEngine": ["num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
                    "get_tensor_profile_shape"],
    "IExecutionContext": ["set_input_shape", "set_tensor_address", "execute_async_v3"],
    "IBuilderConfig": ["set_memory_pool_limit", "create_timing_cache", "set_timing_cache", "get_timing_cache",
                       "add_optimization_profile", "clear_flag"],
    "BuilderFlag": ["TF32"],
    "MemoryPoolType": ["WORKSPACE"],
}  # fmt: skip


def has(kind, name, release):
    return any(release in releases for releases in SURFACE[kind].get(name, {}).values())


@pytest.fixture
def release(request, monkeypatch):
    """A pretended module in the place of tensorrt, and no GPU asked for."""
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", pretend(request.param))
    monkeypatch.setattr(nvidia, "current", lambda ordinal: nullcontext())
    return request.param


def every(releases=RELEASES):
    return pytest.mark.parametrize("release", releases, indirect=True)


def small_model():
    pytest.importorskip("onnx", reason="the small network is made with onnx")
    return small_network.model()


def build(computes_in="float32", graph=None, **settings):
    graph = graph or Graph(small_model().SerializeToString())
    settings = {"ordinal": 0, "workspace": None, "timing_cache": None} | settings
    return json.loads(trt_build.build_plan(graph, computes_in, small_network.profile(), **settings))


@pytest.mark.parametrize("release", RELEASES)
def test_the_table_names_what_a_release_has(release):
    row = trt_versions.api(release)
    assert has("NetworkDefinitionCreationFlag", "STRONGLY_TYPED", release) == row.strongly_typed
    assert ("ExecutionContextAllocationStrategy" in vars(pretend(release))) == row.contexts_by_strategy
    asked = release.startswith("8") and has("PreviewFeature", "PROFILE_SHARING_0806", release)
    assert row.profile_sharing == ("asked" if asked else "never" if release.startswith("8") else "always")
    assert has("IExecutionContext", "set_device_memory", release) == row.sized_memory
    assert has("ICudaEngine", "device_memory_size_v2", release) == row.sized_memory
    missing = [
        (kind, name) for kind, names in NEEDED.items() for name in names if not has(kind, name, release)
    ]
    assert not missing


def test_every_row_of_the_table_is_checked():
    assert {trt_versions.api(release) for release in RELEASES} == set(trt_versions.TABLE)


@pytest.mark.parametrize("release", ["7.2.3", "8.4.1", "8.7.0", "9.3.0", "12.0.0", "dev"])
def test_an_unknown_release_is_an_error_that_says_so(release):
    with pytest.raises(
        EngineError, match=f"knows TensorRT 8.5, 8.6, 10.x and 11.x; TensorRT {release} is here"
    ):
        trt_versions.api(release)


def test_a_tensorrt_that_does_not_load_is_not_taken_for_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingExtraError, match=r"libnvinfer\.so\.10.*pip"):
        trt_versions.tensorrt()


def test_newer_releases_of_a_known_kind_are_taken():
    assert trt_versions.api("10.99.0") == trt_versions.api("11.0") == trt_versions.TABLE[-1]


@every()
def test_every_release_builds_what_it_is_given(release):
    plan = build(workspace=1 << 30)
    assert plan["release"] == release
    assert plan["pools"] == {"WORKSPACE": 1 << 30}
    assert plan["profile"]["x_t"] == [[1, 2, 3], [2, 2, 3], [4, 2, 3]]
    assert plan["profile"]["class_labels"] == [[1], [2], [4]]
    assert "TF32" not in plan["flags"]  # float32 is float32


@every()
def test_types_come_from_the_graph_where_a_release_can_and_else_from_flags(release):
    plan = build("float16")
    if trt_versions.api(release).strongly_typed:
        assert plan["typed"] and not plan["flags"] and not plan["pinned"]
        return
    assert set(plan["flags"]) == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    # What the graph has in float32 stays so; "narrow" is in float16 there, "axes" is a constant, and "wide" a cast:
    # with one pinned TensorRT 8.6 built no engine on an H100.
    assert {"scaled", "u", "w"} <= set(plan["pinned"])
    assert not {"narrow", "wide", "axes"} & set(plan["pinned"])
    assert build("float32")["pinned"] == [] and build("int8")["flags"] == ["INT8"]


@every()
def test_cublas_and_cudnn_can_be_left_out(release):
    assert build(own_kernels=True)["tactics"] == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
    assert build()["tactics"] is None


@every(["8.5.3.1", "11.4.0.106"])
def test_weights_in_files_beside_the_model_are_read(release, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    kept = {"save_as_external_data": True, "location": "model.bin", "size_threshold": 0}
    onnx.save(small_model(), path, **kept)
    weights = {"model.bin": (tmp_path / "model.bin").read_bytes()}
    graph = Graph(path.read_bytes(), weights)
    assert len(weights["model.bin"]) == small_network.TABLE.nbytes
    read = onnx.load_from_string(base64.b64decode(build(graph=graph)["onnx"]))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(read.graph.initializer[0]), small_network.TABLE)


@every(["8.6.1", "11.4.0.106"])
def test_what_the_parser_cannot_read_is_told(release):
    model = small_model()
    model.graph.node[-1].op_type = "DynamicQuantizeLinear"
    with pytest.raises(EngineError, match="DynamicQuantizeLinear"):
        build(graph=Graph(model.SerializeToString()))


@every(["10.3.0"])
def test_a_bundle_that_says_other_inputs_than_the_graph_has_is_refused(release):
    with pytest.raises(EngineError, match=r"x_t, t, class_labels; .*noise"):
        trt_build.build_plan(Graph(small_model().SerializeToString()), "float32", {"noise": ((1,),) * 3},
                             ordinal=0, workspace=None, timing_cache=None)  # fmt: skip


@every(["8.6.1", "10.3.0"])
def test_kernel_times_are_kept_between_builds_and_a_damaged_file_is_not_trusted(release, tmp_path):
    times = tmp_path / "a" / "kernels.timing"
    build(timing_cache=times)
    first = times.read_bytes()
    build(timing_cache=times)
    assert first.endswith(b"kernel;") and len(times.read_bytes()) > len(first)
    times.write_bytes(first[:-1] + b"!")
    build(timing_cache=times)
    assert times.read_bytes() == first


def test_the_stand_in_refuses_what_a_release_lacks():
    trt = pretend("11.4.0.106")
    assert not hasattr(trt.BuilderFlag, "FP16")
    engine = trt.ICudaEngine.__new__(trt.ICudaEngine)
    with pytest.raises(AttributeError):
        engine.create_execution_context_without_device_memory()
    with pytest.raises(TypeError, match="takes"):
        trt.Builder(object(), object())
    with pytest.raises(AttributeError, match="has no max_workspace_size"):
        trt.Builder(object()).create_builder_config().max_workspace_size = 1
