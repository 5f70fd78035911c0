"""Starting noise: Philox4x32-10 and Box-Muller, so that any language draws the same image from the same seed.

Each image has its own stream, addressed by (seed, image index, draw): a batch can be split anywhere and an image
made again on its own. Draw 0 is the starting noise; draw i re-noises at the end of the i-th segment.

The stream of a draw is the Philox blocks with counter `(block, draw, index low word, index high word)` and key
`(seed low word, seed high word)`, block = 0, 1, 2, ... A block's four words give four normals: words 0 and 1 a pair,
words 2 and 3 a pair, by Box-Muller `sqrt(-2 ln u) * (cos, sin)(2 pi v)` with `u, v = ((word >> 8) + 0.5) / 2^24`.
It runs in float64 and is rounded to float32 once. Libraries' logarithms and cosines differ in the last bit, so they are
written out as their series, in operations that IEEE 754 rounds alike everywhere (+, -, *, /, sqrt, none fused): the
noise is the same to the bit on every machine. `kernels/philox.h` does the same in C++.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

import math
import numbers
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import ShapeError

# Multipliers and Weyl constants of Philox4x32, from the paper.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Series in the square of their argument, as far as float64 shows a difference.
_LOGARITHM = [1 / n for n in range(21, 0, -2)]
_COSINE = [(-1) ** n / math.factorial(2 * n) for n in range(9, -1, -1)]
_SINE = [(-1) ** n / math.factorial(2 * n + 1) for n in range(8, -1, -1)]
_LN_2, _ROOT_HALF, _QUARTER = 0.6931471805599453, 0.7071067811865476, 1.5707963267948966


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: four random 32-bit words for every counter.

    Args:
        counter: unsigned integers (4, ...), each below 2^32.
        key: two words below 2^32.

    Returns:
        uint32, the shape of `counter`.
    """
    # Words 0 and 2 are multiplied, 1 and 3 are not: a round is a few operations on such pairs.
    counter = np.asarray(counter, np.uint64)
    multiplied, others = counter[0::2], counter[1::2]
    multipliers = _MULTIPLIERS.reshape(2, *(1,) * (multiplied.ndim - 1))
    for round_key in _round_keys(*key, multiplied.ndim):
        product = multiplied * multipliers
        multiplied = (product >> _HALF)[::-1] ^ others ^ round_key
        others = (product & _WORD)[::-1]
    words = np.empty(counter.shape, np.uint32)
    words[0::2], words[1::2] = multiplied, others
    return words


@lru_cache(maxsize=64)
def _round_keys(k0: int, k1: int, ndim: int) -> tuple[np.ndarray, ...]:
    """The keys of the ten rounds, each (2, 1, ...)."""
    keys = [[(k0 + i * _WEYL[0]) & 0xFFFFFFFF, (k1 + i * _WEYL[1]) & 0xFFFFFFFF] for i in range(10)]
    return tuple(np.array(key, np.uint64).reshape(2, *(1,) * (ndim - 1)) for key in keys)


def philox_normal(seed: int, indices: Sequence[int], shape: Sequence[int], *, draw: int = 0) -> np.ndarray:
    """Standard normal noise for the images `indices` of a seed, the same on every machine and in any batch.

    `kernels/normal.py` has the compiled twin of this function, which makes the same numbers sooner.

    Args:
        seed: 0 up to 2^64 - 1.
        indices: image numbers, each 0 up to 2^64 - 1.
        shape: shape of one image's noise, for example (C, H, W).
        draw: 0 for the starting noise, i for the re-noising after the i-th student call; below 2^32.

    Returns:
        float32, (len(indices), *shape).

    Raises:
        ShapeError: a seed, index or draw outside its range.
    """
    index = check_streams(seed, indices, draw)
    return _normal(int(seed), index, math.prod(shape), int(draw)).reshape(len(index), *shape)


def check_streams(seed: int, indices: Sequence[int], draw: int) -> np.ndarray:
    """Return the indices as uint64, if they, the seed and the draw lie in their ranges; else raise ShapeError."""
    _check_word("seed", seed, 64)
    _check_word("draw", draw, 32)
    for index in indices:
        _check_word("index", index, 64)
    return np.array(indices, np.uint64)


def _check_word(name: str, value: Any, bits: int) -> None:
    # Python's own whole numbers first: to ask an abstract class takes ten times as long.
    is_whole = type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))
    if not is_whole or not 0 <= int(value) < 1 << bits:
        raise ShapeError(f"{name} is a whole number from 0 to 2^{bits} - 1; got {value!r}")


def _normal(seed: int, index: np.ndarray, size: int, draw: int) -> np.ndarray:
    blocks, index = -(-size // 4), index[:, None]
    counter = np.empty((4, len(index), blocks), np.uint64)
    counter[0], counter[1] = np.arange(blocks, dtype=np.uint64), draw
    counter[2], counter[3] = index & _WORD, index >> _HALF
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    radius = _radius(words[0::2] >> 8)
    normals = np.empty((len(index), blocks, 2, 2), np.float32)  # of a block two pairs, of a pair two waves
    for i, wave in enumerate(_waves(words[1::2] >> 8)):
        normals[..., i] = (wave * radius).transpose(1, 2, 0)
    return np.ascontiguousarray(normals.reshape(len(index), 4 * blocks)[:, :size])


def _radius(k: np.ndarray) -> np.ndarray:
    """sqrt(-2 ln u), u = (k + 0.5) / 2^24, for whole k below 2^24; float64."""
    m, power = np.frexp((k + 0.5) * 2.0**-24)
    small = m < _ROOT_HALF
    m, power = np.where(small, 2 * m, m), power - small
    s = (m - 1) / (m + 1)  # ln m = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| below 0.172
    return np.sqrt(-2 * (power * _LN_2 + 2 * s * _polynomial(_LOGARITHM, s * s)))


def _waves(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2 pi (k + 0.5) / 2^24, for whole k below 2^24; float64."""
    quarter = (
        k.astype(np.int32) + (1 << 21)
    ) >> 22  # turns of 90 degrees, and what is left of one: -0.5 to 0.5
    x = ((k - (quarter << 22)) + 0.5) * 2.0**-22 * _QUARTER
    cosine, sine = _polynomial(_COSINE, x * x), _polynomial(_SINE, x * x) * x
    odd = quarter & 1 == 1
    cosine, sine = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    return np.where((quarter + 1) & 2, -cosine, cosine), np.where(quarter & 2, -sine, sine)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """By Horner's rule, the highest power's coefficient first."""
    first, *others = coefficients
    value = np.full_like(x, first)
    for coefficient in others:
        value *= x
        value += coefficient
    return value
