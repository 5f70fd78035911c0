"""How long does a user wait before anything happens, and how much memory does it take? One JSON line answers.

Each contender is a fresh interpreter, in turn, medians: `import numpy`, `import piflow_edge` with its public names,
`import click`, `piflow-edge --help`; with --demo the time from process start to the first image of the demo's bundle,
and the same student from its checkpoint in PyTorch, as an app without this runtime would run it. What a process holds
after its first image is asked in further ones, for the question takes time too. All have their bytecode, as pip
writes it: where none may be written, a checkout would be compiled at every start.

Run: python -m benchmarks.startup --demo demo
"""

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import answer, medians_of, parser

IMPORTS = {
    "python": "pass",
    "import numpy": "import numpy",
    "import piflow_edge": "import piflow_edge as pf; pf.GMPolicy, pf.rollout, pf.load",
    "import click": "import click",
    "import torch": "import torch",
    "import diffusers": "from diffusers import DiTPipeline",
}
FIRST_IMAGE = "import piflow_edge as pf; images = pf.load({bundle!r})([0]).images"
IN_TORCH = """
import torch
import piflow_edge as pf
from piflow_edge.distill.loop.checkpoint import load_checkpoint
from piflow_edge.distill.sources import network_of
from piflow_edge.runtime.images import decode
from piflow_edge.system.sheets import as_pil
from pathlib import Path

network = network_of(load_checkpoint(Path({student!r}), kind="student"))
noise = torch.from_numpy(pf.philox_normal(0, range(1), network.sample_shape))
with torch.no_grad():
    outputs = network(noise, torch.ones(1), labels=torch.zeros(1, dtype=torch.int64))
latents = pf.rollout(pf.GMPolicy(*outputs, noise, 1.0), noise, 1.0, 0.0, 128)
images = as_pil(decode(latents.numpy()))
"""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
HOLDS = "\nfrom piflow_edge.system.hardware import memory; print(*(memory() or ()))"


def runs(command):
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def measure_memory(code, repeats):
    """MB that a process holds after `code`, and its peak; medians, None where the system does not tell."""
    told = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", code + HOLDS], check=True, capture_output=True, text=True, env=ENVIRONMENT
        )
        told.append([float(number) for number in done.stdout.split()])
    if not all(told):
        return None
    resident, peak = (round(statistics.median(numbers), 1) for numbers in zip(*told, strict=True))
    return {"resident": resident, "peak": peak}


def main(arguments=None):
    options = parser(__doc__)
    options.add_argument("--demo", type=Path, help="folder of piflow-edge demo: also time its first image")
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--skip", nargs="+", default=[], help="contenders to leave out")
    options = options.parse_args(arguments)
    script = shutil.which("piflow-edge", path=str(Path(sys.executable).parent)) or shutil.which("piflow-edge")
    if script is None:
        sys.exit("piflow-edge is not on the PATH; activate the environment it is installed in")

    codes, memory = dict(IMPORTS), {}
    if not importlib.util.find_spec("diffusers"):
        del codes["import diffusers"]
    if options.demo:
        memory["first image"] = FIRST_IMAGE.format(bundle=str(options.demo / "bundles" / "digits-nfe1"))
        memory["first image in PyTorch"] = IN_TORCH.format(student=str(options.demo / "students" / "nfe1"))
    calls = {name: runs([sys.executable, "-c", code]) for name, code in (codes | memory).items()}
    calls["piflow-edge --help"] = runs([sys.executable, script, "--help"])
    wanted = {name: call for name, call in calls.items() if name not in options.skip}
    ms = medians_of(wanted, options.repeats, warmup=2)
    ratios = {
        "import piflow_edge / import numpy": ("import piflow_edge", "import numpy"),
        "--help / import click": ("piflow-edge --help", "import click"),
        "first image in PyTorch / first image": ("first image in PyTorch", "first image"),
    }
    answer(
        options,
        {
            "ms": {name: round(value, 1) for name, value in ms.items()},
            "memory_mb": {
                name: measure_memory(code, min(3, options.repeats))
                for name, code in memory.items()
                if name in wanted
            },
            **{name: ms[a] / ms[b] for name, (a, b) in ratios.items() if a in ms and b in ms},
            "repeats": options.repeats,
        },
    )


if __name__ == "__main__":
    main()
