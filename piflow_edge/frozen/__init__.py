"""How PyInstaller packs an app that draws from bundles; it finds this by the entry point in pyproject.toml."""

from pathlib import Path


def hook_folders() -> list[str]:
    """Return the folder with the hook, for PyInstaller's entry point `hook-dirs`."""
    return [str(Path(__file__).parent)]
