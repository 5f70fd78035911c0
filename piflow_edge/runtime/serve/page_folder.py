"""The page in a browser: its files, as a folder for any web server or as what `piflow-edge serve` answers with."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.manifest import MANIFEST
from piflow_edge.errors import UsageError
from piflow_edge.system.files import new_folder, sha256, write_atomic

_WEB = Path(__file__).parents[2] / "web"
# Of ONNX Runtime's JavaScript package: a build for each execution provider, with what it loads.
_RUNTIME_FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_RUNTIME, _BUNDLES, _CODE, _SITE = "ort", "bundles", "piflow", "site.json"
_WORKER = "service-worker.js"
# What a page is answered with, so that a browser lets its WebAssembly have threads.
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
}

SiteFiles = dict[str, Path | bytes]


def collect_files(bundles: Sequence[Bundle], runtime: Path | None, *, has_server: bool = False) -> SiteFiles:
    """Return the files of a page: their addresses, relative to the page's own, and what they hold.

    Args:
        bundles: what it draws from.
        runtime: folder `dist` of the npm package onnxruntime-web, by which a browser draws itself; None where a server
            does.
        has_server: the page is served by `piflow-edge serve`.

    Raises:
        UsageError: the folder lacks files of ONNX Runtime.
    """
    code = _WEB / "dist"
    files: SiteFiles = {"index.html": _WEB / "page" / "index.html", "style.css": _WEB / "page" / "style.css"}
    files |= {f"{_CODE}/{file.relative_to(code).as_posix()}": file for file in sorted(code.rglob("*.js"))}
    worker = files.pop(f"{_CODE}/page/service_worker.js")
    shell = [*files]
    if runtime is not None:
        files |= {f"{_RUNTIME}/{file.name}": file for file in find_runtime(runtime)}
    # Numbers, for a bundle's name may be any text.
    paths = [f"{_BUNDLES}/{number}" for number in range(len(bundles))]
    for path, bundle in zip(paths, bundles, strict=True):
        files[f"{path}/{MANIFEST}"] = bundle.manifest_bytes
        if runtime is not None:
            files |= {f"{path}/{name}": bundle.folder / name for name in bundle.manifest.files}
    site = {
        "version": _hash_files(files, worker),
        "bundles": [{"name": bundle.name, "path": path} for bundle, path in zip(bundles, paths, strict=True)],
        "has_server": has_server,
        "ort": None if runtime is None else f"{_RUNTIME}/",
        "files": ["./", *shell],
    }
    # The service worker stands at the top, for it answers only for what is below it.
    return {**files, _WORKER: worker, _SITE: json.dumps(site, indent=1).encode()}


def write_folder(bundles: Sequence[Bundle], runtime: Path, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a page that draws in the browser as a folder for any web server, and return it.

    Args:
        bundles, runtime: as in `collect_files`.
        folder: must not exist.
        overwrite: replace it if it does, whatever it holds.

    Raises:
        UsageError: it exists, or files of ONNX Runtime are missing.
        BundleError: a bundle's file was altered since it was opened, or a graph reaches beyond it.
    """
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists; give another name, or --overwrite")
    files = collect_files(bundles, runtime)
    for bundle in bundles:
        bundle.check_graphs()
    with new_folder(folder) as work:
        for address, content in files.items():
            place = work / address
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                write_atomic(place, content)
            else:
                shutil.copyfile(content, place)
    return folder


def find_runtime(folder: Path) -> list[Path]:
    """Return the files of ONNX Runtime for browsers in a folder; UsageError if one is missing."""
    files = [folder / name for name in _RUNTIME_FILES]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(
            f"{folder} has no {missing[0]}, a file of ONNX Runtime for browsers; get it with: npm install "
            "onnxruntime-web, and name its folder: --onnxruntime-web node_modules/onnxruntime-web/dist"
        )
    return files


def _hash_files(files: Mapping[str, Any], worker: Any) -> str:
    """One hash of them all: a page of which anything changed is another version."""
    parts = (file if isinstance(file, bytes) else file.read_bytes() for file in (*files.values(), worker))
    return sha256("".join(map(sha256, parts)).encode())[:16]
