"""What test_kernels.py runs in a process of its own: the most memory one rollout takes, as a multiple of its state.

Usage: python rollout_memory.py numpy|torch. The operating system counts: arrays of NumPy and torch, the kernel's
tiles, the stacks of threads.
"""

import sys
from pathlib import Path

from piflow_edge import GMPolicy
from piflow_edge.kernels.rollout import integrate
from tests.helpers.rollout_cases import gm_case, levels

library = sys.argv[1]
sigmas = levels(1.0, 0.0, 2)


def case(size):
    inputs = gm_case(0, B=1, K=8, C=16, size=size)
    if library == "torch":
        import torch

        inputs = {k: v if k == "sigma_src" else torch.from_numpy(v) for k, v in inputs.items()}
    return inputs


def kib(field):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


def roll_out(inputs):
    return integrate(GMPolicy(**inputs), inputs["x_src"], sigmas, kernel="cpu", num_threads=2)


roll_out(case((64, 64)))  # loads what is loaded once
inputs = case((128, 128))
try:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, starts anew
except OSError as error:
    sys.exit(f"no peaks here: {error}")
before = kib("VmRSS")
x_dst = roll_out(inputs)
state = 16 * 128 * 128 * 4 / 1024
print((kib("VmHWM") - before) / state)
