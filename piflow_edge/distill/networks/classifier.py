"""Feature spaces for images that no large network was made for: a small classifier trained on the real ones.

Distances in it say how alike two sets of these images are, and cannot be set beside FIDs of other papers. The one of
8x8 digits ships with the package, made by `python -m piflow_edge.export.feature_extractor --out FILE`; `piflow-edge
train-features` makes others.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.loop.randomness import IterationRandom
from piflow_edge.errors import CheckFailedError, DataError
from piflow_edge.system.pixels import resize_images
from piflow_edge.system.progress import progress

_BATCH_SIZE = 50
# Larger images are looked at in this size: the classifier tells classes apart, and details below its grid are lost.
LARGEST = 64


class SmallClassifier(nn.Module):
    """Convolutions, each but the first at half the size, down to about 4x4; a hidden layer gives the features.

    Args:
        channels, size: of the square images; `size` 8 or more.
        classes: to tell apart.
        width: number of features.
    """

    def __init__(self, channels: int, size: int, classes: int, width: int = 64):
        super().__init__()
        self.channels, self.size, self.classes = channels, size, classes
        filters, side, self.depth = 16, size, 1
        self.conv_1 = nn.Conv2d(channels, filters, 3, padding=1)
        while side > 4:
            self.depth, side = self.depth + 1, (side + 1) // 2
            setattr(self, f"conv_{self.depth}", nn.Conv2d(filters, 2 * filters, 3, padding=1, stride=2))
            filters *= 2
        self.hidden = nn.Linear(filters * side * side, width)
        self.out = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """(M, C, H, W) in [-1, 1] -> (M, width)."""
        for number in range(1, self.depth + 1):
            images = F.silu(getattr(self, f"conv_{number}")(images))
        return self.hidden(images.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.silu(self.features(images)))


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier and how well it tells the classes apart.

    `accuracy`: on the images it was "train"ed on and on those "held_out"; `images`: the number of each.
    """

    classifier: SmallClassifier
    accuracy: dict[str, float]
    images: dict[str, int]


def train_classifier(
    data: ImageData,
    *,
    iterations: int | None = None,
    seed: int = 0,
    width: int = 64,
    held_out: int | None = None,
) -> TrainedClassifier:
    """Train a classifier on a set of images, shifted by up to an eighth of their side.

    Images of more than 64 pixels a side are looked at in 64. The features see what tells the classes apart; a set
    whose classes look alike gives features that see little.

    Args:
        data: images of two classes or more.
        iterations: training steps; None is as many as 40 passes over the images take.
        seed: of everything random.
        width: number of features.
        held_out: images kept back, only for the accuracy that is reported; None is a sixth.

    Raises:
        DataError: fewer than two classes, or images of fewer than 8 pixels a side.
        CheckFailedError: the training diverged.
    """
    ids, num_classes = _find_classes(data)
    channels, size = data.shape[0], min(data.shape[1], LARGEST)
    if size < 8:
        raise DataError(
            f"a classifier needs images of 8x8 pixels or more; those of {data.name!r} are {size}x{size}"
        )
    torch.manual_seed(seed)
    order = IterationRandom(seed, 0).permutation(len(data))
    split = len(order) // 6 if held_out is None else held_out
    test, train = order[:split], order[split:]
    labels = torch.from_numpy(ids.astype(np.int64))
    background = find_background(data)
    reach = max(1, size // 8)

    classifier = SmallClassifier(channels, size, num_classes, width)

    def loss_of(random: IterationRandom) -> Tensor:
        picked = train[random.choice(len(train), _BATCH_SIZE)]
        shifted = shift_images(load_pixels(data, picked, size), background, reach, random)
        return F.cross_entropy(classifier(shifted), labels[picked])

    steps = iterations or count_iterations(len(train), _BATCH_SIZE)
    minimise(loss_of, classifier.parameters(), "classifier", steps, learning_rate=2e-3, seed=seed)
    classifier.eval().requires_grad_(False)

    parts = {"train": train, "held_out": test}
    return TrainedClassifier(
        classifier,
        {name: _measure_accuracy(classifier, data, labels, part, size) for name, part in parts.items()},
        {name: len(part) for name, part in parts.items()},
    )


def count_iterations(images: int, batch_size: int) -> int:
    """Return how many training steps 40 passes over some images take."""
    return 40 * max(1, images // batch_size)


def minimise(
    loss_of: Callable[[IterationRandom], Tensor],
    parameters: Iterable[nn.Parameter],
    what: str,
    steps: int,
    *,
    learning_rate: float,
    seed: int,
) -> None:
    """Train small networks by Adam, at a learning rate that falls to 0 along half a cosine.

    Args:
        loss_of: the loss of a batch that is drawn with the random numbers it is called with.
        parameters: to train.
        what: they are of, for the bar and for errors.
        steps: batches.
        learning_rate: at the start.
        seed: of all batches.

    Raises:
        CheckFailedError: the training diverged.
    """
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(f"training the {what}", steps) as bar:
        for step in range(steps):
            loss = loss_of(IterationRandom(seed, step + 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar(f"loss {loss.item():.3f}")
    if not torch.isfinite(loss):
        raise CheckFailedError(f"the {what}'s training diverged: its loss is {loss.item()}")


def _measure_accuracy(
    classifier: nn.Module, data: ImageData, labels: Tensor, indices: np.ndarray, size: int
) -> float:
    pieces = np.array_split(indices, max(1, len(indices) // 500))
    right = sum(
        int((classifier(load_pixels(data, piece, size)).argmax(1) == labels[piece]).sum()) for piece in pieces
    )
    return right / max(1, len(indices))


def _find_classes(data: ImageData) -> tuple[np.ndarray, int]:
    """The class of each image, and how many classes there are. Images that are steered by the same are a class."""
    names, ids = np.unique(data.titles(np.arange(len(data))), return_inverse=True)
    if data.latent is not None or len(names) == len(data):
        holds = "latents" if data.latent is not None else "no two images of one class"
        raise DataError(f"a classifier learns from images with labels; {data.name!r} holds {holds}")
    if len(names) < 2:
        raise DataError(f"a classifier needs images of two classes or more; {data.name!r} has {len(names)}")
    return ids, len(names)


def load_pixels(data: ImageData, indices: np.ndarray, size: int) -> Tensor:
    """Return images (B, C, size, size) in [-1, 1]."""
    return torch.from_numpy(resize_images(data.batch(indices)[0], size, size))


def shift_images(images: Tensor, background: Tensor, reach: int, random: IterationRandom) -> Tensor:
    """Return square images moved by up to `reach` pixels up or down and sideways, all alike."""
    size = images.shape[-1]
    down, right = random.choice(2 * reach + 1, 2) - reach
    wide = F.pad(images - background, (reach,) * 4) + background
    return wide[..., reach + down :, reach + right :][..., :size, :size]


def find_background(data: ImageData) -> Tensor:
    """What lies beyond the images' edges: each channel's median there, (1, C, 1, 1)."""
    some = data.batch(IterationRandom(0, 0).permutation(len(data))[:1000])[0]
    edges = np.concatenate([some[:, :, 0], some[:, :, -1], some[..., 0], some[..., -1]], axis=-1)
    return torch.from_numpy(np.median(edges, axis=(0, 2)).astype(np.float32))[None, :, None, None]
