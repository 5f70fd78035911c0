"""Python and packages as `doctor` looks at them. Nothing here needs a package: one of them may be missing."""

import importlib
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires

from piflow_edge.system.hardware import versions

from .findings import OK, PROBLEM, WARNING, Finding

# Versions that pyproject.toml promises and CI runs.
_PYTHON = ((3, 10), (3, 13))
# What nothing works without, and the modules that it brings.
_NEEDED = {"numpy": "numpy", "pillow": "PIL", "rich": "rich", "array-api-compat": "array_api_compat"}


def obstacles() -> list[Finding]:
    """What keeps the rest of doctor from looking: packages that are missing, or that do not load; then Python too."""
    findings = []
    for package, module in _NEEDED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken one raises whatever it stumbles over
            here = package in versions([package])
            detail = f"{package} does not load: {error}" if here else f"{package} is not installed"
            command = f"pip install {'--force-reinstall ' if here else ''}{package}"
            findings.append(Finding("packages", PROBLEM, detail, command))
    return [python_finding(sys.version_info), *findings] if findings else []


def python_finding(running: Sequence[int]) -> Finding:
    """Whether this Python, as (major, minor, ...), is one that piflow-edge is made for."""
    low, high = _PYTHON
    detail = f"{'.'.join(map(str, running[:3]))} on {platform.system()} {platform.machine()}"
    if tuple(running[:2]) < low:
        return Finding("python", PROBLEM, detail, f"use Python {low[0]}.{low[1]} to {high[0]}.{high[1]}")
    if tuple(running[:2]) > high:
        return Finding(
            "python",
            WARNING,
            f"{detail}; tested up to {high[0]}.{high[1]}",
            f"python{high[0]}.{high[1]} -m venv .venv",
        )
    return Finding("python", OK, detail)


def package_findings(installed: dict[str, str]) -> list[Finding]:
    """What is installed, and what of it is missing or of another version than piflow-edge asks for."""
    try:
        wanted = requires("piflow-edge") or []
    except PackageNotFoundError:
        fix = "pip install -e '.[cpu]'"
        return [Finding("packages", PROBLEM, "piflow-edge runs from its source and is not installed", fix)]
    findings = []
    for line in wanted:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w-]+", requirement)[0].lower()
        optional = "extra ==" in marker
        here = versions([name]).get(name)
        command = f"pip install '{requirement}'"
        if here is None and not optional:
            findings.append(Finding("packages", PROBLEM, f"{name} is not installed", command))
        for operator, bound in re.findall(r"(>=|<=)([\d.]+)", requirement) if here else ():
            if operator == ">=" and _numbers(here) < _numbers(bound):
                findings.append(
                    Finding(
                        "packages", PROBLEM, f"{name} {here} is here, and {bound} or newer is needed", command
                    )
                )
            # 2.13.1 is still 2.13.
            elif operator == "<=" and _numbers(here)[:2] > _numbers(bound)[:2]:
                findings.append(
                    Finding(
                        "packages", WARNING, f"{name} {here} is newer than {bound}, the last tested", command
                    )
                )
    listed = Finding("packages", OK, ", ".join(f"{name} {number}" for name, number in installed.items()))
    return [listed, *dict.fromkeys(findings)]


def _numbers(release: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(part) for part in re.match(r"[\d.]*", release)[0].split(".") if part)
