"""What `doctor` reports."""

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `status`: ok, warning or problem. `fix`: a command or a step, None if ok."""

    subject: str
    status: str
    detail: str
    fix: str | None = None


def format_version(numbers: Sequence[int]) -> str:
    """(12, 4) as "12.4"."""
    return ".".join(map(str, numbers))


def major(release: str | Sequence[int]) -> int:
    """12 of "12.4" or of (12, 4)."""
    return int(release.split(".")[0]) if isinstance(release, str) else release[0]
