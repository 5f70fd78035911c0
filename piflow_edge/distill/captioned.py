"""Data that steer by text: captions or bare prompts, read by frozen text encoders of `transformers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piflow_edge.conditioning import Conditioner, OpenedTextPrompts
from piflow_edge.distill.data.captions import Captions, read_prompts
from piflow_edge.distill.data.encodings import encode_captions, make_prompt_data
from piflow_edge.distill.data.image_data import CaptionedData, ImageData
from piflow_edge.distill.networks.text_encoders import (
    TextEncoder,
    load_text_encoder,
    load_text_encoders,
    open_encoders,
    open_prompts,
)
from piflow_edge.errors import CheckpointError
from piflow_edge.system.files import sha256

# Prompts that a model records to be tried with.
_EXAMPLES = 20


def caption_for_training(
    data: ImageData, sources: Sequence[str | Path], *, max_tokens: int | None = None
) -> CaptionedData:
    """Return images steered by their captions, for a teacher that is trained from scratch.

    Args:
        data: images with captions.
        sources: text encoders; see `load_text_encoder`.
        max_tokens: longest prompt, in tokens; None is the encoder's own, which costs time where captions are short.

    Raises:
        DataError: the data have no captions.
        CheckpointError, MissingExtraError: see `load_text_encoder`.
    """
    length: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
    # Of one length, so that "no condition" and what is given go into one batch.
    encoders = [load_text_encoder(source, fixed_length=True, **length) for source in sources]
    examples = _spread(data.captions) if data.captions else ("a red apple",)
    return encode_captions(data, open_prompts(encoders, examples=examples), fingerprint(encoders))


def caption_for_teacher(
    data: ImageData, sources: Sequence[str | Path], conditioner: Conditioner | None
) -> CaptionedData:
    """Return images steered by their captions as a teacher's were, read by the encoders that it was trained with.

    Raises:
        DataError: the data have no captions.
        CheckpointError, MissingExtraError: other encoders than the teacher's, or see `load_text_encoder`.
    """
    opened, encoders = _open_for_teacher(sources, conditioner)
    return encode_captions(data, opened, fingerprint(encoders))


def prompts_for_teacher(
    file: Path, sources: Sequence[str | Path], conditioner: Conditioner | None, shape: tuple[int, ...]
) -> CaptionedData:
    """Return data without images for a data-free run: the prompts of a `.txt` file, one on a line.

    Args:
        file: the prompts.
        sources, conditioner: as of `caption_for_teacher`.
        shape: (C, H, W) of what the teacher makes.
    """
    opened, encoders = _open_for_teacher(sources, conditioner)
    return make_prompt_data(file.stem, read_prompts(file), shape, opened, fingerprint(encoders))


def fingerprint(encoders: Sequence[TextEncoder]) -> str:
    """SHA-256 of all that the encoders compute with."""
    return sha256("".join(encoder.fingerprint() for encoder in encoders).encode())


def _open_for_teacher(
    sources: Sequence[str | Path], conditioner: Any
) -> tuple[OpenedTextPrompts, list[TextEncoder]]:
    if not sources:
        raise CheckpointError(
            "captions and prompts are read by the text encoder that the teacher was trained with; give --text-encoder"
        )
    encoders = load_text_encoders(sources, conditioner)
    if conditioner is None or not conditioner.networks:
        return open_prompts(encoders), encoders
    return open_encoders(conditioner, encoders), encoders


def _spread(captions: Captions) -> tuple[str, ...]:
    """The first captions of some images, evenly from all."""
    firsts = captions.starts[:-1]
    step = max(1, len(firsts) // _EXAMPLES)
    return tuple(dict.fromkeys(captions.texts[i] for i in firsts[::step][:_EXAMPLES]))
