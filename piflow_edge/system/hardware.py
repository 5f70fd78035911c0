"""What the machine says of itself, its clocks, power and memory. All is read, nothing set; what is not told is None."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_CPU = Path("/sys/devices/system/cpu")
_TEGRA = Path("/etc/nv_tegra_release")
_CGROUPS = Path("/sys/fs/cgroup")
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "pstate")


def available_cores() -> int:
    """Cores this process may use, 1 or more: not all there are, where its affinity or its container is limited."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(_quota(), 1 << 20))))
    return os.cpu_count() or 1


# Packages whose version has a say in how fast an image is made, and in how it looks.
_PACKAGES = (
    "piflow-edge", "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml",
    "openvino", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "cuda-bindings", "torch",
)  # fmt: skip


class Memory(NamedTuple):
    """Of this process in MB (1e6 bytes): resident now, and at its highest since the process started."""

    resident: float
    peak: float


def machine() -> dict:
    """What figures were measured on: processor, cores this process may use, system, versions of what is installed."""
    import platform

    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(_PACKAGES),
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed, with their version, without importing them."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def memory() -> Memory | None:
    """This process's memory; None where the system does not tell (Windows)."""
    status = read_text(Path("/proc/self/status"))
    if status is not None:  # not getrusage: on Linux a child's maximum starts from its parent's
        kib = {line.partition(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith("kB")}
        return Memory(*(int(kib[name]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM")))
    if sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes there
        kibibytes = ask_program("ps", "-o", "rss=", "-p", str(os.getpid()))
        return Memory(int(kibibytes) * 1024 / 1e6 if kibibytes else peak, peak)
    return None


def gpu_memory_used() -> float | None:
    """MB in use on all NVIDIA GPUs together, by whomever; None where nvidia-smi does not tell."""
    answer = ask_program("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    numbers = [line.strip() for line in answer.splitlines()] if answer else []
    if not numbers or not all(number.isdecimal() for number in numbers):
        return None
    return sum(map(int, numbers)) * 2**20 / 1e6  # it says MiB


def power_state() -> dict:
    """Clocks and power modes at this moment.

    Returns:
        `cpu_governor`: of the first core. `cpu_mhz`, `cpu_max_mhz`: of every core, MHz. `nvidia_gpus`: for each GPU
        what nvidia-smi says (clocks in MHz, power limit in W). `jetson_release`, `jetson_power_mode`: of a Jetson.
        Each is None where this machine does not tell.
    """
    return {
        "cpu_governor": read_text(_CPU / "cpu0/cpufreq/scaling_governor"),
        "cpu_mhz": _megahertz("scaling_cur_freq"),
        "cpu_max_mhz": _megahertz("cpuinfo_max_freq"),
        "nvidia_gpus": nvidia_gpus(),
        "jetson_release": jetson_release(),
        "jetson_power_mode": _jetson_power_mode(),
    }


def free_memory() -> int | None:
    """Bytes that programs here can still have; None where the system does not tell.

    In a container, what its limit leaves, if that is less.
    """
    available = re.search(r"MemAvailable:\s+(\d+) kB", read_text(Path("/proc/meminfo")) or "")
    if available is None:
        return None
    left = min(map(_memory_left, _control_groups("memory")), default=math.inf)
    return int(min(int(available[1]) * 1024, left))


def held_memory() -> int | None:
    """Bytes that this process holds; None where the system does not tell."""
    resident = re.search(r"VmRSS:\s+(\d+) kB", read_text(Path("/proc/self/status")) or "")
    return int(resident[1]) * 1024 if resident else None


def nvidia_gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi says of every NVIDIA GPU, as text; None where it is missing or reaches no driver."""
    answer = ask_program(
        "nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"
    )
    if answer is None:
        return None
    return [
        dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in answer.splitlines()
    ]


def jetson_release() -> str | None:
    """The first line of /etc/nv_tegra_release, such as "# R36 (release), REVISION: 3.0"; None off Jetson."""
    text = read_text(_TEGRA)
    return text.splitlines()[0] if text else None


def ask_program(program: str, *arguments: str) -> str | None:
    """What a program that only reports prints; None where it is missing, fails, or takes over 10 seconds."""
    import shutil  # late, with the next: slow to import, and `engines` imports this module
    import subprocess

    path = shutil.which(program)
    if path is None:
        return None
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10)
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def read_text(path: Path) -> str | None:
    """A small file of the system; None where there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


@cache
def _quota() -> float:
    """Cores' worth of time that this process's control group may use; infinity without a limit."""
    return min(map(_quota_of, _control_groups("cpu")), default=math.inf)


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that limit this process, the innermost first: a limit on a parent holds too."""
    for line in (read_text(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree, version 1 one for each controller. In a container the name may be one that exists
        # outside only: its root is then the group's own.
        top = _CGROUPS / controller if controllers else _CGROUPS
        folder = top / name.lstrip("/")
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _quota_of(folder: Path) -> float:
    if text := read_text(folder / "cpu.max"):
        limit, _, period = text.partition(" ")
    else:
        limit, period = (read_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
    try:
        return int(limit) / int(period) if int(limit) > 0 else math.inf
    except ValueError:  # no such file, or "max"
        return math.inf


def _memory_left(folder: Path) -> float:
    """Bytes that a control group may still have; infinity without a limit. What it has cached of files can go."""
    version2 = (folder / "memory.max").exists()
    names = (
        ("memory.max", "memory.current") if version2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    limit, used = (read_text(folder / name) or "" for name in names)
    said = read_text(folder / "memory.stat") or ""
    # Of version 1 with that of the groups inside, as its usage is.
    cached = re.search(rf"^{'' if version2 else 'total_'}inactive_file (\d+)", said, re.MULTILINE)
    try:
        return max(int(limit) - int(used) + (int(cached[1]) if cached else 0), 0)
    except ValueError:  # no such file, or "max"
        return math.inf


def _cpu_name() -> str:
    import platform

    lines = (read_text(Path("/proc/cpuinfo")) or "").splitlines()  # platform.processor() is empty on Linux
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _jetson_power_mode() -> str | None:
    answer = ask_program("nvpmodel", "-q")
    return " ".join(answer.split()) if answer else None


def _megahertz(name: str) -> list[int] | None:
    found = [read_text(path) for path in sorted(_CPU.glob(f"cpu[0-9]*/cpufreq/{name}"))]
    return [int(text) // 1000 for text in found if text and text.isdecimal()] or None  # the kernel says kHz
