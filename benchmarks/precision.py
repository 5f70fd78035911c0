"""What do fp16 and int8 save, and what do they cost? Size, PSNR and FID; time on the CPU and time of export.

Two students: one of the digits, whose images are scored; and a DiT of width 384 with random weights (30 million; its
blocks are not left at the identity), for sizes and times. ONNX Runtime's own profile says where a call's time goes.

Run: piflow-edge distill --nfe 1 --out runs/student-1
     python -m benchmarks.precision --student runs/student-1 --out benchmarks/results/precision.json
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.precisions import PRECISIONS
from piflow_edge.distill.sources import StudentModel, load_student
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.evaluation.features import open_features
from piflow_edge.evaluation.metrics import FeatureSet, frechet_distance
from piflow_edge.evaluation.plan import plan_images
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.runtime.pictures import png_bytes
from piflow_edge.system.hardware import machine
from piflow_edge.system.sheets import as_pil, side_by_side


def wide_student(width: int, depth: int) -> StudentModel:
    """A DiT with a Gaussian-mixture head and weights that make something of every input."""
    import torch

    from piflow_edge.conditioning import ClassLabels
    from piflow_edge.distill.networks.dit import DiTConfig
    from piflow_edge.distill.networks.flow_network import DiTNetwork, attach_policy_head
    from piflow_edge.policies import GMPolicySpec

    torch.manual_seed(0)
    teacher = DiTNetwork(DiTConfig(3, 32, 2, width, depth, num_heads=width // 64))
    for name, layer in teacher.module.named_modules():
        if name.endswith("modulation") or name == "head.out":  # zero in a fresh DiT
            torch.nn.init.normal_(layer.weight, std=0.5 / width**0.5)
    return StudentModel(
        attach_policy_head(teacher, GMPolicySpec(8)), conditioner=ClassLabels(tuple("0123456789"))
    )


def sizes(folder: Path) -> dict:
    """Bytes of the student's graph in each precision, and of a bundle with that precision alone; shares of fp32's."""
    files = {name: spec.size for name, spec in Bundle(folder).manifest.files.items()}
    manifest = (folder / "bundle.json").stat().st_size
    common = manifest + sum(size for name, size in files.items() if not name.startswith("student."))
    graphs = {name: files[f"student.{name}.onnx"] for name in Bundle(folder).manifest.precisions}
    whole = {name: size + common for name, size in graphs.items()}
    return {
        "graph_bytes": graphs,
        "graph_share": {name: round(size / graphs["fp32"], 4) for name, size in graphs.items()},
        "bundle_share": {name: round(size / whole["fp32"], 4) for name, size in whole.items()},
    }


def export_student(student, folder: Path, precisions, report: dict) -> dict:
    """Export, and what the export itself says of size, time and agreement."""
    began, cpu = time.perf_counter(), time.process_time()
    rows = export_bundle(student, folder, precisions=precisions)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    errors = {name: {r.layer: r.error for r in rows if r.precision == name} for name in precisions}
    psnr = {name: 20 * np.log10(255 / max(e["drawn images"], 1e-9)) for name, e in errors.items()}
    kept = Bundle(folder).manifest.provenance["kept_in_fp32"]
    return report | {
        "parameters": Bundle(folder).manifest.provenance["parameters"],
        "export_seconds": round(seconds, 1),
        "export_cpu_seconds": round(cpu, 1),  # of both cores; does not depend on what else runs
        **sizes(folder),
        "psnr_db_to_pytorch": {name: round(float(value), 1) for name, value in psnr.items()},
        "errors": errors,
        "nodes_kept_in_fp32": {name: len(graphs.get("student", {})) for name, graphs in kept.items()},
    }


def score(folder: Path, count: int, picture: Path | None) -> dict:
    """FID of each precision beside the real digits, from the same noise; and PSNR beside fp32."""
    from piflow_edge.distill.data.datasets import load_images

    data = load_images("digits")
    features, labels = open_features("digits"), plan_images(data, count, steered=True).groups
    real = FeatureSet(features(data.batch(np.arange(len(data)))[0]))
    fid, psnr, rows, exact = {}, {}, {}, None
    for name in Bundle(folder).manifest.precisions:
        images = pf.load(folder, precision=name)(labels.tolist(), seed=0, output="numpy").images
        exact = images if exact is None else exact
        error = np.sqrt(np.mean((images.astype(float) - exact) ** 2))
        psnr[name] = None if name == "fp32" else round(float(20 * np.log10(255 / max(error, 1e-9))), 1)
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        fid[name] = float(frechet_distance(features(pixels), real))
        rows[name] = as_pil(images[:10])
    if picture is not None:
        picture.write_bytes(
            png_bytes(side_by_side(rows, [data.conditioner.names[label] for label in labels[:10]]))
        )
    return {
        "images": count,
        "fid": {name: round(value, 3) for name, value in fid.items()},
        "fid_share": {name: round(value / fid["fp32"], 4) for name, value in fid.items()},
        "psnr_db_to_fp32": psnr,
    }


def time_calls(folder: Path, batches, repeats: int) -> dict:
    """Median milliseconds of a network call in each precision, by the clock and of processor time, taken in turns."""
    generators = {name: pf.load(folder, "ort-cpu", name) for name in Bundle(folder).manifest.precisions}
    manifest, result = Bundle(folder).manifest, {}
    for batch in batches:
        x_t = pf.philox_normal(0, range(batch), manifest.latent.shape)
        inputs = manifest.network_inputs(x_t, 1.0, manifest.conditioner.example(batch))
        rounds = []
        for _ in range(repeats + 2):
            rounds.append({})
            for name in random.sample(list(generators), len(generators)):
                clocks = time.perf_counter(), time.process_time()
                generators[name].engine.run(inputs)
                ends = time.perf_counter(), time.process_time()
                rounds[-1][name] = [1e3 * (end - start) for start, end in zip(clocks, ends, strict=True)]
        result[f"batch {batch}"] = {}
        for i, clock in enumerate(("wall", "cpu")):
            ms = {name: median(row[name][i] for row in rounds[2:]) for name in generators}  # two warm up
            result[f"batch {batch}"][clock] = {
                "ms": {name: round(value, 2) for name, value in ms.items()},
                "times_as_fast_as_fp32": {name: round(ms["fp32"] / value, 2) for name, value in ms.items()},
            }
    return result


def profile(folder: Path, precision: str, batch: int, calls: int = 3) -> dict:
    """Share of a call's time by operator, as ONNX Runtime measures it; the largest first, those below 1 % left out."""
    ort = import_onnxruntime()

    manifest = Bundle(folder).manifest
    x_t = pf.philox_normal(0, range(batch), manifest.latent.shape)
    inputs = manifest.network_inputs(x_t, 1.0, manifest.conditioner.example(batch))
    with tempfile.TemporaryDirectory() as place:
        settings = ort.SessionOptions()
        settings.enable_profiling, settings.profile_file_prefix = True, str(Path(place) / "profile")
        settings.log_severity_level = 3
        session = ort.InferenceSession(
            Bundle(folder).read_network("student", precision).model,
            settings,
            providers=["CPUExecutionProvider"],
        )
        session.run(None, inputs)
        warm = time.perf_counter()
        for _ in range(calls):
            session.run(None, inputs)
        ms = 1e3 * (time.perf_counter() - warm) / calls
        events = json.loads(Path(session.end_profiling()).read_text())
    spent: Counter = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = sum(spent.values())
    shares = {op: round(us / total, 3) for op, us in spent.most_common() if us >= 0.01 * total}
    return {"ms": round(ms, 2), "share_by_operator": shares}


def cpu_features() -> list[str]:
    """What of the processor's instructions matters to int8, on Linux."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    wanted = re.compile(r"avx2|avx512(f|_?vnni|_bf16|_fp16)|avx_vnni|amx_\w+|asimddp|i8mm")
    return sorted(flag for flag in flags if wanted.fullmatch(flag))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--student", help="of the digits: a checkpoint of distill; without it only the wide one"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-wide", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON; the digits' picture goes beside it as .png")
    options = parser.parse_args()

    result = {
        "command": " ".join(["python", "-m", "benchmarks.precision", *sys.argv[1:]]),
        **machine(),
        "cpu_features": cpu_features(),
    }
    with tempfile.TemporaryDirectory() as place:
        if options.student:
            folder = Path(place) / "digits"
            result["digits"] = export_student(load_student(options.student), folder, PRECISIONS, {})
            picture = options.out and options.out.with_suffix(".png")
            result["digits"] |= score(folder, options.images, picture)
        if not options.no_wide:
            student = wide_student(options.width, options.depth)
            shape = {"width": options.width, "depth": options.depth, "tokens": 256}
            alone = export_student(student, Path(place) / "fp32", ("fp32",), {})
            folder = Path(place) / "wide"
            result["wide"] = export_student(student, folder, PRECISIONS, shape)
            result["wide"]["export_seconds_fp32_alone"] = alone["export_seconds"]
            result["wide"]["calls"] = time_calls(folder, options.batch, options.repeats)
            result["wide"]["profile"] = {name: profile(folder, name, 1) for name in PRECISIONS}
    text = json.dumps(result, indent=2) + "\n"
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
