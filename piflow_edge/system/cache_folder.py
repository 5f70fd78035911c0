"""Where files are kept that can be made again."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Where made-once files go: PIFLOW_EDGE_CACHE, else the platform's place for such files."""
    if chosen := os.environ.get("PIFLOW_EDGE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "piflow-edge"
