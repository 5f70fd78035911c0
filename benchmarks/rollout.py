"""How fast is a rollout on the CPU: NumPy, TorchScript, the compiled kernel, and DX policies in closed form?

Every contender starts from the student's output and ends with the state, in one process, in turn, so that noise hits
all alike; medians are printed. All must compute the same. One JSON line answers; a table goes to stderr. How time grows
with substeps is scaling.py's question.

Run: python -m benchmarks.rollout                                  (about 3 minutes)
     python -m benchmarks.rollout --size 32,4,32,32 --substeps 16 64 128 --batch 1
"""

import os
import sys
import warnings
from itertools import product

# Idle OpenMP threads of torch shall sleep, not spin: they would take the core from the next contender.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from benchmarks.formula import gm_in_torch
from benchmarks.timing import answer, medians_of, parser, time_ms
from piflow_edge import DXPolicy, GMPolicy
from piflow_edge.kernels import cpu
from piflow_edge.kernels.rollout import integrate

GM_SIZES = [(8, 1, 8, 8), (32, 4, 32, 32), (8, 16, 64, 64), (8, 16, 128, 128)]
DX_SIZES = [(10, 4, 32, 32), (10, 16, 128, 128)]
EPS = 1e-4


def gm_contenders(size, batch, sigmas):
    K, C, *space = size
    rng = np.random.default_rng(0)
    means = rng.standard_normal((batch, K, C, *space), np.float32)
    logweights = rng.standard_normal((batch, K, 1, *space), np.float32)
    logstds = np.full((batch, 1, 1, *(1 for _ in space)), -2, np.float32)
    x_src = rng.standard_normal((batch, C, *space), np.float32)
    outputs = (means, logweights, logstds, x_src)
    tensors = [torch.from_numpy(a) for a in outputs]
    scripted = torch.jit.script(gm_in_torch)

    def rolled_out(kernel, num_threads=None):
        policy = GMPolicy(*outputs, sigmas[0], eps=EPS)
        return integrate(policy, x_src, sigmas, kernel=kernel, num_threads=num_threads)

    def torchscript(num_threads):
        torch.set_num_threads(num_threads)
        with torch.no_grad():
            return scripted(*tensors, sigmas.tolist()).numpy()

    exact = GMPolicy(*(a[:1].astype(np.float64) for a in outputs), sigmas[0], eps=EPS)
    return exact, {
        "numpy": lambda: rolled_out("reference"),
        "torchscript, 1 thread": lambda: torchscript(1),
        "torchscript, 2 threads": lambda: torchscript(2),
        "kernel, 1 thread": lambda: rolled_out("cpu", 1),
        "kernel, 2 threads": lambda: rolled_out("cpu", 2),
    }


def dx_contenders(size, batch, sigmas):
    N, C, *space = size
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((batch, N, C, *space), np.float32)
    x_src = rng.standard_normal((batch, C, *space), np.float32)

    def policy():
        return DXPolicy(grid, x_src, sigmas[0], segment_size=1.0, eps=EPS)

    def run_compiled(num_threads):
        return integrate(policy(), x_src, sigmas, kernel="cpu", num_threads=num_threads)

    exact = DXPolicy(grid[:1].astype(np.float64), x_src[:1].astype(np.float64), sigmas[0], segment_size=1.0)
    return exact, {
        "numpy loop": lambda: integrate(policy(), x_src, sigmas, kernel="reference"),
        "numpy closed form": lambda: policy().closed_form(x_src, sigmas),
        "kernel, 1 thread": lambda: run_compiled(1),
        "kernel, 2 threads": lambda: run_compiled(2),
    }


def gm_operations(size, batch, substeps):
    """Additions and multiplications the kernel does, counted from its source; a multiply-add is two.

    Components count with those that pad them to groups of four. Maxima, divisions and rounding do not count.
    """
    K, C, *space = size
    gram = -(-K // 4) * 4 <= C and C >= 8  # as gram_is_faster in gm_gram.h
    K = -(-K // 4) * 4
    exponential = 6 * 2 + 4  # a polynomial of degree 6; two differences, a power of two, the sum of weights
    means_and_centring = C * K * (2 + 4)
    if gram:
        # Products of pairs, those with the noise, and the state at the end; then logits, exponentials and mix.
        once = means_and_centring + C * K * (K + 4 + 2 + 2)
        per_substep = K * ((2 * K + 5) + exponential + 3)
    else:
        # Slope; logits, exponentials and the weighted mean; the new state.
        once = means_and_centring
        per_substep = 3 * C + K * ((2 * C + 2) + exponential + 2 * C) + 6 * C
    return batch * np.prod(space) * (once + substeps * per_substep)


def errors(contenders, exact, sigmas):
    """Greatest difference of each from the first sample in float64, which must be small. Also warms up."""
    expected = integrate(exact, exact.x_src, sigmas, kernel="reference")
    worst = {name: float(np.abs(call()[:1] - expected).max()) for name, call in contenders.items()}
    # Where two components weigh the same, the plain formula in float32 goes astray by up to some 1e-3.
    assert max(worst.values()) < 1e-2, worst
    return worst


def peak_gflops(num_threads):
    """What the machine does at best: a large float32 matrix product."""
    torch.set_num_threads(num_threads)
    a = torch.rand(1536, 1536)
    return 2 * 1536**3 / min(time_ms(lambda: a @ a) for _ in range(8)) / 1e6


def sizes(text):
    return [tuple(int(n) for n in size.split(",")) for size in text.split()]


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--size", type=sizes, default=GM_SIZES, help='GM policies, "K,C,H,W ..."')
    options.add_argument("--dx-size", type=sizes, default=DX_SIZES, help='DX policies, "N,C,H,W ..."')
    options.add_argument("--substeps", type=int, nargs="+", default=[128])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--rounds", type=int, default=15, help="of all contenders, at most")
    options.add_argument("--seconds", type=float, default=10, help="for one line of the table, about")
    options = options.parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # TorchScript is

    peaks = {n: round(peak_gflops(n), 1) for n in (1, 2)}
    conditions = {
        "isa": cpu.isas()[0],
        "dtype": "float32",
        "rounds": options.rounds,
        "seconds": options.seconds,
        "matrix_product_gflops": peaks,
    }
    cases = [("gm", gm_contenders, size) for size in options.size]
    cases += [("dx", dx_contenders, size) for size in options.dx_size]
    lines = []
    for (policy, contenders, size), batch, substeps in product(cases, options.batch, options.substeps):
        sigmas = np.linspace(1.0, 0.0, substeps + 1)
        exact, calls = contenders(size, batch, sigmas)
        error = errors(calls, exact, sigmas)
        ms = medians_of(calls, options.rounds, options.seconds)
        line = {
            "policy": policy,
            "size": size,
            "batch": batch,
            "substeps": substeps,
            "ms": ms,
            "error": error,
        }
        if policy == "gm":
            rate = gm_operations(size, batch, substeps) / 1e6 / ms["kernel, 1 thread"]
            line["share_of_matrix_product"] = rate / peaks[1]
        lines.append(line)
        print_line(line)
    answer(options, {**conditions, "lines": lines})


def print_line(line):
    share = line.get("share_of_matrix_product")
    title = f"{line['policy']} {' x '.join(map(str, line['size']))}, batch {line['batch']}"
    peak = f"; 1 thread at {share:.0%} of a matrix product's rate" if share else ""
    print(f"\n{title}, {line['substeps']} substeps{peak}", file=sys.stderr)
    print(f"  {'':24} {'ms':>10} {'x kernel, 1 thread':>20} {'2 threads':>10} {'error':>10}", file=sys.stderr)
    one, two = (line["ms"][f"kernel, {threads}"] for threads in ("1 thread", "2 threads"))
    for name, ms in line["ms"].items():
        print(
            f"  {name:24} {ms:10.3f} {ms / one:20.1f} {ms / two:10.1f} {line['error'][name]:10.1e}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
