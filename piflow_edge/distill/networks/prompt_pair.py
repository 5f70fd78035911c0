"""A small pair of networks that bring images and their captions together, to judge whether pictures show their prompts.

The image's side is the convolutions of the small classifier. The prompt's side is a head on the pooled vector that the
student's own frozen text encoder makes: a few thousand images cannot teach a text encoder what words mean, the frozen
one knows it already, and its vectors are at hand wherever the student is steered by them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_edge.distill.data.image_data import CaptionedData
from piflow_edge.distill.loop.randomness import IterationRandom
from piflow_edge.errors import DataError

from .classifier import (
    LARGEST,
    SmallClassifier,
    count_iterations,
    find_background,
    load_pixels,
    minimise,
    shift_images,
)

# Images of a batch, each with its caption: an image's own is to be told from all others.
_BATCH_SIZE = 128
_HIDDEN = 256
# Of CLIP: how much a cosine counts at first, as a logarithm, and at most.
_SCALE, _LARGEST_SCALE = float(np.log(1 / 0.07)), float(np.log(100))
# Other captions that held-out images' own are told from.
_OTHERS = 99


class PromptHead(nn.Module):
    """Pooled vectors of a text encoder (M, P) -> vectors (M, width) in the space of the images' features."""

    def __init__(self, pooled: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(pooled)
        self.hidden, self.out = nn.Linear(pooled, _HIDDEN), nn.Linear(_HIDDEN, width)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(self.norm(pooled))))


@dataclass(frozen=True)
class TrainedPair:
    """The two networks, and how well they find an image's caption among up to 99 others.

    `pooled_input`: name of what the head takes. `accuracy`, `images`: see `TrainedClassifier`.
    """

    classifier: SmallClassifier
    head: PromptHead
    pooled_input: str
    accuracy: dict[str, float]
    images: dict[str, int]


def train_prompt_pair(
    data: CaptionedData, *, iterations: int | None = None, seed: int = 0, width: int = 64
) -> TrainedPair:
    """Train both sides on images and captions, of which an image has another one each time.

    Images are shifted as by `train_classifier`.

    Args:
        data: images steered by their captions, a pooled vector among what steers.
        iterations: training steps; None is as many as 40 passes over the images take.
        seed: of everything random.
        width: number of features.

    Raises:
        DataError: no pooled vectors, too few images, or images of fewer than 8 pixels a side.
        CheckFailedError: the training diverged.

    Source: Radford et al., Learning transferable visual models from natural language supervision, arXiv:2103.00020.
    """
    pooled_input = find_pooled_input(data)
    size = min(data.shape[1], LARGEST)
    if len(data) < 2 * _OTHERS or size < 8:
        raise DataError(
            f"a pair learns from {2 * _OTHERS} images of 8x8 pixels or more; {data.name!r} has {len(data)} of "
            f"{size}x{size}"
        )
    torch.manual_seed(seed)
    order = IterationRandom(seed, 0).permutation(len(data))
    test, train = order[: len(order) // 6], order[len(order) // 6 :]
    pooled = data.arrays[pooled_input]
    classifier = SmallClassifier(data.shape[0], size, 2, width)
    head = PromptHead(pooled.shape[1], width)
    steps = iterations or count_iterations(len(train), _BATCH_SIZE)
    _train(classifier, head, data, pooled_input, train, steps, seed)
    for network in (classifier, head):
        network.eval().requires_grad_(False)

    def measure(indices: np.ndarray) -> float:
        pieces = np.array_split(indices, 8)
        images = torch.cat([classifier.features(load_pixels(data, piece, size)) for piece in pieces])
        return find_own(images, head(_pooled(data, indices, pooled_input, None)), seed)

    accuracy = {"train": measure(train), "held_out": measure(test)}
    return TrainedPair(classifier, head, pooled_input, accuracy, {"train": len(train), "held_out": len(test)})


def find_pooled_input(data: CaptionedData) -> str:
    """Return the name of the pooled vectors among what steers the images.

    Raises:
        DataError: there are none.
    """
    for spec in data.conditioner.inputs:
        if len(spec.shape) == 2 and spec.dtype.startswith("float"):
            return spec.name
    raise DataError(
        f"a pair compares images with pooled vectors of their captions; {data.name!r} is steered by "
        f"{'; '.join(map(str, data.conditioner.inputs))}"
    )


def find_own(images: Tensor, prompts: Tensor, seed: int) -> float:
    """Return the share of images (M, D) whose own prompt, of the same row, is nearer than up to 99 others."""
    similarity = F.normalize(images, dim=1) @ F.normalize(prompts, dim=1).T
    random, right = np.random.default_rng(seed), 0
    for row in range(len(similarity)):
        others = np.delete(np.arange(len(prompts)), row)
        drawn = random.choice(others, min(_OTHERS, len(others)), replace=False)
        right += bool(similarity[row, row] > similarity[row, drawn].max())
    return right / len(similarity)


def _train(
    classifier: SmallClassifier,
    head: PromptHead,
    data: CaptionedData,
    pooled_input: str,
    train: np.ndarray,
    steps: int,
    seed: int,
) -> None:
    scale = nn.Parameter(torch.tensor(_SCALE))
    background, reach = find_background(data), max(1, classifier.size // 8)

    def loss_of(random: IterationRandom) -> Tensor:
        picked = train[random.permutation(len(train))[:_BATCH_SIZE]]
        images = shift_images(load_pixels(data, picked, classifier.size), background, reach, random)
        prompts = head(_pooled(data, picked, pooled_input, random.uniform(len(picked))))
        vectors = F.normalize(classifier.features(images), dim=1), F.normalize(prompts, dim=1)
        similarity = scale.clamp(max=_LARGEST_SCALE).exp() * vectors[0] @ vectors[1].T
        own = torch.arange(len(picked))
        return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2

    parameters = [*classifier.parameters(), *head.parameters(), scale]
    minimise(loss_of, parameters, "pair", steps, learning_rate=1e-3, seed=seed)


def _pooled(data: CaptionedData, indices: np.ndarray, name: str, draws: np.ndarray | None) -> Tensor:
    return torch.from_numpy(np.asarray(data.conditioning(indices, draws)[name], np.float32))
