"""What does an export cost, beside torch.onnx.export alone? Time and peak memory by stage, each in its own process.

A student of a DiT with random weights for one call per image. Stages build on each other: what a precision costs is its
row less that of fp32. Processor time is quoted beside the clock's: it hangs less on what else the machine does. Ratios
are to `torch.onnx.export` of the same network, saved to a file, in the same run.

Run: python -m benchmarks.export_cost --size 8M 39M --out benchmarks/results/export_cost.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.tables import export_cost
from piflow_edge.system.hardware import machine, memory

# Name -> fields of `DiTConfig` beside 32 x 32 pixels in patches of 2; about so many weights. 675M is DiT-XL/2.
SIZES = {
    "tiny": dict(hidden_size=16, depth=1, num_heads=2, num_classes=10),
    "8M": dict(hidden_size=256, depth=6, num_heads=4, num_classes=1000),
    "39M": dict(hidden_size=512, depth=8, num_heads=8, num_classes=1000),
    "130M": dict(hidden_size=768, depth=12, num_heads=12, num_classes=1000),
    "675M": dict(hidden_size=1152, depth=28, num_heads=16, num_classes=1000),
}
PLAIN = "torch.onnx.export"
# Stage -> precisions of a bundle; None: no bundle yet.
STAGES = {
    PLAIN: None,
    "network_graph": None,
    "fp32": ("fp32",),
    "fp32, fp16": ("fp32", "fp16"),
    "fp32, int8": ("fp32", "int8"),
    "fp32, fp16, int8": ("fp32", "fp16", "int8"),
}


def make_student(size: str):
    from benchmarks.networks import student_of, teacher_of
    from piflow_edge.conditioning import ClassLabels
    from piflow_edge.distill.networks.dit import DiTConfig
    from piflow_edge.distill.sources import StudentModel

    network = student_of(teacher_of(DiTConfig(in_channels=3, sample_size=32, patch_size=2, **SIZES[size])))
    return StudentModel(network, conditioner=ClassLabels(tuple(map(str, range(network.config.num_classes)))))


def export_plainly(student, folder: Path) -> None:
    """What a user of PyTorch would do: no check, no manifest, no golden samples."""
    import torch

    from piflow_edge.export.onnx_graphs.to_onnx import quiet

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = student.network

        def forward(self, x_t, t, labels):
            return self.network(x_t, t, labels=labels)

    example = (
        torch.zeros(2, *student.network.sample_shape),
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
    )
    batch = torch.export.Dim("batch", min=1)
    with quiet():
        program = torch.onnx.export(
            Network().eval(),
            example,
            dynamo=True,
            opset_version=18,
            dynamic_shapes=({0: batch},) * 3,
            verbose=False,
        )
        program.save(folder / "plain.onnx", external_data=True)


def make_call(stage: str, student, folder: Path) -> Callable[[], object]:
    """What a stage does; what it needs is imported here, before its clock starts."""
    from piflow_edge.export.onnx_graphs.to_onnx import network_graph
    from piflow_edge.export.to_bundle import export_bundle

    if stage == PLAIN:
        return lambda: export_plainly(student, folder)
    if stage == "network_graph":
        return lambda: network_graph(student.network)
    return lambda: export_bundle(student, folder / "bundle", precisions=STAGES[stage])


def measure_here(size: str, stage: str) -> dict:
    """Run one stage in this process."""
    student = make_student(size)
    with tempfile.TemporaryDirectory() as folder:
        call = make_call(stage, student, Path(folder))
        before = memory()
        began, cpu = time.perf_counter(), time.process_time()
        call()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = memory()
    return {
        "parameters": sum(parameter.numel() for parameter in student.network.parameters()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        # MB, as the system counts them: torch and the network are there before the stage begins.
        "before_mb": before and round(before.resident),
        "peak_mb": peak and round(peak.peak),
    }


def measure(size: str, stage: str) -> dict:
    """Run one stage in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.export_cost", "--one", size, stage]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        return {"failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def add_ratios(lines: list[dict]) -> None:
    """Ratios to the plain export of the same size, where that ended."""
    plain = {line["size"]: line for line in lines if line["stage"] == PLAIN and "failed" not in line}
    for line in lines:
        if (base := plain.get(line["size"])) and "failed" not in line:
            line["seconds_ratio"] = round(line["seconds"] / max(base["seconds"], 0.1), 2)
            line["cpu_ratio"] = round(line["cpu_seconds"] / max(base["cpu_seconds"], 0.1), 2)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["8M", "39M"])
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path, help="JSON file; the table goes to stdout")
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "STAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure_here(*options.one)))
        return
    lines = []
    for size in options.size:
        for stage in options.stage:
            lines.append({"size": size, "stage": stage, **measure(size, stage)})
            print(f"{size}, {stage}: {lines[-1]}", file=sys.stderr, flush=True)
    add_ratios(lines)
    command = " ".join(["python", "-m", "benchmarks.export_cost", *(arguments or sys.argv[1:])])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {"command": command, **machine(), "load_at_the_end": load, "lines": lines}
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(export_cost(found))


if __name__ == "__main__":
    main()
