"""What does it cost to have the whole sampler in one ONNX graph, beside the Python runtime? One JSON line answers.

Both start from the same noise and end with uint8 images, on the same engine, in turn; they must agree. The bundle
is one that was exported with --sampler-graph.

Run: python -m benchmarks.sampler_graph --bundle bundles/digits --batch 1 8 64
"""

import argparse
import json
import logging
import os
import platform
import random
import sys
import time
from importlib.metadata import version
from statistics import median

import numpy as np

import piflow_edge as pf
from piflow_edge.engines import open_engine
from piflow_edge.runtime.graphs import read_graph


def contenders(generator, nfe, batch):
    """The same images by the runtime and by the graph."""
    opened = generator.bundle
    graph = open_engine(read_graph(opened, f"sampler.nfe{nfe}"))
    conditioning = generator.conditioner.example(batch)
    noise = pf.philox_normal(0, range(batch), opened.manifest.latent.shape)
    inputs = {"noise": noise, **conditioning}
    return {
        "runtime": lambda: vars(generator(arrays=conditioning, noise=noise, nfe=nfe, output="numpy")),
        "graph": lambda: graph.run(inputs),
    }


def time_ms(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(calls, repeats):
    """Median ms of each, in turns whose order is drawn anew; and how far the latents differ."""
    latents = [call()["latents"] for call in calls.values()]  # warms up
    difference = float(np.abs(latents[0] - latents[1]).max() / np.abs(latents[0]).max())
    assert difference < 1e-4, difference
    rounds = []
    for _ in range(repeats):
        order = random.sample(list(calls), len(calls))
        rounds.append({name: time_ms(calls[name]) for name in order})
    return {name: median(row[name] for row in rounds) for name in calls}, difference


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()

    logging.getLogger("piflow_edge").setLevel(logging.ERROR)  # other calls than trained are wanted here
    generator = pf.load(options.bundle)
    lines = []
    for nfe in generator.bundle.manifest.samplers:
        for batch in options.batch:
            ms, difference = measure(contenders(generator, nfe, batch), options.repeats)
            ms = {name: round(value, 3) for name, value in ms.items()}
            ratio = round(ms["graph"] / ms["runtime"], 2)
            lines.append(
                {"nfe": nfe, "batch": batch, "ms": ms, "graph / runtime": ratio, "difference": difference}
            )
    manifest = generator.bundle.manifest
    conditions = {
        "command": " ".join(["python", "-m", "benchmarks.sampler_graph", *sys.argv[1:]]),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "engine": f"{generator.engine.name} on {generator.engine.device}",
        "components": manifest.policy.num_components,
        "latent": manifest.latent.shape,
        "total_substeps": manifest.schedule.total_substeps,
        "parameters": manifest.provenance.get("parameters"),
        "versions": {package: version(package) for package in ("piflow-edge", "numpy", "onnxruntime")},
    }
    print(json.dumps({**conditions, "lines": lines}))


if __name__ == "__main__":
    main()
