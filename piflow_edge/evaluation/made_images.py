"""The images of all contenders, of which features, errors and a few pictures are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from piflow_edge.errors import DataError
from piflow_edge.noise import philox_normal
from piflow_edge.system.progress import progress

from .contenders import Contender
from .features import Features
from .metrics import agreement, check_finite
from .plan import Plan, RealImages
from .prompt_features import PromptFeatures

# Images that are made at a time: so many, or so few that they hold this many values.
_PIECE = 250
_PIECE_VALUES = 2**22

REAL = "real images"


@dataclass(frozen=True)
class Pictures:
    """Images side by side. `rows`: the real images and every contender's, float32 (N, C, H, W). `titles`: of each."""

    rows: dict[str, np.ndarray]
    titles: list[str]


@dataclass(frozen=True)
class MadeImages:
    """What is kept of all images. `features`, `mse` to the reference: by contender. `pictures`: a few images.
    Without an `mse` are those whose images were made before.

    `prompt_vectors`: by contender, what `PromptFeatures` makes of the images; empty without it.
    """

    features: dict[str, np.ndarray]
    prompt_vectors: dict[str, np.ndarray]
    mse: dict[str, float]
    pictures: Pictures


@dataclass
class _Collection:
    """What is kept of one contender's images so far."""

    features: list[np.ndarray] = field(default_factory=list)
    prompt_vectors: list[np.ndarray] = field(default_factory=list)
    shown: dict[int, np.ndarray] = field(default_factory=dict)
    error: float = 0.0


def make_images(
    contenders: Sequence[Contender],
    plan: Plan,
    features: Features,
    columns: Sequence[int],
    noise_shape: tuple[int, ...],
    seed: int,
    *,
    reference: str | None,
    prompt_features: PromptFeatures | None = None,
) -> MadeImages:
    """Make all images, a piece at a time, each from the same noise for every contender.

    Args:
        contenders: the reference first, if there is one.
        plan: what steers each image.
        features: what is kept of all images.
        columns: images that are kept as pictures.
        noise_shape, seed: of the common noise.
        reference: the contender that all others are held to, pixel by pixel; None for no such figure.
        prompt_features: makes the vectors that are compared with prompts; None for no such figures.

    Raises:
        DataError: images of another shape than the real ones.
        ShapeError: images that are not finite, with whose they are.
    """
    size = max(1, min(_PIECE, _PIECE_VALUES // int(np.prod(plan.data.shape))))
    starts = range(0, len(plan), size)
    collections = {contender.name: _Collection() for contender in contenders}
    with progress("evaluating", len(starts) * len(contenders)) as bar:
        for start in starts:
            indices = range(start, min(start + size, len(plan)))
            noise = philox_normal(seed, indices, noise_shape)
            conditioning = plan.conditioning(slice(start, indices.stop))
            wanted = None
            for contender in contenders:
                images = contender.sample(noise, conditioning, [(seed, i) for i in indices])
                _check_images(images, contender.name, plan.data, start)
                wanted = images if contender.name == reference else wanted
                own = collections[contender.name]
                own.features.append(features(images))
                if prompt_features is not None:
                    own.prompt_vectors.append(prompt_features.encode_images(images))
                if wanted is not None and contender.is_drawn:
                    own.error += agreement(images, wanted) * len(images)
                own.shown |= {i: images[i - start] for i in columns if i in indices}
                bar(contender.name)
    rows = {name: np.stack([own.shown[i] for i in columns]) for name, own in collections.items()}
    real = plan.data.batch(plan.chosen[columns])[0]
    return MadeImages(
        {name: np.concatenate(own.features) for name, own in collections.items()},
        {
            name: np.concatenate(own.prompt_vectors)
            for name, own in collections.items()
            if prompt_features is not None
        },
        {c.name: collections[c.name].error / len(plan) for c in contenders if c.is_drawn},
        Pictures({REAL: real, **rows}, plan.titles(columns)),
    )


def _check_images(images: np.ndarray, name: str, data: RealImages, start: int) -> None:
    if images.shape[1:] != tuple(data.shape):
        raise DataError(
            f"{name} makes images {images.shape[1:]}; those of {data.name!r} are {tuple(data.shape)}; give the data in "
            "the same size, and for latents a student with its decoder"
        )
    check_finite(images, f"the images of {name}", first=start)


def extract_real_features(data: RealImages, features: Features) -> np.ndarray:
    """Return the features of all real images, (M, D)."""
    starts = range(0, len(data), _PIECE)
    with progress("real images", len(starts)) as bar:
        found = []
        for start in starts:
            found.append(features(data.batch(np.arange(start, min(start + _PIECE, len(data))))[0]))
            bar("")
    return np.concatenate(found)
