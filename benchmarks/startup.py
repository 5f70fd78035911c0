"""How long does a user wait before anything happens? Whole processes, in turn, medians; one JSON line answers.

Each contender is a fresh interpreter: `import numpy`, `import piflow_edge` with its public names, `import click`,
`piflow-edge --help`, and with --bundle the time from process start to the first image.

Run: python benchmarks/startup.py --bundle demo/bundles/digits-nfe1
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", help="also time the first image of this bundle")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    script = shutil.which("piflow-edge")
    if script is None:
        parser.error("piflow-edge is not on the PATH; activate the environment it is installed in")
    calls = {
        "python": [sys.executable, "-c", "pass"],
        "import numpy": [sys.executable, "-c", "import numpy"],
        "import piflow_edge": [
            sys.executable,
            "-c",
            "import piflow_edge as pf; pf.GMPolicy, pf.rollout, pf.load",
        ],
        "import click": [sys.executable, "-c", "import click"],
        "piflow-edge --help": [sys.executable, script, "--help"],
    }
    if options.bundle:
        code = f"import piflow_edge as pf; pf.load({options.bundle!r})([0])"
        calls["first image"] = [sys.executable, "-c", code]
    rounds = [{name: seconds(call) for name, call in calls.items()} for _ in range(2 + options.repeats)]
    medians = {name: statistics.median(r[name] for r in rounds[2:]) for name in calls}  # two to warm up
    print(
        json.dumps(
            {
                "ms": {name: round(1000 * value, 1) for name, value in medians.items()},
                "import piflow_edge / import numpy": medians["import piflow_edge"] / medians["import numpy"],
                "--help / import click": medians["piflow-edge --help"] / medians["import click"],
                "repeats": options.repeats,
                "python": platform.python_version(),
                "numpy": version("numpy"),
                "click": version("click"),
            }
        )
    )


if __name__ == "__main__":
    main()
