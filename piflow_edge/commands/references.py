"""What students are held to by `demo` and `evaluate`: their teacher, and real images steered as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from piflow_edge.runtime.generator import Generator


def open_source(source: str | Path, style: str, students: Sequence[Path], data):
    """Open the teacher that `source` names, whatever `distill` takes; PyTorch is imported only here."""
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.distill.sources import load_teacher
    from piflow_edge.export.onnx_graphs.teacher_graph import open_teacher

    shape = tuple(Bundle(students[0]).manifest.latent.shape) if students else data.shape
    return open_teacher(load_teacher(source, sample_shape=shape, style=style), data)


def caption_real_images(images, students: Sequence[Path]):
    """Steer images with captions by the first student's own text encoder; others stay as they are.

    Of several captions of an image the first is its prompt.
    """
    if images.captions is None or not students:
        return images
    from piflow_edge.runtime.loading import load

    with load(students[0]) as generator:
        return caption_with(generator, images)


def caption_with(generator: "Generator", images):
    """As `caption_real_images`, by the text encoder of a student that is open."""
    from dataclasses import replace

    from piflow_edge.distill.data.captions import Captions
    from piflow_edge.distill.data.encodings import encode_captions
    from piflow_edge.system.files import sha256

    if not generator.conditioner.example_prompts(1):
        return images
    captions = images.captions
    first = Captions.of_rows([[captions.texts[row]] for row in captions.starts[:-1]])
    encoder = f"{sha256(generator.bundle.manifest_bytes)} {generator.precision} {generator.engine.name}"
    opened: Any = generator.conditioner
    return encode_captions(replace(images, captions=first), opened, encoder)
