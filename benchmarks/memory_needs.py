"""What does drawing an image take in memory, and does `estimate_memory` say so before?

Each precision of each bundle is loaded and draws one image in a process of its own, with all networks open and with one
at a time; the operating system says the highest it had. Beside bundles, DiTs with random weights are exported for it.

Run: python -m benchmarks.memory_needs digits emoji --size 39M 130M --out benchmarks/results/memory_needs.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.export_cost import SIZES
from benchmarks.tables import memory_needs
from piflow_edge.bundle.folder import Bundle, find_bundle
from piflow_edge.runtime.residence.memory_needs import estimate_memory
from piflow_edge.system.hardware import machine

DRAW = """
import sys
import piflow_edge as pf
from piflow_edge.engines import EngineOptions
from piflow_edge.system.hardware import memory

bundle, precision, keep = sys.argv[1:]
with pf.load(bundle, "ort-cpu", precision or None, options=EngineOptions(keep=keep)) as generator:
    steered, prompts = generator.conditioner.inputs, generator.conditioner.example_prompts(1)
    if prompts:
        generator(prompts)
    elif steered:
        generator(arrays=generator.conditioner.example(1))
    else:
        generator(count=1)
    print(memory().peak)
"""


def measure(bundle: str, precision: str, keep: str) -> float:
    """Peak of a process that draws one image, in MB."""
    command = [sys.executable, "-c", DRAW, bundle, precision, keep]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_bundle(name: str) -> list[dict]:
    """A row for each precision."""
    bundle, rows = Bundle(find_bundle(name)), []
    manifest = bundle.manifest
    for precision in manifest.precisions:
        needs = estimate_memory(bundle, precision)
        files = {file for network in manifest.networks for file in manifest.network_files(network, precision)}
        rows.append({
            "bundle": bundle.name, "weights": manifest.provenance.get("parameters"), "precision": precision,
            "file_mb": round(sum(manifest.files[file].size for file in files) / 1e6, 1),
            **{f"estimated_{keep}": round(getattr(needs, keep) / 1e6) for keep in ("all", "one")},
            **{f"measured_{keep}": round(measure(name, precision, keep)) for keep in ("all", "one")},
        })  # fmt: skip
        print(rows[-1], file=sys.stderr)
    return rows


def export(size: str, precisions: str, folder: Path) -> str:
    """A bundle of a DiT with random weights; in a process of its own, whose memory ends with it."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.export_cost import make_student; "
        "from piflow_edge.export.to_bundle import export_bundle; size, folder, precisions = sys.argv[1:]; "
        "export_bundle(make_student(size), Path(folder), precisions=tuple(precisions.split(',')))"
    )
    subprocess.run([sys.executable, "-c", code, size, str(folder), precisions], check=True)
    return str(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--size", nargs="*", default=[], choices=list(SIZES), help="of DiTs to export")
    parser.add_argument("--precision", default="fp32,fp16,int8,int8-weights,int4-64", help="of those")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        made = [export(size, options.precision, Path(place) / size) for size in options.size]
        for name in [*options.bundles, *made]:
            rows += measure_bundle(name)
    command = " ".join(["python", "-m", "benchmarks.memory_needs", *sys.argv[1:]])
    result = {"command": command, **machine(), "rows": rows}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(memory_needs(result))


if __name__ == "__main__":
    main()
