"""Record what TensorRT's Python packages offer, release by release, from NVIDIA's own wheels; no GPU is needed.

Run: python tests/golden/tensorrt_surface.py WHEEL...

Each wheel is one of tensorrt (8.5), tensorrt-bindings (8.6) or tensorrt-cu12-bindings (10 and 11), for the Python that
runs this; a wheel of another release is added to what is there. The compiled module is imported with empty libraries in
the place of libnvinfer and its like, then asked for its classes, their members, and the parameters in its docstrings.
Of 8.5.3.1, whose wheel is NVIDIA's index's alone, the inspector and its enums were taken to be those of 8.6.1.
tensorrt_surface.json holds class -> member -> what it is -> releases. `pretended_tensorrt.py` is made of it.
"""

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).with_suffix(".json")
CLASSES = (
    "Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "Runtime", "ICudaEngine", "IExecutionContext",
    "IOptimizationProfile", "ITimingCache", "ITensor", "ILayer", "ILogger", "Logger", "IHostMemory", "EngineInspector",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "DataType", "TensorIOMode", "LayerType",
    "ExecutionContextAllocationStrategy", "TacticSource", "PreviewFeature", "LayerInformationFormat",
    "ProfilingVerbosity",
)  # fmt: skip


def load(wheel: Path, folder: Path):
    """The compiled module of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/tensorrt.so")]
        library = Path(archive.extract(name, folder))
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    wanted = subprocess.run(["nm", "-D", "-u", library], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1].partition("@")[0] for line in wanted.splitlines()}
    # What is neither Python's nor the C and C++ libraries' is TensorRT's.
    symbols = {s for s in symbols if re.match(r"create|getBuilder|getNv|getPlugin|initLib|_ZN\d+nv", s)}
    source = "".join(f"void* {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols))
    for soname in re.findall(r"\[(libnv\S+)\]", needed):
        flags = ["-w", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{soname}", "-o", folder / soname]
        subprocess.run(["gcc", *map(str, flags)], input=source, text=True, check=True)
        ctypes.CDLL(str(folder / soname), mode=ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location("tensorrt", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameters(name: str, member) -> str:
    """How a member is called, one alternative after the other: "(network, config)"; "" for an attribute."""
    if not callable(member):
        return ""
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", member.__doc__ or "", re.M)
    found = []
    for line in lines:
        if line == "*args, **kwargs":
            continue
        named = re.findall(r"(?:^|, )(\w+): [^=,()]*(?:\[[^\]]*\])?[^=,()]*(= )?", line)
        found.append(", ".join(word + ("?" if default else "") for word, default in named if word != "self"))
    return " | ".join(f"({one})" for one in dict.fromkeys(found)) or "(...)"


def surface(module) -> dict[str, dict[str, str]]:
    found = {}
    for kind in CLASSES:
        names = [
            name for name in dir(getattr(module, kind)) if not name.startswith("_") or name == "__init__"
        ]
        found[kind] = {name: parameters(name, getattr(getattr(module, kind), name)) for name in names}
    for kind in ENUMS:
        if hasattr(module, kind):
            members = getattr(module, kind).__members__
            found[kind] = {name: f"={int(value)}" for name, value in members.items()}
    return found


def main(wheels):
    if len(wheels) > 1:  # each in a process of its own: two releases cannot be loaded into one
        for wheel in wheels:
            subprocess.run([sys.executable, __file__, wheel], check=True)
        return
    wheel = Path(wheels[0])
    release = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        here = surface(load(wheel, Path(folder)))
    table = json.loads(OUT.read_text()) if OUT.exists() else {}
    for members in table.values():
        for kinds in members.values():
            for releases in kinds.values():
                if release in releases:
                    releases.remove(release)
    for kind, members in here.items():
        for name, what in members.items():
            releases = table.setdefault(kind, {}).setdefault(name, {}).setdefault(what, [])
            releases.append(release)
            releases.sort(key=lambda text: [int(n) for n in text.split(".")])
    OUT.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(wheel.name)


if __name__ == "__main__":
    main(sys.argv[1:])
