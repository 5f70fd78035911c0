"""What `doctor` reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `status`: ok, warning or problem. `fix`: a command or a step, None if ok."""

    subject: str
    status: str
    detail: str
    fix: str | None = None


def versions(names: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed, with their version, without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def dotted(numbers: Sequence[int]) -> str:
    """(12, 4) as "12.4"."""
    return ".".join(map(str, numbers))


def major(release: str | Sequence[int]) -> int:
    """12 of "12.4" or of (12, 4)."""
    return int(release.split(".")[0]) if isinstance(release, str) else release[0]
