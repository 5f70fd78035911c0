"""The C API of a whole bundle gives Python's pictures, and refuses what Python refuses."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.bundle.folder import demo_bundle
from tests.native.native_library import NATIVE, NativeError, NativeGenerator, build, run

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def library(installed):
    return ctypes.CDLL(str(installed / "lib" / "libpiflow_edge.so"))


@pytest.fixture
def native(library):
    generator = NativeGenerator(library, demo_bundle())
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def python():
    with pf.load("digits") as generator:
        yield generator


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize("nfe", [1, 3])
def test_pictures_are_pythons(native, python, seed, nfe):
    labels = [*range(10)] * 2  # more than a batch
    outcome, pixels, latents = native.make(20, labels=labels, seed=seed, nfe=nfe)
    expected = python(labels=labels, seed=seed, nfe=nfe, output="numpy")
    assert outcome == 0
    # The network and the rollout round in float32; states of up to 1 or so.
    np.testing.assert_allclose(latents, expected.latents.reshape(20, -1), rtol=0, atol=1e-5)
    assert np.abs(pixels.astype(int) - expected.images).max() <= 1


def test_the_last_preview_is_the_picture_and_a_callback_counts_calls(native):
    seen = []

    def note(progress):
        seen.append((progress.first, progress.count, progress.call, progress.nfe, native.preview(progress)))
        return 0

    _, pixels, _ = native.make(3, labels=[1, 2, 3], nfe=2, callback=note)
    assert [moment[:4] for moment in seen] == [(0, 3, 1, 2), (0, 3, 2, 2)]
    np.testing.assert_array_equal(seen[-1][4], pixels)
    assert (seen[0][4] != pixels).any()


@pytest.mark.parametrize("way", ["callback", "other call"])
def test_a_cancelled_call_returns_no_picture_and_the_next_one_does(native, way):
    calls = []

    def stop(progress):
        calls.append(progress.call)
        native.cancel()
        return way == "callback"

    outcome, pixels, _ = native.make(1, labels=[1], nfe=4, callback=stop)
    assert (outcome, len(pixels), calls) == (2, 0, [1])
    assert native.make(1, labels=[1])[0] == 0


@pytest.mark.parametrize(
    ("request_fields", "says"),
    [
        ({"count": 1, "labels": [10]}, "0 to 9; got 10"),
        ({"count": 1, "labels": [-1]}, "0 to 9; got -1"),
        ({"count": 1}, "labels"),
        ({"count": 0, "labels": [1]}, "count is 1"),
        ({"count": 1, "labels": [1], "nfe": -1}, "nfe is 1"),
        ({"count": 1, "labels": [1], "arrays": {"labels": np.zeros(1, np.int64)}}, "labels"),
    ],
)
def test_a_request_without_meaning_is_refused_in_words(native, request_fields, says):
    with pytest.raises(NativeError, match=says):
        native.make(**request_fields)


def alter_weights(folder):
    path = folder / "student.fp32.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def alter_manifest(folder):
    path = folder / "bundle.json"
    path.write_text(path.read_text().replace('"nfe": 1', '"nfe": 2', 1))


def add_file(folder):
    (folder / "more").write_text("more")


def remove_file(folder):
    (folder / "LICENSE").unlink()


def link_file(folder):
    (folder / "LICENSE").rename(folder.parent / "LICENSE")
    (folder / "LICENSE").symlink_to(folder.parent / "LICENSE")


def cut_manifest(folder):
    path = folder / "bundle.json"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (alter_weights, "student.fp32.onnx .*does not match its checksum"),
        (alter_manifest, "does not match its own checksum"),
        (add_file, "more does not belong"),
        (remove_file, "LICENSE is missing"),
        (link_file, "LICENSE is missing, or a link"),
        (cut_manifest, "bundle.json is not as this library reads it"),
    ],
)
def test_a_bundle_that_was_altered_is_not_opened(library, tmp_path, alter, says):
    shutil.copytree(demo_bundle(), tmp_path / "bundle")
    alter(tmp_path / "bundle")
    with pytest.raises(NativeError, match=says):
        NativeGenerator(library, tmp_path / "bundle")


def test_only_the_bundle_that_was_meant_is_opened(library):
    with pytest.raises(NativeError, match="that was asked for"):
        NativeGenerator(library, demo_bundle(), sha256=b"0" * 64)
    with pytest.raises(NativeError, match="no precision int3"):
        NativeGenerator(library, demo_bundle(), precision=b"int3")


def test_the_example_is_short_and_draws(installed, tmp_path):
    assert len((NATIVE / "examples" / "generate.cpp").read_text().splitlines()) <= 80
    program = installed.parent / "build" / "piflow_generate"
    run(program, demo_bundle(), 7, tmp_path / "row.pgm", 3, 7)
    data = (tmp_path / "row.pgm").read_bytes()
    assert data.startswith(b"P5\n16 8\n255\n") and len(data) == len(b"P5\n16 8\n255\n") + 128
    done = subprocess.run([program, tmp_path, "7", tmp_path / "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "bundle.json" in done.stderr


def test_a_cmake_project_and_pkg_config_find_the_installed_package(installed, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(app CXX)\nfind_package(piflow_edge REQUIRED)\n"
        f"add_executable(app {NATIVE}/examples/generate.cpp)\ntarget_link_libraries(app piflow_edge::piflow_edge)\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "app", demo_bundle(), 7, tmp_path / "row.pgm", 3)
    if shutil.which("pkg-config"):
        flags = run("pkg-config", "--cflags", "--libs", installed / "lib/pkgconfig/piflow_edge.pc").split()
        assert f"-I{installed}/include/piflow_edge" in flags and "-lpiflow_edge" in flags
