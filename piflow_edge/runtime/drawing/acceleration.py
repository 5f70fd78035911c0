"""What a rollout is computed with here: the compiled CPU kernel and NVIDIA's driver, for `doctor` to look at."""

from piflow_edge.kernels.cpu import isas, missing
from piflow_edge.kernels.nvidia import PIP_COMMAND, PIP_COMMAND_12, driver_cuda_version
from piflow_edge.kernels.rollout import integrate

__all__ = ["PIP_COMMAND", "PIP_COMMAND_12", "driver_cuda_version", "integrate", "isas", "missing"]
