"""Inception-v3 up to its 2,048 pooled features, for weights that you have: torchvision's, or FID's own.

The weights are named as torchvision names them, so its files load, without torchvision. The network that published
FIDs are measured with is another one, trained in TensorFlow with 1,008 outputs and ported by pytorch-fid: it pools
differently in six places, and is told by the shape of its last layer.

Why not torchvision's own or pytorch-fid's: the wheel of torchvision 0.28.0 on a package index cannot be imported
beside a CPU build of torch 2.13 ("operator torchvision::nms does not exist"), pytorch-fid imports torchvision, and its
constructor downloads the weights that are to be read from a file here. What theirs compute is recorded in the tests.

Source: Szegedy et al., Rethinking the Inception architecture, arXiv:1512.00567.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from piflow_edge.errors import FeatureError
from piflow_edge.system.files import sha256
from piflow_edge.system.pixels import round_to_bytes, split_images

_SIDE = 299
_BATCH_SIZE = 32
_FID_CLASSES = 1008  # of the TensorFlow network; torchvision's has ImageNet's 1,000

# One branch's units, in order: name -> (channels out, kernel). A unit keeps the size, unless its block halves it.
_Units = dict[str, tuple[int, int | tuple[int, int]]]


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Branches side by side, their channels joined: chains of units, then a pooling, perhaps with a unit after it.

    Args:
        c_in: channels of the input.
        chains: units of every branch but the last; a chain that ends in `*a` and `*b` forks there.
        pool: "average", "average inside" (leaves the padding out of the mean), "max", or "halve".
        pool_out: channels of the unit after the pooling; 0 is none. With "halve" the last unit of each chain, too,
            has stride 2 and no padding.
    """

    def __init__(self, c_in: int, chains: list[_Units], pool: str, pool_out: int):
        super().__init__()
        self._pool, self._chains = pool, [list(chain) for chain in chains]
        for chain in chains:
            width = c_in
            for name, (c_out, kernel) in chain.items():
                halves = pool == "halve" and name == list(chain)[-1]
                sides = (kernel, kernel) if isinstance(kernel, int) else kernel
                padding = 0 if halves else tuple(side // 2 for side in sides)
                setattr(self, name, Unit(width, c_out, kernel, 2 if halves else 1, padding))
                if not name.endswith("a"):
                    width = c_out
        if pool_out:
            self.branch_pool = Unit(c_in, pool_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self._chains:
            y = x
            for name in chain:
                z = getattr(self, name)(y)
                if name.endswith("a"):
                    found.append(z)  # one side of a fork; `y` stays for the other
                else:
                    y = z
            found.append(y)
        pooled = self._apply_pool(x)
        found.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(found, 1)

    def _apply_pool(self, x: Tensor) -> Tensor:
        if self._pool == "halve":
            return F.max_pool2d(x, 3, 2)
        if self._pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=self._pool == "average")


def _block_a(c_in: int, pool: str, pool_out: int) -> Branches:
    chains: list[_Units] = [
        {"branch1x1": (64, 1)},
        {"branch5x5_1": (48, 1), "branch5x5_2": (64, 5)},
        {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
    ]
    return Branches(c_in, chains, pool, pool_out)


def _block_b(c_in: int) -> Branches:
    chains: list[_Units] = [
        {"branch3x3": (384, 3)},
        {"branch3x3dbl_1": (64, 1), "branch3x3dbl_2": (96, 3), "branch3x3dbl_3": (96, 3)},
    ]
    return Branches(c_in, chains, "halve", 0)


def _block_c(c_in: int, width: int, pool: str) -> Branches:
    row, column = (1, 7), (7, 1)
    chains: list[_Units] = [
        {"branch1x1": (192, 1)},
        {"branch7x7_1": (width, 1), "branch7x7_2": (width, row), "branch7x7_3": (192, column)},
        {
            "branch7x7dbl_1": (width, 1),
            "branch7x7dbl_2": (width, column),
            "branch7x7dbl_3": (width, row),
            "branch7x7dbl_4": (width, column),
            "branch7x7dbl_5": (192, row),
        },
    ]
    return Branches(c_in, chains, pool, 192)


def _block_d(c_in: int) -> Branches:
    chains: list[_Units] = [
        {"branch3x3_1": (192, 1), "branch3x3_2": (320, 3)},
        {
            "branch7x7x3_1": (192, 1),
            "branch7x7x3_2": (192, (1, 7)),
            "branch7x7x3_3": (192, (7, 1)),
            "branch7x7x3_4": (192, 3),
        },
    ]
    return Branches(c_in, chains, "halve", 0)


def _block_e(c_in: int, pool: str) -> Branches:
    row, column = (1, 3), (3, 1)
    chains: list[_Units] = [
        {"branch1x1": (320, 1)},
        {"branch3x3_1": (384, 1), "branch3x3_2a": (384, row), "branch3x3_2b": (384, column)},
        {
            "branch3x3dbl_1": (448, 1),
            "branch3x3dbl_2": (384, 3),
            "branch3x3dbl_3a": (384, row),
            "branch3x3dbl_3b": (384, column),
        },
    ]
    return Branches(c_in, chains, pool, 192)


class Inception(nn.Module):
    """Images (B, 3, 299, 299) in [-1, 1] -> features (B, 2048).

    Args:
        fid: the network that published FIDs are measured with, instead of torchvision's.
    """

    def __init__(self, *, fid: bool):
        super().__init__()
        average, last = ("average inside", "max") if fid else ("average", "average")
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = _block_a(192, average, 32)
        self.Mixed_5c = _block_a(256, average, 64)
        self.Mixed_5d = _block_a(288, average, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128, average)
        self.Mixed_6c = _block_c(768, 160, average)
        self.Mixed_6d = _block_c(768, 160, average)
        self.Mixed_6e = _block_c(768, 192, average)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, average)
        self.Mixed_7c = _block_e(2048, last)

    def forward(self, images: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


class InceptionFeatures:
    """The 2,048 pooled features of an Inception-v3 whose weights lie in a file.

    What it is fed: the images' 8-bit pixels, as a PNG would hold them; grey repeated to three channels; resized to
    299x299, bilinear, with antialiasing for torchvision's weights and without for FID's, as pytorch-fid does; in
    [-1, 1], which is what torchvision's normalisation and its own correction of it for these weights come to.

    Args:
        path: a state dict: torchvision's `inception_v3`, or pytorch-fid's `pt_inception`; .pth, .pt or .safetensors.
            Read as tensors alone: no code from it runs.

    Raises:
        FeatureError: it cannot be read, or is of another network.
    """

    def __init__(self, path: Path):
        weights, digest = _read(path)
        self._fid = "fc.weight" in weights and weights["fc.weight"].shape[0] == _FID_CLASSES
        self._network = Inception(fid=self._fid)
        _load(self._network, weights, path)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network.eval().requires_grad_(False).to(self._device)
        self.description = (
            "2,048 features of FID's Inception-v3, TensorFlow's weights as pytorch-fid ports them"
            if self._fid
            else "2,048 features of torchvision's Inception-v3, not the weights that published FIDs are measured with"
        )
        self.source = {"file": path.name, "sha256": digest}

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (M, 2048) of images float32 (M, C, H, W) in [-1, 1], C 3 or 1.

        Raises:
            FeatureError: images of other channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise FeatureError(f"Inception takes images of 3 channels, or grey ones; got {images.shape}")
        found = []
        for piece in split_images(images, _BATCH_SIZE):
            pixels = torch.from_numpy(round_to_bytes(piece)).to(self._device).expand(-1, 3, -1, -1)
            pixels = F.interpolate(
                pixels, (_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=not self._fid
            )
            found.append(self._network(pixels).cpu().numpy())
        return np.concatenate(found)


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, and its checksum."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".safetensors":
            weights = load_safetensors(data)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FeatureError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise FeatureError(f"{path} is no state dict that can be read as tensors alone: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise FeatureError(f"{path} holds no state dict; save network.state_dict(), not the network")
    return weights, sha256(data)


def _load(network: Inception, weights: dict[str, Tensor], path: Path) -> None:
    """Copy into the network what it has of `weights`; classifiers and counters are left out."""
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    for name, own in network.state_dict().items():
        found = weights.get(name)
        if name not in counters and (found is None or found.shape != own.shape):
            raise FeatureError(
                f"{path} holds no Inception-v3: {name} should be {tuple(own.shape)}, is "
                f"{'absent' if found is None else tuple(found.shape)}"
            )
    network.load_state_dict({n: weights.get(n, own) for n, own in network.state_dict().items()})
