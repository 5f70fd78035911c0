"""How few evaluations of the policy lead where the trained Euler steps lead? A table, then one JSON line, answer.

Every solver makes the same images from the same noise in float64. Distances are those of the latents, relative: of the
whole in the Euclidean norm, and of the worst value beside the largest. A student is trained against the end of its
Euler steps, so the distance to that counts; the distance to the exact solution of the policy's ODE is given beside
it, since a solver of higher order converges to that one, and on these students Euler's 128 steps are themselves 3e-3
to 5e-3 away from it. So no ordinary solver can come within 1e-3 of Euler, and with 32 evaluations none comes near
even its own limit: x_0 moves fastest where sigma nears 0, and there even substeps are too long. "multistep" follows
Euler's recursion instead, and asks more often at low noise.

Run: python -m benchmarks.solvers demo/bundles/digits-nfe1 demo/bundles/digits-nfe2 demo/bundles/digits-nfe4
"""

import argparse
import json
import logging
import sys
from importlib.metadata import version
from itertools import pairwise

import numpy as np

import piflow_edge as pf
from piflow_edge.kernels.rollout import integrate
from piflow_edge.schedule import segment_sigmas

EXACT_SUBSTEPS = 4096  # of the midpoint rule; half as many end within 1e-6 of it


def midpoint(policy, x_t, sigmas):
    for sigma_t, sigma_next in pairwise(sigmas):
        step = sigma_next - sigma_t
        half_way = x_t + step / 2 * policy.velocity(x_t, sigma_t)
        x_t = x_t + step * policy.velocity(half_way, sigma_t + step / 2)
    return x_t


def heun(policy, x_t, sigmas):
    for sigma_t, sigma_next in pairwise(sigmas):
        u_t, step = policy.velocity(x_t, sigma_t), sigma_next - sigma_t
        if sigma_next > 0:  # at 0 the velocity is 0 / 0
            u_t = (u_t + policy.velocity(x_t + step * u_t, sigma_next)) / 2
        x_t = x_t + step * u_t
    return x_t


def adams_bashforth(policy, x_t, sigmas):
    last = None
    for sigma_t, sigma_next in pairwise(sigmas):
        u_t, step = policy.velocity(x_t, sigma_t), sigma_next - sigma_t
        slope = 0 if last is None else (u_t - last[0]) / (sigma_t - last[1])
        x_t, last = x_t + step * (u_t + step / 2 * slope), (u_t, sigma_t)
    return x_t


def dpm_solver_2m(policy, x_t, sigmas):
    """DPM-Solver++(2M), Lu et al., arXiv:2211.01095: x_0 extrapolated in log(alpha / sigma)."""
    last = None
    for sigma_t, sigma_next in pairwise(sigmas):
        x_0 = ahead = x_t - sigma_t * policy.velocity(x_t, sigma_t)
        if last is not None and last[1] < 1 and sigma_next > 0:  # where the logarithms are finite
            before, now, then = (np.log((1 - sigma) / sigma) for sigma in (last[1], sigma_t, sigma_next))
            ahead = x_0 + (x_0 - last[0]) * (then - now) / (2 * (now - before))
        kept = sigma_next / sigma_t
        x_t, last = kept * x_t + (1 - kept) * ahead, (x_0, sigma_t)
    return x_t


def euler(policy, x_t, sigmas):
    return integrate(policy, x_t, sigmas, kernel="reference")


def multistep(policy, x_t, sigmas):
    return integrate(policy, x_t, sigmas, kernel="reference", solver="multistep")


# Name -> the solver, and how many evaluations one of its substeps takes.
SOLVERS = {
    "euler": (euler, 1),
    "midpoint": (midpoint, 2),
    "heun": (heun, 2),
    "adams-bashforth": (adams_bashforth, 1),
    "dpm-solver++(2m)": (dpm_solver_2m, 1),
}


class CountingPolicy:
    """A policy that counts its evaluations."""

    def __init__(self, policy, counts):
        self.policy, self.counts = policy, counts

    def velocity(self, x_t, sigma_t):
        self.counts.append(sigma_t)
        return self.policy.velocity(x_t, sigma_t)


def latents(generator, noise, conditioning, solver, total_substeps):
    """The latents in float64, and the evaluations of the policy they took."""
    manifest = generator.bundle.manifest
    schedule = manifest.schedule.schedule(total_substeps=total_substeps)
    x_t, counts = noise.astype(np.float64), []
    for segment in schedule.segments:
        outputs = generator.student.outputs(x_t.astype(np.float32), segment.sigma_src, conditioning)
        outputs = {name: value.astype(np.float64) for name, value in outputs.items()}
        policy = CountingPolicy(generator.student.as_policy(outputs, x_t, segment.sigma_src), counts)
        ends = (segment.sigma_src, segment.sigma_dst, segment.substeps)
        x_t = solver(policy, x_t, segment_sigmas(*ends, schedule.shift))
    return x_t, len(counts)


def distance(ours, theirs):
    return {
        "norm": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        "worst": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }


def compare(generator, images, seed):
    """A row for each solver and number of evaluations."""
    manifest = generator.bundle.manifest
    trained = manifest.schedule.total_substeps
    noise = pf.philox_normal(seed, range(images), manifest.latent.shape)
    conditioning = generator.bundle.manifest.conditioner.example(images)
    end, _ = latents(generator, noise, conditioning, euler, trained)
    exact, _ = latents(generator, noise, conditioning, midpoint, EXACT_SUBSTEPS)
    cases = [
        (name, solver, trained // share // evaluations)
        for share in (1, 2, 4, 8)
        for name, (solver, evaluations) in SOLVERS.items()
    ]
    cases.append(("multistep", multistep, trained))  # follows Euler's substeps, so they stay what they are
    rows = []
    for name, solver, substeps in cases:
        found, evaluations = latents(generator, noise, conditioning, solver, substeps)
        levels = np.abs(generator.decode(found).astype(int) - generator.decode(end)).max()
        row = {"solver": name, "evaluations": evaluations, "to_euler": distance(found, end)}
        rows.append({**row, "to_exact": distance(found, exact), "image_levels": int(levels)})
    return rows


def print_rows(name, rows):
    print(f"\n{name}\n  {'':18} {'':>5} {'to Euler as trained':>21} {'to the exact ODE':>21} {'images':>8}")
    print(f"  {'solver':18} {'asked':>5} " + f"{'norm':>10} {'worst':>10} " * 2 + f"{'levels':>8}")
    for row in rows:
        numbers = [row[to][kind] for to in ("to_euler", "to_exact") for kind in ("norm", "worst")]
        cells = " ".join(f"{number:10.1e}" for number in numbers)
        print(f"  {row['solver']:18} {row['evaluations']:5} {cells} {row['image_levels']:8}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("piflow_edge").setLevel(logging.ERROR)

    lines = []
    for bundle in options.bundles:
        generator = pf.load(bundle)
        rows = compare(generator, options.images, options.seed)
        print_rows(generator.bundle.name, rows)
        lines.append({"bundle": generator.bundle.name, "rows": rows})
    conditions = {
        "command": " ".join(["python", "-m", "benchmarks.solvers", *sys.argv[1:]]),
        "dtype": "float64",
        "images": options.images,
        "seed": options.seed,
        "versions": {package: version(package) for package in ("piflow-edge", "numpy", "onnxruntime")},
    }
    print(json.dumps({**conditions, "lines": lines}))


if __name__ == "__main__":
    main()
