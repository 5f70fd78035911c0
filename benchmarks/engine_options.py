"""What do threads, spinning and the memory arena cost and bring? A table on stderr, one JSON object on stdout.

Each contender is a process of its own, all in turn: seconds from its start to the first image, then milliseconds and
CPU milliseconds for an image alone and in a batch of 16, and resident memory after the first image and after a batch
of 64.

Run: python -m benchmarks.engine_options demo/bundles/digits-nfe1 --rounds 5
"""

import json
import os
import platform
import subprocess
import sys
from itertools import product
from statistics import median

import click

from piflow_edge.system.hardware import available_cores

CHILD = """
import json, sys, time
import psutil
began = psutil.Process().create_time()
import piflow_edge as pf
bundle, engine, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
generator = pf.load(bundle, engine=engine, options=pf.EngineOptions(**options))
one = generator.conditioner.example(1)
labels = {"arrays": one} if one else {"count": 1}
generator(**labels)
first, memory = time.time() - began, lambda: psutil.Process().memory_info().rss / 2**20
after_first = memory()

def cost(batch, calls):
    several = generator.conditioner.example(batch)
    many = {"arrays": several} if several else {"count": batch}
    took, cpu = [], time.process_time()
    for seed in range(calls):
        start = time.perf_counter()
        generator(**many, seed=seed)
        took.append(1000 * (time.perf_counter() - start))
    return sorted(took)[calls // 2], 1000 * (time.process_time() - cpu) / calls

alone, in_batch = cost(1, 60), cost(16, 10)
cost(64, 2)
print(json.dumps({
    "first_image_s": first, "ms": alone[0], "cpu_ms": alone[1], "batch16_ms": in_batch[0],
    "batch16_cpu_ms": in_batch[1],
    "first_mib": after_first, "batch64_mib": memory(),
}))
"""


@click.command()
@click.argument("bundle")
@click.option("--engine", default="ort-cpu")
@click.option("--rounds", default=5, help="Processes of every contender.")
def main(bundle, engine, rounds):
    """Compare settings of EngineOptions on BUNDLE."""
    threads = sorted({1, available_cores()})
    contenders = [
        {"num_threads": n, "spinning": spinning, "memory_arena": arena, "memory_pattern": arena}
        for n, spinning, arena in product(threads, (False, True), (False, True))
    ]
    runs = {json.dumps(options): [] for options in contenders}
    for _ in range(rounds):
        for options, found in runs.items():
            command = [sys.executable, "-c", CHILD, bundle, engine, options]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    results = []
    for options, found in runs.items():
        results.append(
            {**json.loads(options), **{key: median(run[key] for run in found) for key in found[0]}}
        )
    columns = list(results[0])
    print("  ".join(columns), file=sys.stderr)
    for row in results:
        cells = (f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in columns)
        print(
            "  ".join(cell.rjust(len(name)) for name, cell in zip(columns, cells, strict=True)),
            file=sys.stderr,
        )
    conditions = {
        "command": f"python -m benchmarks.engine_options {bundle} --engine {engine} --rounds {rounds}",
        "machine": platform.machine(), "cores": available_cores(), "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }  # fmt: skip
    print(json.dumps({**conditions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
