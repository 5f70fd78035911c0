"""Do the engines of an NVIDIA GPU compute what the CPU does, how fast are they, and how long do they take to build?

Each bundle's student is built and opened in each engine and precision, and held to fp32 on the CPU: the network's
outputs on the same states, and images from the same noise, within the bundle's own tolerances. Then all are timed in
turn: one network call with arrays on the host, with arrays on the GPU where an engine takes them, and whole images.
Nothing is fetched; engines go to a cache that is thrown away, or to --cache. Exit status: 0 all agree, 1 some do not or
fail to build or to open, 2 there is no GPU.

Run: python -m benchmarks.gpu_engines --bundle bundles/digits bundles/emoji --out benchmarks/results/gpu_engines.json
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the source tree, installed or not

import piflow_edge as pf

if find_spec("piflow_edge.engines") is None:  # not installed: the folder lies beside the package
    pf.__path__.append(str(ROOT))

from piflow_edge.bundle.folder import Bundle
from piflow_edge.engines import ENGINES
from piflow_edge.engines.building import steps as building
from piflow_edge.errors import PiFlowError
from piflow_edge.kernels import gpu_arrays, nvidia
from piflow_edge.kernels.gpu_arrays import DeviceArray
from piflow_edge.runtime.graphs import find_targets
from piflow_edge.system.hardware import power_state, versions

PACKAGES = ("piflow-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12-libs",
            "tensorrt-cu13-libs", "cuda-bindings")  # fmt: skip
SIGMAS = (1.0, 0.6, 0.2)


def case(generator, batch):
    """Conditioning and starting noise of a batch."""
    conditioning = generator.bundle.manifest.conditioner.example(batch)
    return conditioning, pf.philox_normal(7, range(batch), generator.bundle.manifest.latent.shape)


def network_inputs(generator, batch, sigma):
    conditioning, noise = case(generator, batch)
    return generator.bundle.manifest.network_inputs(noise, sigma, conditioning)


def images(generator, batch):
    conditioning, noise = case(generator, batch)
    many = {"arrays": conditioning} if conditioning else {"count": batch}
    output = "numpy" if generator.bundle.manifest.makes_images else "latent"
    result = generator(noise=noise, output=output, **many)
    return result.latents if result.images is None else result.images


def psnr(image, reference):
    """dB between two images, or latents, of the reference's range."""
    high = 255.0 if reference.dtype == np.uint8 else float(np.ptp(reference))
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(high**2 / error))


def agreement(generator, reference, batch):
    """How far an engine is from fp32 on the CPU, and whether that is within the bundle's tolerances."""
    worst = 0.0
    for sigma in SIGMAS:
        inputs = network_inputs(reference, batch, sigma)
        found, exact = generator.engine.run(inputs), reference.engine.run(inputs)
        for name, value in exact.items():
            error = np.abs(np.asarray(found[name], np.float64) - value).max() / np.abs(value).max()
            worst = max(worst, float(np.nan_to_num(error, nan=np.inf)))
    # The generator makes no images of NaN.
    decibels = psnr(images(generator, batch), images(reference, batch)) if np.isfinite(worst) else 0.0
    allowed = reference.bundle.manifest.tolerances[generator.precision]
    return {
        "outputs": worst,
        "outputs_allowed": allowed.outputs,
        "psnr_db": min(decibels, 999.0),
        "psnr_db_allowed": allowed.psnr,
        "agrees": worst <= allowed.outputs and decibels >= allowed.psnr,
    }


def on_gpu(inputs, ordinal, stream):
    """Copies of NumPy arrays in the GPU's memory."""
    found = {}
    for name, array in inputs.items():
        array = np.ascontiguousarray(array)
        memory = nvidia.Memory(ordinal, array.nbytes)
        nvidia.copy(ordinal, memory.pointer, array.ctypes.data, array.nbytes, stream)
        found[name] = DeviceArray(memory.pointer, str(array.dtype), array.shape, ordinal, memory, stream)
    nvidia.wait_for(stream)
    return found


def calls(generator, batch):
    """What is timed of one engine."""
    inputs, engine = network_inputs(generator, batch, 1.0), generator.engine
    found = {"network": lambda: engine.run(inputs), "images": lambda: images(generator, batch)}
    if engine.name in ("tensorrt", "ort-cuda"):
        stream, formats = gpu_arrays.place(0).stream, getattr(engine, "input_formats", {})
        # TensorRT before 10 takes class ids as int32.
        there = on_gpu({n: a.astype(formats.get(n, a.dtype)) for n, a in inputs.items()}, 0, stream)

        def queue():
            engine.run(there)
            nvidia.wait_for(stream)

        found["network on the GPU"] = queue
    return found


def measure(timed, repeats):
    """Median milliseconds of each call, in turns whose order is drawn anew."""
    for call in timed.values():
        for _ in range(3):  # the third of TensorRT is the first that is replayed
            call()
    rounds = []
    for _ in range(repeats):
        order, row = random.sample(list(timed), len(timed)), {}
        for name in order:
            began = time.perf_counter()
            timed[name]()
            row[name] = (time.perf_counter() - began) * 1e3
        rounds.append(row)
    return {name: median(row[name] for row in rounds) for name in timed}


def measure_build(bundle, engine, precision, batches, own_kernels):
    """Build time, memory and size of an engine that must be built first; None for others."""
    if engine not in building.BUILT_ENGINES:
        return None
    batch = building.Batch(1, max(batches), max(batches))
    own_kernels &= engine == "tensorrt"
    settings = building.BuildSettings(engine=engine, batch=batch, own_kernels=own_kernels)
    reports = []
    for target in find_targets(bundle, precision=precision):
        report = building.build(building.plan(target, settings), settings, say=say)
        facts = {"graph": target.name, "built_now": report.built, "engine_bytes": report.bytes}
        reports.append({**facts, **report.facts, "key": vars(report.plan.key)})
    return reports


def examine(folder, engines, batches, repeats, own_kernels=False):
    """One bundle in every engine and precision: a list of lines for the JSON."""
    bundle, reference = Bundle(folder), pf.load(folder, engine="ort-cpu", precision="fp32")
    lines, opened = [], {}
    for precision in bundle.manifest.precisions:
        for engine in engines:
            line = {"bundle": bundle.name, "engine": engine, "precision": precision}
            lines.append(line)
            say(f"{bundle.name}: {engine}, {precision}")
            try:
                line["build"] = measure_build(bundle, engine, precision, batches, own_kernels)
                began = time.perf_counter()
                generator = pf.load(folder, engine=engine, precision=precision)
                line["open_seconds"] = round(time.perf_counter() - began, 3)
                line["agreement"] = {str(batch): agreement(generator, reference, batch) for batch in batches}
            except PiFlowError as error:
                line["failed"] = str(error)
                say(f"  failed: {error}")
                continue
            opened[engine, precision] = generator, line
    for batch in batches:
        timed = {}
        for (engine, precision), (generator, _) in opened.items():
            for what, call in calls(generator, batch).items():
                timed[engine, precision, what] = call
        for (engine, precision, what), ms in measure(timed, repeats).items():
            _, line = opened[engine, precision]
            line.setdefault("ms", {}).setdefault(what, {})[str(batch)] = round(ms, 4)
    for generator, _ in opened.values():
        generator.close()
    return lines


def conditions(options):
    facts = {
        "command": " ".join(["python", "-m", "benchmarks.gpu_engines", *sys.argv[1:]]),
        "python": sys.version.split()[0],
        "versions": versions(PACKAGES),
        "clocks_and_power": power_state(),
        "repeats": options.repeats,
    }
    if needs_gpu(options.engine):
        free, total = nvidia.memory(0)
        facts |= {
            "gpu": nvidia.name(0),
            "compute_capability": nvidia.device(0).compute_capability,
            "driver_cuda": nvidia.driver_version(),
            "gpu_memory_bytes": total,
            "gpu_memory_free_bytes": free,
        }
    return facts


def needs_gpu(engines):
    return any("cuda" in ENGINES[name][1] for name in engines)


def say(line):
    print(line, file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", nargs="+", type=Path, required=True)
    parser.add_argument("--engine", nargs="+", choices=sorted(ENGINES), default=["tensorrt", "ort-cuda"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=50, help="of all calls, in turns")
    parser.add_argument("--own-kernels", action="store_true", help="as of piflow-edge build")
    parser.add_argument("--cache", type=Path, help="keep engines here; else they are thrown away")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main():
    options = parse()
    if needs_gpu(options.engine):
        try:
            nvidia.name(0)
        except PiFlowError as error:
            say(f"gpu_engines: {', '.join(options.engine)} need an NVIDIA GPU: {error}")
            return 2
    with tempfile.TemporaryDirectory(prefix="piflow-edge-") as thrown_away:
        os.environ["PIFLOW_EDGE_CACHE"] = str(options.cache or thrown_away)
        result = conditions(options)
        try:
            result["lines"] = [
                line
                for folder in options.bundle
                for line in examine(
                    folder, options.engine, options.batch, options.repeats, options.own_kernels
                )
            ]
        except PiFlowError as error:
            say(f"gpu_engines: {error}")
            return error.exit_code
    result["all_agree"] = all(
        "failed" not in line and all(found["agrees"] for found in line["agreement"].values())
        for line in result["lines"]
    )
    text = json.dumps(result, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")
    return 0 if result["all_agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
