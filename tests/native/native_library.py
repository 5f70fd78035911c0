"""The C API of a whole bundle, built and called from Python as a C program would call it."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NATIVE = Path(__file__).parents[2] / "piflow_edge" / "native"
# Where distributions and ONNX Runtime's own package put it; the environment variable names one package.
HEADERS = ("include", "include/onnxruntime", "include/onnxruntime/core/session")


def find_headers() -> Path | None:
    """The folder of ONNX Runtime's C++ header: below ONNXRUNTIME_ROOT, else of the system."""
    roots = [Path(root) for root in (os.environ.get("ONNXRUNTIME_ROOT"), "/usr", "/usr/local") if root]
    folders = [root / folder for root in roots for folder in HEADERS]
    return next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)


def find_runtime() -> Path | None:
    """ONNX Runtime's shared library, which its wheel holds."""
    spec = importlib.util.find_spec("onnxruntime")
    folder = Path(spec.origin).parent / "capi" if spec and spec.origin else Path()
    return next(folder.glob("libonnxruntime.so.*"), None)


def build(folder: Path) -> Path:
    """Build and install the CMake package below `folder`, and return where; skips where something is missing."""
    headers, runtime = find_headers(), find_runtime()
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    if headers is None:
        pytest.skip("needs ONNX Runtime's headers: libonnxruntime-dev, or its package as ONNXRUNTIME_ROOT")
    if runtime is None:
        pytest.skip("needs ONNX Runtime's shared library, which its wheel for Linux holds")
    if not any(Path(place, "include/nlohmann/json.hpp").is_file() for place in ("/usr", "/usr/local")):
        pytest.skip("needs nlohmann-json3-dev")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):  # as a linker and a loader look for it
        (folder / name).symlink_to(runtime)
    settings = {
        "ONNXRUNTIME_INCLUDE_DIR": headers,
        "ONNXRUNTIME_LIBRARY": folder / "libonnxruntime.so",
        "CMAKE_BUILD_TYPE": "None",  # twice as soon as Release
        "CMAKE_CXX_FLAGS": "-O1 -Wall -Wextra -Werror",
        "CMAKE_INSTALL_PREFIX": folder / "installed",
        "CMAKE_INSTALL_LIBDIR": "lib",
        "CMAKE_INSTALL_RPATH": folder,
        "PIFLOW_EDGE_ISAS": "",
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-S", NATIVE, "-B", folder / "build", *defines)
    run("cmake", "--build", folder / "build", "--target", "install", "-j2")
    return folder / "installed"


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class LoadOptions(ctypes.Structure):
    _fields_ = (("precision", ctypes.c_char_p), ("sha256", ctypes.c_char_p), ("num_threads", ctypes.c_int32))


class Images(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "height", "width", "channels")),
        ("pixels", ctypes.POINTER(ctypes.c_uint8)),
        ("latent_size", ctypes.c_int64),
        ("latents", ctypes.POINTER(ctypes.c_float)),
    )


class Tokens(ctypes.Structure):
    _fields_ = (("ids", ctypes.c_void_p), ("count", ctypes.c_int64))


class Array(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
    )


class Progress(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("call", ctypes.c_int32),
        ("nfe", ctypes.c_int32),
        ("sigma_t", ctypes.c_double),
        ("trajectory", ctypes.c_void_p),
    )


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.POINTER(Progress))


class RequestFields(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("labels", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("arrays", ctypes.c_void_p),
        ("num_arrays", ctypes.c_int32),
        ("nfe", ctypes.c_int32),
        ("substeps", ctypes.c_int32),
        ("callback", CALLBACK),
        ("context", ctypes.c_void_p),
    )


class NativeError(Exception):
    """What `piflow_last_error` says."""


class NativeGenerator:
    """A bundle, opened by the C library."""

    def __init__(self, library: Any, folder: Path, **options: Any):
        self._library = library
        library.piflow_load.restype = ctypes.c_void_p
        library.piflow_last_error.restype = ctypes.c_char_p
        loading = LoadOptions(num_threads=1, **options)
        self._address = ctypes.c_void_p(library.piflow_load(os.fsencode(folder), ctypes.byref(loading)))
        if not self._address:
            raise NativeError(library.piflow_last_error().decode())

    def make(self, count: int, *, labels=None, tokens=None, arrays=None, callback=None, **settings: Any):
        """(outcome, pixels, latents). `tokens`: a list of ids for each image and encoder. `arrays`: by name."""
        request, images = RequestFields(count=count, **settings), Images()
        kept: list[Any] = []  # alive until the call returns

        def address(values: Any, dtype: Any = np.int64) -> int:
            kept.append(np.ascontiguousarray(values, dtype))
            return kept[-1].ctypes.data

        if labels is not None:
            request.labels = address(labels)
        if tokens is not None:
            listed = (Tokens * len(tokens))(*(Tokens(address(ids), len(ids)) for ids in tokens))
            request.tokens = ctypes.addressof(listed)
        if arrays is not None:
            rows = []
            for name, value in arrays.items():
                where = address(value.shape), address(value, value.dtype)
                rows.append(Array(name.encode(), value.dtype == np.int64, value.ndim, *where))
            listed_arrays = (Array * len(rows))(*rows)
            request.arrays, request.num_arrays = ctypes.addressof(listed_arrays), len(rows)
        if callback is not None:
            request.callback = CALLBACK(lambda _, progress: callback(progress.contents))
        outcome = self._library.piflow_generate(self._address, ctypes.byref(request), ctypes.byref(images))
        if outcome == 1:
            raise NativeError(self._library.piflow_last_error().decode())
        return outcome, *self._take(images)

    def preview(self, progress: Progress) -> np.ndarray:
        images = Images()
        assert self._library.piflow_preview(ctypes.byref(progress), ctypes.byref(images)) == 0
        return self._take(images)[0]

    def cancel(self) -> None:
        self._library.piflow_cancel(self._address)

    def close(self) -> None:
        self._library.piflow_close(self._address)

    def _take(self, images: Images) -> tuple[np.ndarray, np.ndarray]:
        shape = (images.count, images.height, images.width, images.channels)
        if not images.count:
            assert not images.pixels and not images.latents
            return np.empty(shape, np.uint8), np.empty((0, 0), np.float32)
        pixels = np.ctypeslib.as_array(images.pixels, shape).copy()
        latents = np.ctypeslib.as_array(images.latents, (images.count, images.latent_size)).copy()
        self._library.piflow_free_images(ctypes.byref(images))
        return pixels, latents
