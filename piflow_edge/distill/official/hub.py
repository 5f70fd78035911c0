"""`FOLDER`, `FOLDER:subfolder`, `org/repo` and `org/repo:subfolder`: where files lie, fetched only for a hub id."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piflow_edge.errors import CheckpointError, MissingExtraError

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<subfolder>[\w-][\w./-]*))?", re.ASCII)

# How long the hub may take to say whether it has a repository.
_PATIENCE_S = 10


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


def find_local(text: str) -> Path | None:
    """Return the file or folder here that `PATH` or `PATH:subfolder` means; None where there is none."""
    if Path(text).exists():
        return Path(text)
    folder, colon, inside = text.rpartition(":")
    within = Path(folder) / inside
    return within if colon and folder and within.exists() else None


def check_there(text: str, *, may_be_bare: bool = False) -> None:
    """Refuse a misspelt path before anything is imported or asked of the hub for it.

    Args:
        text: what the user gave.
        may_be_bare: whether the hub has such things under a name without an organisation too.

    Raises:
        CheckpointError: it is neither here, nor can it be on the hub: it lies in a folder that is here, or looks
            otherwise than a hub id.
    """
    is_bare = may_be_bare and "/" not in text and not Path(text).suffix
    is_on_hub = is_bare or (parse_hub_id(text) is not None and not Path(text).parent.is_dir())
    if find_local(text) is None and not is_on_hub:
        raise absence_error(text)


def absence_error(text: str) -> CheckpointError:
    """Return the error for a path where nothing is, which names what is beside it."""
    return CheckpointError(
        f"there is nothing at {text}{_name_neighbours(Path(text))}; give a path, FOLDER:subfolder, or a hub id such as "
        "Lakonik/pi-FLUX.1:gmflux_k8_piid_4step"
    )


def check_on_hub(text: str, what: str) -> None:
    """Refuse what is neither here, nor downloaded already, nor to be had from the hub now.

    Libraries that load from the hub try for half a minute when it does not answer. This asks it once.

    Args:
        text: a path or a hub id.
        what: what is looked for there, for the error.

    Raises:
        CheckpointError: the hub has no such repository, or it cannot be reached.
        MissingExtraError: it is not here, and `huggingface_hub` is not installed.
    """
    if find_local(text) is not None:
        return
    place = parse_hub_id(text)
    repo = place.repo if place else text
    hub = _import_hub(text)
    try:
        _ask(hub, repo)
    except Exception as error:  # the hub raises many kinds
        raise explain_failure(text, what, error) from error


def _name_neighbours(path: Path, most: int = 5) -> str:
    """What lies where `path` should, those of a like name first, as the end of a message."""
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    names = sorted(each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    like = difflib.get_close_matches(path.name, names, n=most)
    shown = [*like, *(name for name in names if name not in like)][:most]
    return f"; in {path.parent} there is {', '.join(shown) or 'nothing'}"


def explain_failure(text: str, what: str, error: Exception) -> CheckpointError:
    """Return the error for a library that could not read `what` from a place, which says whether it is here."""
    if find_local(text) is None:
        return CheckpointError(
            f"there is nothing at {text}, and the hub does not give {what} of that name: {_first_line(error)}"
        )
    return CheckpointError(f"{text} cannot be read as {what}: {error}")


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
    check_there(text)
    place = parse_hub_id(text)
    assert place is not None  # else it would have been refused
    return _download(place, patterns)


def _download(place: HubPlace, patterns: tuple[str, ...]) -> Path:
    hub = _import_hub(str(place))
    inside = f"{place.subfolder}/" if place.subfolder else ""
    try:
        _ask(hub, place.repo)
        folder = Path(
            hub.snapshot_download(place.repo, allow_patterns=[inside + pattern for pattern in patterns])
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


def _ask(hub: Any, repo: str) -> None:
    """Raise the hub's own error for a repository that neither was downloaded before nor is to be had now."""
    try:
        hub.snapshot_download(repo, local_files_only=True)
    except Exception:  # of many kinds: it was never downloaded
        hub.HfApi().model_info(repo, timeout=_PATIENCE_S)


def _import_hub(text: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(
            f"{text} is on the hub, which needs 'huggingface_hub'; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
