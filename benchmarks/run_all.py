"""Run every benchmark of the page on this machine, and write the page anew. Wants the machine for itself.

Results go to benchmarks/results/, tables into benchmarks/README.md. A script that fails stops nothing; the exit status
is then 1, and its old result stays.

Run: python -m benchmarks.run_all --demo demo                      (about 25 minutes on two cores)
     python -m benchmarks.run_all --demo demo --only startup scaling
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def commands(demo: str) -> dict[str, list[str]]:
    """Name -> script and arguments, without --out."""
    return {
        "startup": ["startup.py", "--demo", demo],
        "evaluate_digits": ["evaluate_digits.py", "--demo", demo],
        "rollout": ["rollout.py"],
        "rollout_share": ["rollout_share.py", "--demo", demo],
        "end_to_end": ["end_to_end.py", "--demo", demo],
        "overhead": ["overhead.py", "--demo", demo],
        "scaling": ["scaling.py", "--plot", "benchmarks/results/scaling.png"],
        "quality_latency": [
            "quality_latency.py", "--demo", demo, "--plot", "benchmarks/results/quality_latency.png",
        ],
        "precision": ["precision.py", "--student", f"{demo}/students/nfe1"],
        "export_cost": ["export_cost.py"],
        "memory_needs": ["memory_needs.py", "digits", "emoji", "--size", "39M", "130M"],
        "training_step": ["training_step.py"],
        "noise": ["noise.py", "--demo", demo],
        "prompts": ["prompts.py", "--text-encoder", "runs/emoji/minilm"],
        "emoji": ["emoji.py", "--picture", "docs/images/emoji.png"],
        "serve_load": ["serve_load.py", "large"],
        "browser": ["browser.py", "digits", "emoji"],
        "soak": ["soak.py", f"{demo}/bundles/digits-nfe2"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", default="demo", help="folder of piflow-edge demo; made if it is not there")
    parser.add_argument(
        "--only", nargs="+", choices=list(commands("")), metavar="NAME", help="names of results"
    )
    options = parser.parse_args()
    if not Path(options.demo, "report", "evaluation.json").exists():
        subprocess.run([sys.executable, "-m", "piflow_edge.cli", "demo", "--out", options.demo], check=True)
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name, (script, *arguments) in commands(options.demo).items():
        if not (HERE / script).exists() or (options.only and name not in options.only):
            continue
        began = time.perf_counter()
        # By the command that stands in the result, from the repository's root.
        command = [
            sys.executable,
            "-m",
            f"benchmarks.{Path(script).stem}",
            *arguments,
            "--out",
            f"benchmarks/results/{name}.json",
        ]
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.DEVNULL)
        print(
            f"{name}: {time.perf_counter() - began:.0f} s, {'failed' if done.returncode else 'done'}",
            flush=True,
        )
        failed += [name] if done.returncode else []
    subprocess.run([sys.executable, "-m", "benchmarks.page"], cwd=HERE.parent, check=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
