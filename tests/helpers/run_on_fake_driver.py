"""What test_cuda.py runs in a process of its own, whose libcuda.so.1 is fake_driver.cpp."""

import numpy as np

from piflow_edge import GMPolicy
from piflow_edge.errors import EngineError
from piflow_edge.kernels import cuda, nvidia
from piflow_edge.kernels.rollout import integrate
from tests.helpers.pretended_gpu import compile_for_fake_driver
from tests.helpers.rollout_cases import gm_case, levels, wide


class OnHost:
    """As in test_cuda.py, which cannot be imported here: it asks for a GPU."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3}


assert nvidia.device(0) == nvidia.Device(arch="sm_87", multiprocessors=3, shared_bytes=163 << 10)

nvidia.compile_source = compile_for_fake_driver
case, sigmas = gm_case(0, K=5, C=3), levels(1.0)
policy = GMPolicy(**case)
inputs = (policy.means, policy.logweights, policy.x_0_variance, policy.x_src, policy.x_src)
exact = integrate(GMPolicy(**wide(case)), case["x_src"].astype(np.float64), sigmas, kernel="reference")
for stream in (0, 42):
    x_dst = np.full_like(policy.x_src, np.nan)
    cuda.gm_rollout(*map(OnHost, (*inputs, x_dst)), sigmas, 1.0, stream=stream)
    nvidia.wait_for(stream)
    np.testing.assert_allclose(x_dst, exact, rtol=0, atol=1e-5)
nvidia._uploaded.cache_clear()  # frees what was copied

nvidia.kernel.cache_clear()
nvidia.compile_source = lambda arch, defines, source: b"of another version"
try:
    cuda.gm_rollout(*map(OnHost, (*inputs, x_dst)), sigmas, 1.0)
except EngineError as error:
    print(error)
