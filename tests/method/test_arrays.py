"""Which functions go with an array, and that NumPy's come without what nobody here uses."""

import subprocess
import sys

import array_api_compat
import numpy as np
import pytest

from piflow_edge.arrays import array_namespace

needs_numpy_2_1 = pytest.mark.skipif(not hasattr(np, "astype"), reason="NumPy is no namespace before 2.1")


@needs_numpy_2_1
def test_numpys_arrays_have_numpys_functions():
    assert array_namespace(np.zeros(2), np.ones(3, np.float32)) is np


def test_an_older_numpy_is_brought_up_to_the_standard(monkeypatch):
    monkeypatch.setattr("piflow_edge.arrays._NUMPY_IS_ONE", False)
    xp = array_namespace(np.zeros(2))
    assert xp is not np and array_api_compat.is_numpy_namespace(xp) and callable(xp.astype)


def test_arrays_of_two_libraries_are_refused():
    class Other:
        def __array_namespace__(self, api_version=None):
            return sys

    with pytest.raises(TypeError):
        array_namespace(np.zeros(2), Other())
    assert array_namespace(Other()) is sys


@needs_numpy_2_1
def test_a_policy_loads_no_part_of_numpy_that_it_does_not_use():
    code = (
        "import sys, numpy as np; from piflow_edge import GMPolicy, rollout;"
        "shapes = (1, 2, 1, 3, 3), (1, 2, 1, 3, 3), (1, 1, 1, 1, 1), (1, 1, 3, 3);"
        "*outputs, x_src = (np.ones(shape, np.float32) for shape in shapes);"
        "rollout(GMPolicy(*outputs, x_src, 1.0), x_src, 1.0, 0.0, 4);"
        "sys.exit(str([m for m in ('numpy.f2py', 'numpy.testing', 'importlib.metadata') if m in sys.modules]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "[]\n"
