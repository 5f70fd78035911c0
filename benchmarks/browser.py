"""How long do first and later pictures of bundles take in a browser? One JSON line answers.

Chromium opens the page of `piflow-edge serve`, which isolates it, so that WebAssembly has threads; then the JavaScript
package draws in WebAssembly with 1 and with 4 threads and in WebGPU, beside Python on ONNX Runtime's CPU provider. The
pictures are compared with Python's. WebGPU on a machine without a GPU is a software adapter, which says that it works
and nothing of its speed; `adapter` names it.

Run: python -m benchmarks.browser digits emoji       after: make web
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import piflow_edge as pf
from benchmarks.serve_load import serving
from benchmarks.timing import answer, medians_of, parser

_RUNTIME = Path(pf.__file__).parent / "web" / "node_modules" / "onnxruntime-web" / "dist"
_FLAGS = [
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-unsafe-webgpu",
]  # fmt: skip
_CONTENDERS = {
    "WebAssembly, 1 thread": {"build": "ort.wasm.min.mjs", "provider": "wasm", "threads": 1},
    "WebAssembly, 4 threads": {"build": "ort.wasm.min.mjs", "provider": "wasm", "threads": 4},
    "WebGPU": {"build": "ort.webgpu.min.mjs", "provider": "webgpu", "threads": 1},
}


def measure(bundle: str, options: argparse.Namespace, flags: list[str]) -> dict:
    """Milliseconds of one bundle by contender, and how far pictures are from Python's."""
    with (
        serving(bundle, "--onnxruntime-web", str(_RUNTIME)) as port,
        tempfile.TemporaryDirectory() as profile,
        pf.load(bundle) as generator,
    ):
        subject = 3 if generator.conditioner.positional == "labels" else "a red apple"
        asked = {
            "program": options.program, "profile": profile, "url": f"http://127.0.0.1:{port}/", "subject": subject,
            "contenders": _CONTENDERS, "images": options.images, "flags": flags,
        }  # fmt: skip
        script = Path(__file__).with_name("browser.mjs")
        done = subprocess.run(
            ["node", script], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True
        )
        seen = json.loads(done.stdout)
        expected = generator([subject], seed=0, output="numpy").images[0].astype(int)
        call = {"python": lambda: generator([subject], output="numpy")}
        python_ms = medians_of(call, options.images)["python"]
    for row in seen["found"].values():
        if "pixels" in row:
            row["levels_off"] = int(np.abs(np.array(row.pop("pixels")) - expected.ravel()).max())
    return {"browser": seen["version"], "python_ms": python_ms, "contenders": seen["found"]}


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("bundles", nargs="+", help="with classes or prompts")
    options.add_argument("--images", type=int, default=50)
    options.add_argument(
        "--adapter", default="swiftshader", help="of WebGPU; default takes the machine's own"
    )
    options = options.parse_args(arguments)
    options.program = (
        shutil.which("chromium") or shutil.which("chromium-browser") or sys.exit("Chromium is missing")
    )
    flags = [*_FLAGS, *([] if options.adapter == "default" else [f"--use-webgpu-adapter={options.adapter}"])]
    found = {bundle: measure(bundle, options, flags) for bundle in options.bundles}
    answer(options, {"load_average": os.getloadavg(), "adapter": options.adapter, "bundles": found})


if __name__ == "__main__":
    main()
