"""How often does `piflow-edge bench --compare` say that something moved when nothing did? One JSON line answers.

The same bundle is measured again and again in fresh processes, and every run compared with every other. Nothing
changed between them, so each verdict but "within noise" is a false alarm. What a change must exceed is taken from the
fresh processes of each pair; beside it stands what would come of the assumption that holds without them.

Run: python -m benchmarks.noise --demo demo
"""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.timing import answer, parser
from piflow_edge.bench.comparison_of_runs import PROCESS_NOISE, compare


def run(bundle, options):
    command = [sys.executable, "-m", "piflow_edge.cli", "bench", bundle, "--rounds", str(options.rounds)]
    command += ["--batch", options.batch, "--cold-starts", str(options.cold_starts), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout)


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, required=True, help="folder of piflow-edge demo")
    options.add_argument("--runs", type=int, default=8)
    options.add_argument("--rounds", type=int, default=100)
    options.add_argument("--cold-starts", type=int, default=3)
    options.add_argument("--batch", default="1,8")
    options = options.parse_args(arguments)
    bundle = str(options.demo / "bundles" / "digits-nfe1")
    runs = [run(bundle, options) for _ in range(options.runs)]
    compared = [compare(*pair) for pair in combinations(runs, 2)]
    changes = [change for one in compared for change in one.changes]
    off = np.array([abs(np.log(change.ratio)) for change in changes])
    outside = [change.low > 1 or change.high < 1 for change in changes]
    found = {
        "runs": options.runs,
        "rounds": options.rounds,
        "comparisons": len(changes),
        "false_alarms": sum(change.verdict != "within noise" for change in changes),
        "intervals_without_1": sum(outside),
        "must_exceed": float(np.median([one.process_noise for one in compared])),
        "must_exceed_at_most": max(one.process_noise for one in compared),
        "measured": all(one.measured for one in compared),
        "assumed": PROCESS_NOISE,
        "false_alarms_by_assumption": sum(
            outside_1 and bool(abs(np.log(change.ratio)) > np.log1p(PROCESS_NOISE))
            for change, outside_1 in zip(changes, outside, strict=True)
        ),
        "differences_of_medians": {
            f"{share} %": float(np.expm1(np.percentile(off, share))) for share in (50, 95, 100)
        },
    }
    answer(options, found)


if __name__ == "__main__":
    main()
