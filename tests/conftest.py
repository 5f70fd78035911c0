"""What every test file shares: the array libraries a formula is tried in."""

import importlib.util

import numpy as np
import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if HAS_TORCH else ["distill"]


class Library:
    """An array library as a test needs it: arrays in, NumPy out."""

    def __init__(self, name):
        self.name = name

    def array(self, value):
        if self.name == "torch":
            import torch

            return torch.from_numpy(np.array(value))
        return np.asarray(value)

    def numpy(self, value):
        return value.numpy() if self.name == "torch" else value


@pytest.fixture(params=["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def library(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="torch is not installed; the NumPy half of this test runs")
    return Library(request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param
