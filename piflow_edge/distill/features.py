"""The feature space that digits are compared in: a small classifier trained on the real ones.

It knows nothing but 8x8 digits. Distances in it say how alike two sets of digits are, and cannot be set beside FIDs
of other papers. Made by `python -m piflow_edge.distill.features --out DIR`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from piflow_edge.errors import ShapeError
from piflow_edge.files import write_atomic

from .data import load_images
from .randomness import IterationRandom

ASSETS = Path(__file__).parent / "assets"
_FILE = "digits_classifier.safetensors"
_HELD_OUT = 297  # of 1,797 digits, only for the accuracy that is reported


class DigitsClassifier(nn.Module):
    """Two convolutions and a hidden layer of 64, whose activations are the features."""

    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        """(M, 1, 8, 8) in [-1, 1] -> (M, 64)."""
        return self.hidden(F.silu(self.conv_2(F.silu(self.conv_1(images)))).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.out(F.silu(self.features(images)))


@torch.no_grad()
def digit_features(images: np.ndarray) -> np.ndarray:
    """Features of digits (M, 1, 8, 8) in [-1, 1], float32 (M, 64), from the shipped classifier.

    Raises:
        ShapeError: images of another shape: the classifier was trained on 8x8 digits alone.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
        raise ShapeError(f"the shipped features are for 8x8 grey digits, (M, 1, 8, 8); got {images.shape}")
    classifier = DigitsClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(ASSETS / _FILE).items()})
    return classifier.eval().features(torch.from_numpy(images).float()).numpy()


def train_classifier(folder: Path, *, epochs: int = 40, seed: int = 0) -> dict:
    """Train the classifier on the digits, shifted by up to a pixel, and write it to `folder`.

    Returns:
        Accuracy on digits it was trained on and on held-out ones, and the number of each.
    """
    torch.manual_seed(seed)
    data = load_images("digits")
    order = IterationRandom(seed, 0).permutation(len(data))
    images, labels = torch.from_numpy(data.images[order]), torch.from_numpy(data.labels[order])
    held, kept = (images[:_HELD_OUT], labels[:_HELD_OUT]), (images[_HELD_OUT:], labels[_HELD_OUT:])
    classifier = DigitsClassifier()
    steps_per_epoch = len(kept[0]) // 50
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    for step in range(epochs * steps_per_epoch):
        random = IterationRandom(seed, step + 1)
        picked = torch.from_numpy(random.choice(len(kept[0]), 50))
        down, right = random.choice(3, 2) - 1
        shifted = F.pad(kept[0][picked], (1, 1, 1, 1), value=-1.0)
        shifted = shifted[..., 1 + down : 9 + down, 1 + right : 9 + right]
        loss = F.cross_entropy(classifier(shifted), kept[1][picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() for k, v in classifier.state_dict().items()}
    write_atomic(folder / _FILE, save_tensors(weights))

    def accuracy(pair):
        with torch.no_grad():
            return (classifier(pair[0]).argmax(1) == pair[1]).float().mean().item()

    return {
        "accuracy": {"train": accuracy(kept), "held_out": accuracy(held)},
        "images": {"train": len(kept[0]), "held_out": _HELD_OUT},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Train the digits classifier whose features FID is measured in."
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the weights")
    print(json.dumps(train_classifier(parser.parse_args().out)))
