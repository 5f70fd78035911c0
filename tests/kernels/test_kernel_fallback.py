"""Without the compiled kernels everything still works, and says so; with a compiler at hand, they are there."""

import logging
import os
import shutil
import sys

import numpy as np
import pytest

from piflow_edge import DXPolicy, GMPolicy, PiFlowError
from piflow_edge.kernels import cpu
from piflow_edge.kernels.normal import philox_normal
from piflow_edge.kernels.rollout import integrate
from tests.helpers.rollout_cases import dx_case, gm_case, levels
from tests.kernels.test_kernels import KERNELS, run


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_library_is_there_where_a_compiler_is():
    assert cpu.missing() is None


@pytest.mark.parametrize("make", [lambda: (GMPolicy, gm_case(13)), lambda: (DXPolicy, dx_case(13))])
def test_without_the_library_numpy_takes_over_and_says_so_once(make, monkeypatch, caplog):
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu.warn_once.cache_clear()
    kind, inputs = make()
    policy = kind(**inputs)
    with caplog.at_level(logging.WARNING):
        x_end = [integrate(policy, inputs["x_src"], levels(1.0)) for _ in range(2)]
    assert len(caplog.records) == 1 and "C++ compiler" in caplog.text
    reference = integrate(policy, inputs["x_src"], levels(1.0), kernel="reference")
    np.testing.assert_allclose(x_end[1], reference, rtol=0, atol=1e-5)
    with pytest.raises(PiFlowError, match="C\\+\\+ compiler"):
        integrate(policy, inputs["x_src"], levels(1.0), kernel="cpu")


def test_noise_says_that_kernels_are_missing_where_rollouts_run_elsewhere(monkeypatch, caplog):
    """On a GPU engine the noise alone is made here."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    cpu.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        noise = [philox_normal(0, [i], (1, 2, 2)) for i in (0, 0, 1)]
        philox_normal(0, [0], (1, 2, 2), kernel="reference")
    np.testing.assert_array_equal(noise[0], noise[1])
    assert len(caplog.records) == 1 and "pip install --force-reinstall" in caplog.text


def test_a_broken_compiler_does_not_stop_the_build(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    from piflow_edge.kernels.build import library_name

    script = (
        "from setuptools import setup, Extension\n"
        "from piflow_edge.kernels.build import BuildKernels\n"
        f"sources = [{str(KERNELS / 'kernels.cpp')!r}, {str(KERNELS / 'isa.cpp')!r}]\n"
        "extension = Extension('piflow_edge.kernels.piflow_kernels', sources, optional=True)\n"
        "setup(name='broken', ext_modules=[extension], cmdclass={'build_ext': BuildKernels})\n"
    )
    out = run(
        *(
            sys.executable,
            "-c",
            script,
            "build_ext",
            "--build-lib",
            tmp_path / "lib",
            "--build-temp",
            tmp_path / "temp",
        ),
        env=os.environ | {"CC": "false", "CXX": "false", "PYTHONPATH": str(KERNELS.parents[1])},
        cwd=tmp_path,
    )
    assert "NumPy will do their work" in out
    assert not list(tmp_path.rglob(library_name()))
