"""What share of an image's time goes to the policy's integration, beside the network? One JSON line answers.

Students of three sizes, by network calls and substeps: the demo's digits, and two that were never trained, a DiT of 8
million weights with a Gaussian mixture of 8 and one with a DX policy of 10 nodes. Times are those the generator tells
of its own stages, medians over rounds in which all take turns.

Run: python -m benchmarks.rollout_share --demo demo
"""

import tempfile
from itertools import product
from pathlib import Path

from benchmarks.networks import students_in
from benchmarks.timing import answer, parser
from piflow_edge.bench.benchmark import bench
from piflow_edge.bench.config import BenchConfig


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, help="folder of piflow-edge demo; else without the digits")
    options.add_argument("--nfe", type=int, nargs="+", default=[1, 4])
    options.add_argument("--substeps", type=int, nargs="+", default=[32, 128])
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--small", action="store_true", help="tiny networks, to try the script")
    options = options.parse_args(arguments)

    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bundles = students_in(Path(folder), small=options.small)
        if options.demo:
            bundles = {"digits, GM of 8": options.demo / "bundles" / "digits-nfe1", **bundles}
        config = BenchConfig(
            nfes=options.nfe, substeps=options.substeps, rounds=options.rounds, cold_starts=0, warmup=2
        )
        found = bench(list(bundles.values()), config)
    settings = product(bundles, options.nfe, options.substeps)
    for (name, nfe, substeps), row in zip(settings, found.rows, strict=True):
        shown = found.conditions["bundles"][row.setting.model]
        lines.append(
            {
                "student": name,
                "latent": shown["latent"],
                "parameters": shown["parameters"],
                "nfe": nfe,
                "substeps": substeps,
                "ms": row.median,
                "split": row.split,
                "share": row.split["policy"] / (row.split["policy"] + row.split["network"]),
            }
        )
    answer(options, {"engine": found.rows[0].setting.engine, "rounds": options.rounds, "lines": lines})


if __name__ == "__main__":
    main()
