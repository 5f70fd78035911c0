"""Parts of benchmarks/gpu_day.sh: each writes one JSON file into the folder --out. Exit status 2: it lacks a GPU.

Run: benchmarks/gpu_day.sh OUT, which gives each part its time
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from benchmarks.export_cost import make_student
from piflow_edge.errors import PiFlowError
from piflow_edge.kernels import cuda, nvidia
from piflow_edge.system.hardware import machine, power_state, versions

PACKAGES = (
    "numpy",
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
ENGINES = ("tensorrt", "ort-cuda")
# Bundle -> size of its network, precisions; "digits" is the one that comes with the package.
BUNDLES = {
    "large": ("8M", ("fp32", "fp16", "int8-qdq")),
    "675M": ("675M", ("fp32", "fp16")),
}
# Draws images until it ends by itself: nothing is closed, as in most people's programs.
DRAWS = """
import sys
import piflow_edge as pf
generator = pf.load(sys.argv[1], engine=sys.argv[2], precision=sys.argv[3])
for seed in range(40):
    generator(labels=[0, 1, 2], seed=seed, output="numpy")
print("done")
"""


class NoGpuError(Exception):
    """This machine lacks something that the part needs."""


def check_gpu() -> None:
    if (reason := cuda.missing()) is not None:
        raise NoGpuError(reason)


def tell_facts(out: Path) -> dict[str, Any]:
    """What the machine is."""
    facts = {**machine(), "packages": versions(PACKAGES), "power": power_state(), "lacks": cuda.missing()}
    if facts["lacks"] is None:
        free, total = nvidia.memory(0)
        facts |= {"gpu": nvidia.name(0), "driver_cuda": nvidia.driver_version(), "free": free, "total": total}
    doctor = subprocess.run(
        [sys.executable, "-m", "piflow_edge.cli", "doctor", "--json"], capture_output=True, text=True
    )
    try:
        facts["doctor"] = json.loads(doctor.stdout)
    except ValueError:
        facts["doctor"] = {"status": doctor.returncode, "said": doctor.stderr[-2000:]}
    return facts


def make_bundles(out: Path, sizes: dict[str, tuple] | None = None) -> dict[str, Any]:
    """Bundles to measure with, those that are not there yet; each moves into place once it is whole."""
    from piflow_edge.bundle.folder import find_bundle
    from piflow_edge.export.to_bundle import export_bundle

    if not (out / "digits").exists():
        shutil.copytree(find_bundle("digits"), out / "digits")
    seconds = {}
    for name, (size, precisions) in (sizes or BUNDLES).items():
        if (out / name).exists():
            continue
        began = time.perf_counter()
        export_bundle(make_student(size), out / name, precisions=precisions)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    return {"seconds": seconds}


def run_tests(out: Path) -> dict[str, Any]:
    """The tests that need a GPU."""
    file = out / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junit-xml={file}",
    ]
    done = subprocess.run([*command, "tests/kernels"])
    if done.returncode not in (0, 1):
        raise NoGpuError(f"pytest ended with status {done.returncode}")
    cases = {}
    for case in ElementTree.parse(file).iter("testcase"):
        ends = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        cases[case.get("name")] = ends[0] if ends else "passed"
    return {"status": done.returncode, "tests": cases}


def time_torch(out: Path, sizes: tuple[str, ...] = ("8M", "675M"), device: str = "cuda") -> dict[str, Any]:
    """The same networks in PyTorch: eager, compiled, and as a CUDA graph; median milliseconds a call at batch 1."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NoGpuError(f"torch {torch.__version__} finds no NVIDIA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    lines: list[dict[str, Any]] = []
    for size in sizes:
        network = make_student(size).network.to(device)
        for dtype in (torch.float32, torch.float16):
            lines.append({"network": size, "dtype": str(dtype).removeprefix("torch."), "ms": {}})
            for name, call in make_contenders(network.to(dtype), dtype, device):
                try:
                    lines[-1]["ms"][name] = measure_ms(call, device)
                except (
                    RuntimeError
                ) as error:  # a compiler that is missing, or operators that cannot be recorded
                    lines[-1]["ms"][name] = None
                    lines[-1].setdefault("failed", {})[name] = str(error).splitlines()[0]
                write(
                    out, "torch", {"versions": versions(PACKAGES), "lines": lines}
                )  # what there is, if time runs out
    return {"versions": versions(PACKAGES), "lines": lines}


def make_contenders(network: Any, dtype: Any, device: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    x_t = torch.randn(1, *network.sample_shape, device=device, dtype=dtype)
    t, labels = (
        torch.full((1,), 0.7, device=device, dtype=dtype),
        torch.zeros(1, dtype=torch.int64, device=device),
    )

    def call() -> Any:
        with torch.no_grad():
            return network(x_t, t, labels=labels)

    yield "eager", call
    if device == "cuda":
        yield "CUDA graph", record(call)
    yield "compiled", torch.compile(call)


def record(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, recorded at its first use."""
    import torch

    graph: list[Any] = []

    def replay() -> None:
        if not graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            graph.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graph[0]):
                call()
        graph[0].replay()

    return replay


def measure_ms(call: Callable[[], Any], device: str, repeats: int = 30) -> float:
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(5 + repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append((time.perf_counter() - began) * 1e3)
    return round(median(times[5:]), 4)


def find_engines() -> list[str]:
    """The engines for a GPU that are installed."""
    found = versions(("tensorrt", "onnxruntime-gpu"))
    return [
        name
        for name, package in zip(ENGINES, ("tensorrt", "onnxruntime-gpu"), strict=True)
        if package in found
    ]


def try_exits(out: Path, engines: list[str] | None = None, runs: int = 3) -> dict[str, Any]:
    """How processes end that draw images and close nothing: an engine once ended them with signal 6."""
    if engines is None:
        check_gpu()
    lines = []
    for engine in engines or find_engines():
        for bundle, precision in (("digits", "fp32"), ("large", "fp16")):
            command = [sys.executable, "-c", DRAWS, str(out / bundle), engine, precision]
            for _ in range(runs if (out / bundle).exists() else 0):
                done = subprocess.run(command, capture_output=True, text=True)
                clean = done.returncode == 0 and done.stdout == "done\n" and not done.stderr
                lines.append({"engine": engine, "bundle": bundle, "precision": precision, "status": done.returncode,
                              "clean": clean, "stderr": done.stderr[-1000:]})  # fmt: skip
                write(out, "exits", {"lines": lines})
    return {"lines": lines, "all_clean": bool(lines) and all(line["clean"] for line in lines)}


def watch_memory(out: Path, images: int = 200) -> dict[str, Any]:
    """Bytes of the GPU that images take: after the first, after many, and once all is closed."""
    check_gpu()
    import piflow_edge as pf

    def used() -> int:
        free, total = nvidia.memory(0)
        return total - free

    lines = []
    for engine in find_engines():
        before = used()
        try:
            with pf.load(out / "digits", engine=engine) as generator:
                generator([3], output="numpy")
                first = used()
                for seed in range(images):
                    generator([3], seed=seed, output="numpy")
                last = used()
        except PiFlowError as error:
            lines.append({"engine": engine, "failed": str(error)})
            continue
        lines.append({"engine": engine, "images": images, "first": first - before, "last": last - before,
                      "closed": used() - before})  # fmt: skip
    return {"lines": lines}


def write(out: Path, name: str, found: dict[str, Any]) -> None:
    whole = out / f"{name}.json.part"
    whole.write_text(json.dumps(found, indent=1, default=str) + "\n")
    os.replace(whole, out / f"{name}.json")


PARTS = {
    "facts": tell_facts,
    "bundles": make_bundles,
    "tests": run_tests,
    "torch": time_torch,
    "exits": try_exits,
    "memory": watch_memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "engines"])
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    if options.part == "engines":
        print(" ".join(find_engines()))
        return 0
    try:
        found = PARTS[options.part](options.out)
    except NoGpuError as error:
        print(f"gpu_day {options.part}: {error}", file=sys.stderr)
        return 2
    write(options.out, options.part, found)
    return 0 if found.get("all_clean", True) and not found.get("status") else 1


if __name__ == "__main__":
    sys.exit(main())
