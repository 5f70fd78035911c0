"""A process whose CUDA driver is fake_driver.cpp, for tests where there is no GPU."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from piflow_edge.kernels import cuda

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
KERNELS = Path(cuda.__file__).parent

HAS_BINDINGS = bool(importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings"))


def compile_on_host(source, path, *more):
    """A library of a C++ file of the tests."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform == "win32":
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"]
    flags += ["-Wall", "-Wextra", "-Werror", "-I", KERNELS]
    command = [compiler, *flags, HELPERS / source, "-o", path, *more]
    subprocess.run([str(word) for word in command], check=True)


def fake_driver(folder):
    """Makes the pretended driver in `folder`."""
    if not HAS_BINDINGS:
        pytest.skip("cuda-bindings is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("the pretended driver is made for Linux")
    shutil.copy(_compiled_driver(), folder / "libcuda.so.1")
    return folder


@cache
def _compiled_driver():
    """Compiled once for all tests of this process: it takes ten seconds and more."""
    folder = Path(tempfile.mkdtemp(prefix="piflow-edge-driver-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compile_on_host("fake_driver.cpp", folder / "libcuda.so.1", "-ldl")
    return folder / "libcuda.so.1"


def run_on_fake_driver(folder, *command, code=0, **environment):
    """A Python process with the driver of `folder`; `environment` is added to this one's."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": paths} | environment
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Exception ignored" not in done.stderr, done.stderr  # what a `__del__` or a finaliser raised
    return done


# Of a plan, what the pretended driver must know.
_NAMES = ("K", "C", "STORAGE", "LANES")


def compile_for_fake_driver(arch, defines, source):
    """An image as fake_driver.cpp reads it, instead of `nvidia.compile_source`: NVRTC looks for a real driver."""
    if source.name == "arrays.cu":
        return b"arrays"
    values = dict(define.removeprefix("PIFLOW_").split("=") for define in defines)
    return " ".join(values[name] for name in _NAMES).encode()
