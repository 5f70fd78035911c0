"""Python and packages as `doctor` looks at them. Nothing here needs a package: one of them may be missing."""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires

from piflow_edge.system.hardware import versions

from .findings import OK, PROBLEM, WARNING, Finding

# Versions that pyproject.toml promises and CI runs.
_PYTHON = ((3, 10), (3, 13))
# Extras of those who work on piflow-edge itself: what they ask for is nobody else's concern.
_OF_DEVELOPERS = ("test", "docs")
# What nothing works without, and the modules that it brings.
_NEEDED = {"numpy": "numpy", "pillow": "PIL", "rich": "rich", "array-api-compat": "array_api_compat",
           "packaging": "packaging"}  # fmt: skip


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
    return [python_finding(sys.version_info[:3]), *findings] if findings else []


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
    # Late: without it, `obstacles` still says so.
    from packaging.requirements import Requirement

    asked = [one for one in map(Requirement, wanted) if not _is_of_developers(one)]
    findings = [finding for requirement in asked for finding in _requirement_findings(requirement)]
    listed = Finding("packages", OK, ", ".join(f"{name} {number}" for name, number in installed.items()))
    return [listed, *dict.fromkeys(findings)]


def prompts_finding(installed: dict[str, str]) -> Finding:
    """Whether bundles that read prompts can do so here."""
    command = "pip install 'piflow-edge[text]'"
    if "tokenizers" not in installed:
        return Finding(
            "prompts", WARNING, "tokenizers is not installed, which bundles need to read prompts", command
        )
    try:
        importlib.import_module("tokenizers")
    except Exception as error:  # a broken one raises whatever it stumbles over
        command = "pip install --force-reinstall tokenizers"
        return Finding("prompts", PROBLEM, f"tokenizers does not load: {error}", command)
    return Finding("prompts", OK, f"tokenizers {installed['tokenizers']}")


def _is_of_developers(requirement) -> bool:
    """Whether an extra of developers asks for it; one that users have too asks for itself in a line of its own."""
    return any(f'extra == "{extra}"' in str(requirement.marker or "") for extra in _OF_DEVELOPERS)


def _requirement_findings(requirement) -> list[Finding]:
    """What is wrong with one package that piflow-edge asks for; one of an extra may be absent."""
    from packaging.version import Version

    name, bounds = requirement.name.lower(), requirement.specifier
    here = versions([name]).get(name)
    command = f"pip install '{requirement.name}{bounds}'"
    if here is None:
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        return [] if optional else [Finding("packages", PROBLEM, f"{name} is not installed", command)]
    findings = []
    for bound in bounds:
        if bound.operator == ">=" and Version(here) < Version(bound.version):
            detail = f"{name} {here} is here, and {bound.version} or newer is needed"
            findings.append(Finding("packages", PROBLEM, detail, command))
        # 2.13.1 is still 2.13.
        elif bound.operator == "<=" and Version(here).release[:2] > Version(bound.version).release[:2]:
            detail = f"{name} {here} is newer than {bound.version}, the last tested"
            findings.append(Finding("packages", WARNING, detail, command))
    return findings
