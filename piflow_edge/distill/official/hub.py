"""`FOLDER`, `FOLDER:subfolder`, `org/repo` and `org/repo:subfolder`: where files lie, fetched only for a hub id."""

import re
from dataclasses import dataclass
from pathlib import Path

from piflow_edge.errors import CheckpointError, MissingExtraError

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<subfolder>[\w-][\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubPlace:
    """A repository on the Hugging Face hub, and a folder in it; "" is all of it."""

    repo: str
    subfolder: str = ""

    def __str__(self) -> str:
        return f"{self.repo}:{self.subfolder}" if self.subfolder else self.repo


def parse_hub_id(text: str) -> HubPlace | None:
    """Return what `org/repo` or `org/repo:subfolder` means; None for anything else."""
    found = _HUB_ID.fullmatch(text)
    if found is None or ".." in text:
        return None
    return HubPlace(found["repo"], (found["subfolder"] or "").strip("/"))


def is_hub_id(text: str) -> bool:
    """Return True if `text` means a place on the hub: it looks like one, and nothing here is called so."""
    return parse_hub_id(text) is not None and find_local(text) is None


def find_local(text: str) -> Path | None:
    """Return the file or folder here that `PATH` or `PATH:subfolder` means; None where there is none."""
    if Path(text).exists():
        return Path(text)
    folder, colon, inside = text.rpartition(":")
    within = Path(folder) / inside
    return within if colon and folder and within.exists() else None


def find_files(text: str, patterns: tuple[str, ...] = ("*",)) -> Path:
    """Return the file or folder that `text` means; one on the hub is downloaded into the hub's own cache.

    Args:
        text: a path, a path and a subfolder, or a hub id.
        patterns: which of the files of a hub's folder are wanted.

    Raises:
        CheckpointError: nothing there, or the hub cannot be reached.
        MissingExtraError: a hub id, and `huggingface_hub` is not installed.
    """
    if (here := find_local(text)) is not None:
        return here
    place = parse_hub_id(text)
    if place is None:
        raise CheckpointError(
            f"there is nothing at {text}; give a folder, FOLDER:subfolder, or a hub id such as "
            "Lakonik/pi-FLUX.1:gmflux_k8_piid_4step"
        )
    return _download(place, patterns)


def _download(place: HubPlace, patterns: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"{place} is on the hub, which needs 'huggingface_hub'; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    inside = f"{place.subfolder}/" if place.subfolder else ""
    try:
        folder = Path(
            snapshot_download(place.repo, allow_patterns=[inside + pattern for pattern in patterns])
        )
    except Exception as error:  # the hub raises many kinds
        wanted = f"'hf download {place.repo} --include \"{inside}*\" --local-dir FOLDER'"
        raise CheckpointError(
            f"there is no folder {place} here, and it cannot be fetched from the hub: {_first_line(error)}; where "
            f"there is a connection, run {wanted} and give FOLDER{f'/{place.subfolder}' if inside else ''}"
        ) from error
    if not (folder / place.subfolder).exists():
        raise CheckpointError(f"the hub's {place.repo} has no folder {place.subfolder!r}")
    return folder / place.subfolder


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
