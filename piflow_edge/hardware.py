"""What the machine says of its clocks and power. Everything is read, nothing is set; what cannot be read is None."""

import contextlib
import shutil
import subprocess
from pathlib import Path

_CPU = Path("/sys/devices/system/cpu")
_TEGRA = Path("/etc/nv_tegra_release")
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "pstate")


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


def nvidia_gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi says of every NVIDIA GPU, as text; None where it is missing or reaches no driver."""
    answer = told_by("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    if answer is None:
        return None
    return [
        dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=False)) for line in answer.splitlines()
    ]


def jetson_release() -> str | None:
    """The first line of /etc/nv_tegra_release, such as "# R36 (release), REVISION: 3.0"; None off Jetson."""
    text = read_text(_TEGRA)
    return text.splitlines()[0] if text else None


def told_by(program: str, *arguments: str) -> str | None:
    """What a program that only reports prints; None where it is missing, fails, or takes over 10 seconds."""
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


def _jetson_power_mode() -> str | None:
    answer = told_by("nvpmodel", "-q")
    return " ".join(answer.split()) if answer else None


def _megahertz(name: str) -> list[int] | None:
    found = [read_text(path) for path in sorted(_CPU.glob(f"cpu[0-9]*/cpufreq/{name}"))]
    return [int(text) // 1000 for text in found if text and text.isdecimal()] or None  # the kernel says kHz
