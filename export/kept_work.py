"""What an export of a large network has done, kept beside the bundle until that stands: a killed one goes on there.

Golden samples and converted networks take minutes to hours of one whose weights stay in their files. Their files here
are whole or absent, and are held to their checksums when they are taken up again.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from piflow_edge.engines import Graph
from piflow_edge.export.conversions.calibration import Conversion
from piflow_edge.export.onnx_graphs.weight_files import WEIGHTS, WeightFile
from piflow_edge.export.parity import golden_file
from piflow_edge.system.files import sha256, write_atomic

log = logging.getLogger(__name__)

_ENDING = ".partial"


@dataclass(frozen=True)
class KeptWork:
    """A folder for files of an export. `is_kept`: whether what is done there is looked for, and noted."""

    folder: Path
    is_kept: bool

    def arrays(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays of that name, made only where they are not there yet."""
        file = self.folder / f"{name}.npz"
        if self.is_kept and file.is_file():
            log.info("%s are there from before", name)
            with np.load(file, allow_pickle=False) as loaded:
                return {key: loaded[key] for key in loaded.files}
        arrays = make()
        if self.is_kept:
            write_atomic(file, golden_file(arrays))
        return arrays

    def conversion(self, name: str, make: Callable[[], Conversion]) -> Conversion:
        """Return the conversion of that name, made only where it is not there yet."""
        if self.is_kept and (found := self._read(name)) is not None:
            log.info("%s is there from before", name)
            return found
        made = make()
        # What has no file of weights yet is what was there in the beginning, or was made in memory.
        if self.is_kept and all(isinstance(content, WeightFile) for content in made.graph.weights.values()):
            self._write(name, made)
        return made

    def _read(self, name: str) -> Conversion | None:
        model, weights, note = (self.folder / f"{name}{ending}" for ending in (".onnx", ".weights", ".json"))
        try:
            said, data = json.loads(note.read_bytes()), model.read_bytes()
        except (OSError, ValueError):
            return None
        files = {}
        if said["weights"] is not None:
            if not weights.is_file():
                return None
            files[WEIGHTS] = WeightFile.read_again(weights)
        if sha256(data) != said["model"] or any(file.sha256() != said["weights"] for file in files.values()):
            return None
        return Conversion(Graph(data, files), said["float32_nodes"], said["layer_errors"])

    def _write(self, name: str, made: Conversion) -> None:
        weights: Any = made.graph.weights.get(WEIGHTS)
        if weights is not None:
            weights.move(self.folder / f"{name}.weights")
        write_atomic(self.folder / f"{name}.onnx", made.graph.model)
        said = {
            "model": sha256(made.graph.model),
            "weights": None if weights is None else weights.sha256(),
            "float32_nodes": made.float32_nodes,
            "layer_errors": made.layer_errors,
        }
        # Last: with it, the rest counts.
        write_atomic(self.folder / f"{name}.json", json.dumps(said).encode())


@contextmanager
def keep_work(folder: Path, key: str | None) -> Iterator[KeptWork]:
    """A folder beside `folder`, where a bundle will be, for the files of its export. It is gone when the block ends.

    Args:
        folder: of the bundle.
        key: what the export is of. The folder of one that was killed is taken up again by another of the same key;
            that of other keys is removed. None keeps nothing.
    """
    # The hash of the name, since others may begin with it: what is kept of their exports is left alone.
    stem = f".{folder.name[:40]}.{_hash(folder.name)[:8]}."
    parent = folder.resolve().parent
    if key is None:
        with TemporaryDirectory(prefix=stem, dir=parent) as room:
            yield KeptWork(Path(room), is_kept=False)
        return
    room = parent / f"{stem}{_hash(key)[:16]}{_ENDING}"
    for other in parent.iterdir():
        if other.name.startswith(stem) and other.name.endswith(_ENDING) and other != room:
            shutil.rmtree(other)
    room.mkdir(exist_ok=True)
    for half in room.glob("*.weights"):
        if not half.with_suffix(".json").exists():
            half.unlink()
    try:
        yield KeptWork(room, is_kept=True)
    except Exception:
        shutil.rmtree(room)
        raise
    except BaseException:  # Ctrl-C
        log.warning("what was done is kept in %s; the same command goes on there", room)
        raise
    shutil.rmtree(room)


def _hash(text: str) -> str:
    return sha256(text.encode())
