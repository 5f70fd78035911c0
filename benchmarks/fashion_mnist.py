"""Fashion-MNIST as an .npz that training takes: 60,000 grey pictures of 28 x 28 pixels in ten classes.

The files are those of the Debian package `dataset-fashion-mnist` (MIT licence), or of any folder that holds them.

Source: Xiao, Rasul & Vollgraf, Fashion-MNIST, arXiv:1708.07747.
Run: python -m benchmarks.fashion_mnist --out runs/fashion-mnist.npz
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np

from piflow_edge.system.files import write_atomic

PACKAGE = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read_idx(file: Path) -> np.ndarray:
    """The bytes of an IDX file: two zeros, 8 for uint8, the number of axes, their lengths, the values."""
    content = gzip.decompress(file.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{file} begins with {content[:3]!r}, not with the 00 00 08 of an IDX file of bytes")
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=PACKAGE, help="folder of train-*-ubyte.gz")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not options.source.is_dir():
        raise SystemExit(
            f"there is no folder {options.source}; install dataset-fashion-mnist, or give --source"
        )
    content = io.BytesIO()
    np.savez_compressed(
        content,
        images=read_idx(options.source / "train-images-idx3-ubyte.gz"),
        labels=read_idx(options.source / "train-labels-idx1-ubyte.gz").astype(np.int64),
        class_names=np.array(CLASSES),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, content.getvalue())


if __name__ == "__main__":
    main()
